"""Claims of SnapKV, a baseline: that keys which are given up free memory."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from pertoken.bench.claims import Bench, Measurement, claim


def peak(length: int, keys: int) -> tuple[int, int]:
    """Bytes at the peak of reading `length` tokens and writing 8, beyond what the process held before, and those of the
    cache at the end; with SnapKV at a budget of `keys`, or dense with 0. For a process of its own."""
    import resource
    from contextlib import nullcontext

    import torch
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    from pertoken.attend.kept import cache_bytes
    from pertoken.attend.snapkv import SnapKV
    from pertoken.core.attach import attach
    from pertoken.core.budget import Budget
    from pertoken.core.cost import peak_memory

    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 12, "vocab_size": 64}
    heads: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64}
    config: Any = LlamaConfig(**shape, **heads, max_position_embeddings=2 * length, eos_token_id=None, pad_token_id=0)
    model: Any = LlamaForCausalLM(config).eval()
    ids = torch.randint(1, 64, (1, length))
    model.generate(ids[:, :64], max_new_tokens=2, do_sample=False)
    now = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    cache = DynamicCache(config=config)
    with attach(model, SnapKV(Budget(tokens=keys))) if keys else nullcontext():
        model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False)
    return peak_memory() - now, cache_bytes(cache)


@claim(
    "snapkv",
    claim="Reading 8k tokens and keeping a quarter of the keys takes at least 30 % less memory at the peak than dense "
    "attention",
    metric="bytes at the peak beyond the model (12 layers, 8 key heads of 64, fp32)",
    expected="<= 0.7",
)
def less_memory(bench: Bench) -> Measurement:
    length = 2048 if bench.quick else 8192
    found = {}
    for name, keys in (("dense", 0), ("snapkv", length // 4)):
        bench.status(f"{length} tokens: {name}")
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            found[name] = pool.submit(peak, length, keys).result()
    told = {f"bytes of the cache at the end, {name}": held for name, (_, held) in found.items()}
    return Measurement(float(found["snapkv"][0]), "dense", float(found["dense"][0]), 1, told)
