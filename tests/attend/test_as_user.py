"""The three methods as somebody uses them: families, precisions, padding, and every way of generating; what cannot be
is refused in one sentence."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from pertoken.attend.dhsa import DHSA
from pertoken.attend.dma import DMA
from pertoken.attend.h2o import H2O
from pertoken.attend.snapkv import SnapKV
from pertoken.attend.tokenselect import TokenSelect
from pertoken.core.attach import attach
from pertoken.core.budget import Budget
from pertoken.core.errors import BadRequest
from pertoken.core.fingerprint import fingerprint

torch.set_num_threads(1)
COMMON = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.3, "pad_token_id": 0, "eos_token_id": None, "bos_token_id": 1,
}  # fmt: skip
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**COMMON)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**COMMON)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**COMMON, head_dim=8, sliding_window=6)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.3, pad_token_id=0,
            eos_token_id=None, bos_token_id=1,
        )
    ),
}  # fmt: skip
FEW = {"budget": Budget(tokens=5), "sinks": 2, "recent": 3, "run": 4}


def made(name: str) -> torch.nn.Module:
    torch.manual_seed(3)
    return MODELS[name]().eval()


POLICIES = {
    "tokenselect": TokenSelect(**FEW, positions="original", reuse=0.5),
    "tokenselect, compact": TokenSelect(**FEW, reuse=0.5),
    "dhsa": DHSA(**FEW, chunk=3),
    "dhsa, compact": DHSA(**FEW, chunk=3, positions="compact"),
    "dma": DMA(Budget(tokens=5), sinks=2, recent=3, run=4),
}
SERVED = [(family, name) for family in MODELS for name in POLICIES if family != "gpt2" or "compact" not in name]


def every_token_chooses(policy):
    """A selection is used again only where a cache grows token by token."""
    return replace(policy, reuse=2.0) if isinstance(policy, TokenSelect) else policy


def ragged(lengths=(30, 4, 17), seed=0):
    generator = torch.Generator().manual_seed(seed)
    widest = max(lengths)
    ids = torch.randint(2, 61, (len(lengths), widest), generator=generator)
    mask = torch.stack([torch.arange(widest) >= widest - n for n in lengths]).long()
    return ids * mask, mask


GREEDY = {"max_new_tokens": 8, "do_sample": False}


@pytest.mark.parametrize(("family", "name"), SERVED)
def test_a_ragged_batch_in_bf16_is_each_row_alone_and_near_fp32(family, name):
    """To rounding: bf16 keeps 8 bits, and which keys are read may turn on the last of them."""
    model, policy = made(family), POLICIES[name]
    ids, mask = ragged()
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.inference_mode(), attach(model, policy):
            out = model(ids, attention_mask=mask, position_ids=positions).logits
            assert out.dtype == dtype and out[mask.bool()].isfinite().all()
            found[dtype] = out[:, -1].float()
            alone = [model(ids[r : r + 1, mask[r].bool()]).logits[:, -1].float() for r in range(len(ids))]
        gap = (torch.cat(alone) - found[dtype]).norm() / found[dtype].norm()
        assert gap < (1e-4 if dtype == torch.float32 else 0.1), f"{family}, {dtype}: {gap}"
    low, high = found[torch.bfloat16], found[torch.float32]
    assert (low - high).norm() / high.norm() < 0.5


@pytest.mark.parametrize(("family", "name"), SERVED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_way_of_generating_runs(family, name, dtype):
    model, policy = made(family).to(dtype), POLICIES[name]
    ids, mask = ragged((20, 6))
    with attach(model, policy):
        plain = model.generate(ids, attention_mask=mask, **GREEDY)
        assert plain.shape == (2, 28)
        beams = model.generate(ids, attention_mask=mask, num_beams=3, num_return_sequences=2, **GREEDY)
        assert beams.shape == (4, 28)
        drawn = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=True, num_return_sequences=3)
        assert drawn.shape == (6, 28)
        without = model.generate(ids, attention_mask=mask, use_cache=False, **GREEDY)
        assert without.shape == plain.shape
        chunked = model.generate(ids[:1], attention_mask=mask[:1], prefill_chunk_size=8, **GREEDY)
        if dtype == torch.float32:
            assert torch.equal(chunked, plain[:1])


@pytest.mark.parametrize(("family", "name"), SERVED)
def test_a_static_cache_is_read_no_further_than_it_is_filled(family, name):
    model, policy = made(family), every_token_chooses(POLICIES[name])
    ids, mask = ragged((20, 6))
    with attach(model, policy):
        plain = model.generate(ids, attention_mask=mask, **GREEDY)
        static = {"cache_implementation": "static", "disable_compile": True}
        assert torch.equal(model.generate(ids, attention_mask=mask, **static, **GREEDY), plain)


@pytest.mark.parametrize("name", POLICIES)
def test_assisted_generation_writes_what_the_policy_writes(name):
    """Queries that are verified together share a run, so that the policy must choose for each: run=1."""
    model, draft, policy = made("llama"), made("qwen2"), every_token_chooses(replace(POLICIES[name], run=1))
    ids, _ = ragged((20,))
    with attach(model, policy):
        plain = model.generate(ids, **GREEDY)
        assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **GREEDY), plain)
        assert torch.equal(model.generate(ids, assistant_model=draft, **GREEDY), plain)


@pytest.mark.parametrize("name", ["tokenselect, compact", "dhsa, compact"])
def test_positions_that_are_learned_cannot_be_compacted(name):
    model = made("gpt2")
    before = fingerprint(model)
    with pytest.raises(BadRequest, match="learned positions"), attach(model, POLICIES[name]):
        pass
    assert fingerprint(model) == before


@pytest.mark.parametrize("name", POLICIES)
def test_models_that_cannot_be_served_are_refused(name):
    policy = POLICIES[name]
    torch.manual_seed(0)
    opt = OPTForCausalLM(
        OPTConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, ffn_dim=48, num_attention_heads=4,
                  max_position_embeddings=64, word_embed_proj_dim=32, pad_token_id=0)
    ).eval()  # fmt: skip
    with pytest.raises(ValueError, match=r"'opt'.*has no adapter"), attach(opt, policy):
        pass
    windows = MistralForCausalLM(MistralConfig(**COMMON, sliding_window=6)).eval()
    with pytest.raises(BadRequest, match="sliding window of 6"), attach(windows, policy):
        pass


def test_a_trained_mask_keeps_the_positions_of_its_training():
    with pytest.raises(BadRequest, match="trained with the positions of the text"):
        replace(POLICIES["dma"], positions="compact")


@pytest.mark.parametrize("name", POLICIES)
def test_a_budget_of_nothing_reads_what_is_always_read(name):
    """Sinks, the last keys and a token itself; with neither, each token reads itself alone."""
    model, (ids, mask) = made("llama"), ragged()
    for sinks, recent in ((2, 3), (0, 0)):
        policy = replace(POLICIES[name], budget=Budget(tokens=0), sinks=sinks, recent=recent, run=1)
        with attach(model, policy):
            out = model.generate(ids, attention_mask=mask, **GREEDY)
        assert out.shape == (3, 38)
    if "compact" not in name:
        with torch.inference_mode(), attach(model, policy):
            cut = model(ids[:1]).logits[:, -1]
            places = torch.tensor([[29]])
            assert torch.allclose(model(ids[:1, -1:], position_ids=places).logits[:, -1], cut, atol=1e-4)


@pytest.mark.parametrize("name", POLICIES)
def test_budgets_and_sinks_beyond_the_context_are_dense_attention(name):
    model, (ids, mask) = made("llama"), ragged()
    dense = model.generate(ids, attention_mask=mask, **GREEDY)
    for change in ({"budget": Budget(tokens=10**6)}, {"sinks": 10**6}, {"recent": 10**6}, {"run": 10**6}):
        policy = replace(POLICIES[name], **change)
        with attach(model, policy):
            out = model.generate(ids, attention_mask=mask, **GREEDY)
        assert torch.equal(out, dense) or "run" in change, change


def test_a_budget_that_holds_the_sinks_too_must_be_larger_than_they():
    for made_with in (lambda: H2O(Budget(tokens=4), sinks=5), lambda: SnapKV(Budget(tokens=4), sinks=5)):
        with pytest.raises(BadRequest, match="sinks=5 are more keys than the budget of 4"):
            made_with()


@pytest.mark.parametrize("name", POLICIES)
def test_one_token_and_no_generated_one(name):
    model = made("llama")
    with attach(model, POLICIES[name]):
        assert model.generate(torch.tensor([[5]]), max_new_tokens=1, do_sample=False).shape == (1, 2)
        cache = DynamicCache()
        with torch.inference_mode():
            for at in range(14):
                out = model(torch.tensor([[at + 2]]), past_key_values=cache)
        assert out.logits.isfinite().all() and cache.get_seq_length() == 14


@pytest.mark.parametrize("name", POLICIES)
def test_under_eager_attention_it_is_what_it_is_under_sdpa(name):
    model, (ids, mask) = made("llama"), ragged()
    found = []
    for kind in ("sdpa", "eager"):
        model.set_attn_implementation(kind)
        with attach(model, POLICIES[name]):
            found.append(model.generate(ids, attention_mask=mask, **GREEDY))
    assert torch.equal(*found)


@pytest.mark.parametrize("name", POLICIES)
def test_masks_that_are_no_padding(name):
    """A mask of each query and key is followed. The means of chunks do not know it, so that DHSA reads everything."""
    model, policy = made("llama"), replace(POLICIES[name], run=1)
    if isinstance(policy, DHSA):
        policy = replace(policy, budget=Budget(fraction=1.0))
    ids = ragged((16,))[0]
    mask = torch.ones(1, 1, 16, 16, dtype=torch.bool).tril()
    mask[..., 3] = False  # nobody sees the fourth token
    mask[..., 3, 3] = True
    with torch.inference_mode(), attach(model, policy):
        one = model(ids, attention_mask=mask).logits
        other = model(torch.where(torch.arange(16) == 3, 7, ids), attention_mask=mask).logits
    assert torch.allclose(one[:, 4:], other[:, 4:], atol=1e-5) and not torch.allclose(one, other, atol=1e-2)
