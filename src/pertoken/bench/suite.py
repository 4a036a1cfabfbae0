"""What the claims of the decoders share: models, prompts, and how losslessness and speed are measured."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pertoken.bench.claims import Bench, Measurement
from pertoken.core.attach import attach
from pertoken.core.policy import Policy

TARGET, DRAFT = "code-target", "code-draft"
FAMILIES = ("llama", "qwen3", "gpt2", "mistral", "gemma")


@dataclass(frozen=True)
class Pair:
    """A target, its draft and their tokenizer, in one dtype."""

    target: Any
    draft: Any
    tokenizer: Any

    def batch(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Left-padded inputs."""
        return dict(self.tokenizer(list(texts), return_tensors="pt", padding=True))


def pair(bench: Bench, dtype: str = "fp32") -> Pair:
    """The zoo's code models."""

    def make() -> Pair:
        from pertoken.models.load import load

        target, tokenizer = load(f"zoo:{TARGET}", dtype)
        draft, _ = load(f"zoo:{DRAFT}", dtype)
        for model in (target, draft):  # a fixed length for every side: end of text would make runs unequal
            model.generation_config.eos_token_id = None
        return Pair(target, draft, tokenizer)

    return bench.shared(("pair", dtype), make)


def texts(bench: Bench, full: int, quick: int) -> list[str]:
    """Held-out prompts, fewer when quick."""
    from pertoken.zoo.evaluate import prompts

    return prompts(quick if bench.quick else full)


def generate(model: Any, inputs: dict[str, Tensor], new: int, decoder: Any = None, **options: Any) -> Tensor:
    """New ids `[batch, token]`; greedy unless told otherwise."""
    options = {"do_sample": False, "pad_token_id": 0} | options
    if decoder is not None:
        options["custom_generate"] = decoder
    return model.generate(**inputs, max_new_tokens=new, **options)[:, inputs["input_ids"].shape[1] :]


def chunks(items: list[str], size: int) -> list[list[str]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def identical(bench: Bench, make: Callable[[Pair], Any], batch: int) -> Measurement:
    """Share of held-out prompts on which greedy ids equal plain generation's, in fp32."""
    models = pair(bench)
    prompts, new = texts(bench, 200, 8), 32 if bench.quick else 64
    decoder, same = make(models), 0
    for part in chunks(prompts, batch):
        inputs = models.batch(part)
        key = ("plain", batch, new, part[0])
        expected = bench.shared(key, lambda inputs=inputs: generate(models.target, inputs, new))
        same += int((generate(models.target, inputs, new, decoder) == expected).all(-1).sum())
    return Measurement(same / len(prompts), "generate", 1.0, len(prompts), {"batch": batch, "new_tokens": new})


def tiny(family: str, layers: int, seed: int, vocabulary: int = 211) -> Any:
    """A random model of a family, built from its configuration."""
    import transformers as hf

    common = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "bos_token_id": 0,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    configs: dict[str, Callable[[], Any]] = {
        "llama": lambda: hf.LlamaConfig(**common),
        "qwen3": lambda: hf.Qwen3Config(**common),
        "mistral": lambda: hf.MistralConfig(**common, sliding_window=64),
        "gemma": lambda: hf.GemmaConfig(**common),
        "gpt2": lambda: hf.GPT2Config(
            vocab_size=vocabulary,
            n_embd=32,
            n_layer=layers,
            n_head=4,
            n_positions=512,
            initializer_range=0.3,
            bos_token_id=0,
            eos_token_id=None,
        ),
    }
    torch.manual_seed(seed)
    return hf.AutoModelForCausalLM.from_config(configs[family]()).eval()


def noisy(model: Any, scale: float, seed: int) -> Any:
    """A copy with noise on its weights: a draft that is often right."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * scale * weight.std())
    return other


def identical_in_families(bench: Bench, make: Callable[[Pair], Any]) -> Measurement:
    """As `identical`, on random models of every family, batch 1 and ragged batch 8; tokens of the prompts modulo
    theirs."""
    prompts, tokenizer, new = texts(bench, 200, 8), pair(bench).tokenizer, 16
    same = total = 0
    detail: dict[str, float] = {}
    for family in FAMILIES:
        target = bench.shared(("tiny", family), lambda family=family: tiny(family, 4, 1))
        decoder = make(Pair(target, noisy(target, 0.06, 3), tokenizer))
        here = 0
        for batch in (1, 8):
            for part in chunks(prompts, batch):
                inputs = dict(tokenizer(part, return_tensors="pt", padding=True))
                inputs["input_ids"] = inputs["input_ids"] % target.config.vocab_size
                key = ("plain", family, batch, part[0])
                expected = bench.shared(key, lambda inputs=inputs, target=target: generate(target, inputs, new))
                here += int((generate(target, inputs, new, decoder) == expected).all(-1).sum())
        detail[family] = here / (2 * len(prompts))
        same, total = same + here, total + 2 * len(prompts)
    return Measurement(same / total, "generate", 1.0, total, {"share identical": detail, "new_tokens": new})


def near_ties(bench: Bench, make: Callable[[Pair], Any]) -> Measurement:
    """In bf16: share of prompts whose first difference from plain generation, if any, is at a near-tie.

    A near-tie: the two tokens' logits in fp32 differ by less than 2 % of the largest logit's size (bf16 keeps 8 bits).
    """
    low, exact = pair(bench, "bf16"), pair(bench)
    prompts, new = texts(bench, 100, 6), 32 if bench.quick else 64
    decoder, fine, equal, gaps = make(low), 0, 0, []
    for text in prompts:
        inputs = low.batch([text])
        plain, ours = generate(low.target, inputs, new)[0], generate(low.target, inputs, new, decoder)[0]
        differs = (plain != ours).nonzero().flatten()
        if not len(differs):
            equal, fine = equal + 1, fine + 1
            continue
        at = int(differs[0])
        ids = torch.cat([inputs["input_ids"][0], plain[:at]])[None]
        with torch.inference_mode():
            logits = exact.target(ids, logits_to_keep=1).logits[0, -1]
        gap = float((logits[plain[at]] - logits[ours[at]]).abs() / logits.abs().max())
        gaps.append(gap)
        fine += gap < 0.02
    detail = {"identical": equal / len(prompts), "near-ties": len(gaps), "largest relative gap": max(gaps, default=0.0)}
    return Measurement(fine / len(prompts), "generate", 1.0, len(prompts), detail)


def law_test(bench: Bench, make: Callable[[Pair], Any], temperature: float) -> Measurement:
    """p-value of a chi-square test: three sampled tokens over a vocabulary of five against the target's exact law."""
    vocabulary, length, rows = 5, 3, 512
    rounds = 16 if bench.quick else 120
    target, draft = tiny("llama", 4, 1, vocabulary), tiny("llama", 2, 2, vocabulary)
    for model in (target, draft):
        model.lm_head.weight.data *= 0.25
    prompt = torch.tensor([[1, 2, 3, 1, 2]])
    every = torch.cartesian_prod(*[torch.arange(vocabulary)] * length)
    with torch.inference_mode():
        logits = target(torch.cat([prompt.expand(len(every), -1), every], 1)).logits.double() / temperature
    steps = logits.softmax(-1)[:, prompt.shape[1] - 1 : -1].gather(-1, every[..., None])
    expected = steps.squeeze(-1).prod(-1) * rows * rounds
    decoder, counts = make(Pair(target, draft, None)), torch.zeros(vocabulary**length)
    inputs = {
        "input_ids": prompt.expand(rows, -1),
        "attention_mask": torch.ones(rows, prompt.shape[1], dtype=torch.long),
    }
    for _ in range(rounds):
        out = generate(target, inputs, length, decoder, do_sample=True, temperature=temperature, top_k=0)
        code = (out * torch.tensor([vocabulary**2, vocabulary, 1])).sum(-1)
        counts += torch.bincount(code, minlength=len(counts))
    rare = expected < 5
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]]).double()
    wanted = torch.cat([expected[~rare], expected[rare].sum()[None]]).double()
    keep = wanted > 0
    observed, wanted = observed[keep], wanted[keep]
    wanted = wanted * observed.sum() / wanted.sum()
    statistic = ((observed - wanted) ** 2 / wanted).sum()
    p_value = float(torch.special.gammaincc(torch.tensor((len(observed) - 1) / 2).double(), statistic / 2))
    detail = {"chi_square": float(statistic), "cells": len(observed), "accepted": decoder.stats.accepted}
    return Measurement(p_value, "exact law", 1.0, rows * rounds, detail)


@dataclass
class Side:
    """A contender for speed: `work(inputs)` returns new ids `[batch, token]`."""

    name: str
    work: Callable[[dict[str, Tensor]], Tensor]


def fastest(sides: list[Side], batches: list[dict[str, Tensor]]) -> Side:
    """The side with the least median time over a few batches, run in turn."""
    seconds: dict[str, list[float]] = {side.name: [] for side in sides}
    for inputs in batches:
        for side in sides:
            seconds[side.name].append(clock(side, inputs)[0])
    return min(sides, key=lambda side: statistics.median(seconds[side.name]))


def clock(side: Side, inputs: dict[str, Tensor]) -> tuple[float, int]:
    start = time.perf_counter()
    out = side.work(inputs)
    return time.perf_counter() - start, out.numel()


def race(groups: dict[str, list[Side]], batches: list[dict[str, Tensor]], trial: int = 3) -> dict[str, dict[str, Any]]:
    """Tokens per second of each group's fastest side, all run in turn on the same batches after a warm-up.

    The fastest side of a group is chosen on the first `trial` batches, which do not count. Per group: setting, tokens
    per second of every batch, and their median.
    """
    chosen = {}
    for name, sides in groups.items():
        for side in sides:
            side.work(batches[0])
        chosen[name] = fastest(sides, batches[:trial]) if len(sides) > 1 else sides[0]
    speeds: dict[str, list[float]] = {name: [] for name in groups}
    for inputs in batches[trial:]:
        for name, side in chosen.items():
            seconds, tokens = clock(side, inputs)
            speeds[name].append(tokens / seconds)
    return {
        name: {"setting": chosen[name].name, "tokens_per_second": statistics.median(values), "all": values}
        for name, values in speeds.items()
    }


def batches(bench: Bench, size: int, count: int) -> list[dict[str, Tensor]]:
    """So many batches of held-out prompts, which begin again behind the 160th."""
    prompts = texts(bench, 200, 200)
    return [pair(bench).batch(prompts[i * size % 160 :][:size]) for i in range(count)]


def attached(model: Any, policy: Policy, work: Callable[[dict[str, Tensor]], Tensor]) -> Callable[..., Tensor]:
    """The work of a side with a policy on its model."""

    def ours(inputs: dict[str, Tensor]) -> Tensor:
        with attach(model, policy):
            return work(inputs)

    return ours


def race_attached(
    model: Any,
    policy: Policy,
    plain: Callable[[dict[str, Tensor]], Tensor],
    inputs: list[dict[str, Tensor]],
    names: tuple[str, str],
    setting: str | None = None,
) -> Measurement:
    """Tokens per second with the policy on the model over those without it, in turn on all batches but the first.

    names: the method's and the baseline's; setting: the policy's name in the detail, the method's unless given.
    """
    method, baseline = names
    ours = Side(setting or method, attached(model, policy, plain))
    return ratio_of(race({method: [ours], baseline: [Side(baseline, plain)]}, inputs, trial=1), method, baseline)


def ratio_of(results: dict[str, dict[str, Any]], method: str, baseline: str) -> Measurement:
    """Median over batches of method's tokens per second over the baseline's, expressed on the baseline's median."""
    pairs = zip(results[method]["all"], results[baseline]["all"], strict=True)
    ratios = [mine / theirs for mine, theirs in pairs]
    base = results[baseline]["tokens_per_second"]
    detail = {
        "settings": {name: found["setting"] for name, found in results.items()},
        "tokens_per_second": {name: round(found["tokens_per_second"], 1) for name, found in results.items()},
        "ratio_quartiles": [round(q, 3) for q in statistics.quantiles(ratios, n=4)] if len(ratios) > 1 else ratios,
    }
    return Measurement(statistics.median(ratios) * base, baseline, base, len(ratios), detail)
