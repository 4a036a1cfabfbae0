"""Selection attention against a transcription with loops: what is chosen, what comes out, positions, chunks, trees."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from pertoken.attend.random_keys import RandomKeys
from pertoken.attend.selection import KeyView, Selection
from pertoken.attend.sight import packed
from pertoken.attend.sink_window import SinkWindow
from pertoken.core.attach import attach
from pertoken.core.budget import Budget
from pertoken.core.errors import BadRequest
from pertoken.core.trace import Trace
from pertoken.decode.dyspec import DySpec
from pertoken.decode.full import Full
from pertoken.decode.lossless import lossless

torch.set_num_threads(1)
VOCABULARY = 61


def llama(layers: int = 1, **more) -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=None,
        **more,
    )
    return LlamaForCausalLM(config).eval()


@dataclass(frozen=True)
class Norms(Selection):
    """The keys of the largest norm, per key head if asked."""

    split: bool = False

    def score(self, view: KeyView) -> Tensor:
        norms = view.keys.float().norm(dim=-1)
        return (norms if self.split else norms.sum(1, keepdim=True))[:, :, None].expand(-1, -1, view.runs.count, -1)


@dataclass(frozen=True)
class CompactNorms(Norms):
    positions: str = "compact"


def batch(lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Left-padded random rows, no token twice in one: equal tokens have keys of equal norm in the first layer."""
    generator = torch.Generator().manual_seed(seed)
    widest = max(lengths)
    ids = torch.stack([2 + torch.randperm(VOCABULARY - 2, generator=generator)[:widest] for _ in lengths])
    mask = torch.stack([torch.arange(widest) >= widest - n for n in lengths]).long()
    return ids * mask, mask


def logits(model, ids, mask, **more):
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    with torch.inference_mode():
        return model(ids, attention_mask=mask, position_ids=positions, **more).logits


def chosen(norms: list[float], stop: int, policy: Selection, first: int) -> list[int]:
    """What a run whose queries stand at places first..stop-1 reads, by the words of the documentation."""
    places = range(stop)
    always = [p for p in places if p < policy.sinks or p >= stop - policy.recent or p >= first]
    rest = [p for p in places if p not in always]
    count = policy.budget.tokens
    if policy.budget.fraction is not None:
        count = math.ceil(round(policy.budget.fraction * len(rest), 6))
    best = sorted(rest, key=lambda p: -norms[p])[:count]
    return sorted([*always, *best])


def projected(model, ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Residual `[token, width]`, and query, key and value `[head, token, dim]` of the only layer, not turned."""
    layer = model.model.layers[0]
    residual = model.model.embed_tokens(ids)
    normed = layer.input_layernorm(residual)
    split = lambda x: x.view(len(ids), -1, 8).transpose(0, 1)  # noqa: E731
    own = layer.self_attn
    return residual, split(own.q_proj(normed)), split(own.k_proj(normed)), split(own.v_proj(normed))


def turn(model, x: Tensor, place: int) -> Tensor:
    cos, sin = model.model.rotary_emb(x, torch.tensor([[place]]))
    return x * cos[0, 0] + torch.cat((-x[4:], x[:4])) * sin[0, 0]


@torch.inference_mode()
def by_hand(model, ids: Tensor, policy: Norms) -> Tensor:
    """Logits `[token, vocabulary]` of one row of the one-layer model, one query and head at a time."""
    residual, query, key, value = projected(model, ids)
    compact, outs = policy.compact, []
    turned = [[turn(model, key[h, p], p) for p in range(len(ids))] for h in range(2)]
    for q in range(len(ids)):
        first = q // policy.run * policy.run
        stop = min(first + policy.run, len(ids))
        heads = []
        for h in range(4):
            kv = h // 2
            norms = [key[:, p].norm(dim=-1).sum().item() for p in range(len(ids))]
            if policy.split:
                norms = key[kv].norm(dim=-1).tolist()
            read = [p for p in chosen(norms, stop, policy, first) if p <= q]
            if compact:
                asked = turn(model, query[h, q], len(read) - 1)
                seen = torch.stack([turn(model, key[kv, p], place) for place, p in enumerate(read)])
            else:
                asked, seen = turn(model, query[h, q], q), torch.stack([turned[kv][p] for p in read])
            law = (seen @ asked / math.sqrt(8)).softmax(0)
            heads.append(law @ value[kv, read])
        outs.append(torch.cat(heads))
    layer = model.model.layers[0]
    hidden = residual + layer.self_attn.o_proj(torch.stack(outs))
    hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.lm_head(model.model.norm(hidden))


POLICIES = st.builds(
    lambda kind, **more: kind(**more),
    st.sampled_from([Norms, CompactNorms]),
    budget=st.one_of(
        st.integers(0, 9).map(lambda n: Budget(tokens=n)),
        st.sampled_from([0.0, 0.3, 0.5, 1.0]).map(lambda f: Budget(fraction=f)),
    ),
    sinks=st.integers(0, 3),
    recent=st.integers(0, 4),
    run=st.integers(1, 6),
    split=st.booleans(),
)


@settings(max_examples=25, deadline=None)
@given(POLICIES, st.lists(st.integers(1, 17), min_size=1, max_size=3), st.integers(0, 99))
def test_it_is_what_the_documentation_says(policy, lengths, seed):
    model = llama()
    ids, mask = batch(lengths, seed)
    with attach(model, policy):
        found = logits(model, ids, mask)
    for row, length in enumerate(lengths):
        wanted = by_hand(model, ids[row, -length:], policy)
        assert torch.allclose(found[row, -length:], wanted, atol=1e-4)


@pytest.mark.parametrize("kind", [Norms, CompactNorms, RandomKeys])
@pytest.mark.parametrize("chunk", [4, 8, 12])
def test_a_prefill_in_chunks_is_the_whole(kind, chunk):
    model, policy = llama(3), kind(Budget(tokens=3), sinks=1, recent=2, run=4)
    ids, mask = batch([21, 21])
    with attach(model, policy):
        whole, cache, parts = logits(model, ids, mask), DynamicCache(), []
        for start in range(0, 21, chunk):
            part = ids[:, start : start + chunk]
            parts.append(logits(model, part, mask[:, : start + part.shape[1]], past_key_values=cache))
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-4)
    assert not torch.allclose(whole, logits(model, ids, mask), atol=1e-2)


@pytest.mark.parametrize("kind", [Norms, CompactNorms])
def test_right_padding_and_no_mask(kind):
    model, policy = llama(2), kind(Budget(tokens=3), sinks=1, recent=2, run=4)
    ids, mask = batch([15])
    padded = torch.nn.functional.pad(ids, (0, 4))
    with attach(model, policy), torch.inference_mode():
        wanted = logits(model, ids, mask)
        right = model(padded, attention_mask=torch.nn.functional.pad(mask, (0, 4))).logits[:, :15]
        assert torch.allclose(right, wanted, atol=1e-4) and torch.equal(model(ids).logits, wanted)


@pytest.mark.parametrize("kind", [Norms, CompactNorms])
@pytest.mark.parametrize("run", [1, 8])
def test_token_trees_choose_for_each_node(kind, run):
    model, policy = llama(3), kind(Budget(tokens=3), sinks=1, recent=2, run=run)
    ids, mask = batch([17, 9, 12])
    options = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False}
    with attach(model, policy):
        plain, one = model.generate(ids, **options), model.generate(ids, custom_generate=Full(), **options)
        tree = model.generate(ids, custom_generate=DySpec(llama(1), size=6), **options)
    assert torch.equal(tree, one) and not torch.equal(model.generate(ids, **options), one)
    assert run > 1 or torch.equal(one, plain)  # in runs, a decoder reads the last token of a prompt by itself


def test_what_is_lossy_drafts_losslessly():
    model, policy = llama(3), Norms(Budget(tokens=3), sinks=1, recent=2, run=8)
    ids, mask = batch([17, 9, 12])
    options = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False}
    plain = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, custom_generate=lossless(policy, size=6), **options), plain)


def test_beam_search_and_sampling_run_as_ever():
    model, policy = llama(2), Norms(Budget(tokens=3), sinks=1, recent=2, run=4)
    ids, mask = batch([14, 11])
    with attach(model, policy):
        beams = model.generate(ids, attention_mask=mask, max_new_tokens=6, num_beams=3, do_sample=False)
        torch.manual_seed(1)
        drawn = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=True)
    assert beams.shape == drawn.shape == (2, 20)


def test_a_static_cache_is_read_no_further_than_it_is_filled():
    model, policy = llama(2), Norms(Budget(tokens=3), sinks=1, recent=2, run=4)
    ids, mask = batch([14, 11])
    with attach(model, policy):
        plain = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
        static = model.generate(
            ids, attention_mask=mask, max_new_tokens=6, do_sample=False, cache_implementation="static",
            disable_compile=True,
        )  # fmt: skip
    assert torch.equal(static, plain)


@pytest.mark.parametrize("kind", [Norms, CompactNorms])
def test_half_precision(kind):
    model = llama(2).to(torch.bfloat16)
    ids, mask = batch([30, 11])
    with attach(model, kind(Budget(tokens=4), sinks=1, recent=2, run=4)):
        low = logits(model, ids, mask)
    with attach(model.float(), kind(Budget(tokens=4), sinks=1, recent=2, run=4)):
        high = logits(model, ids, mask)
    assert low.dtype == torch.bfloat16 and low.isfinite().all()
    assert float((low - high).float().norm() / high.norm()) < 0.3


def test_gradients_flow_to_what_is_read_only():
    model, policy = llama(1).train(), Norms(Budget(tokens=0), sinks=0, recent=0, run=1)
    ids, mask = batch([8])
    inputs = model.get_input_embeddings()(ids).detach().requires_grad_()
    with attach(model, policy):
        model(inputs_embeds=inputs, attention_mask=mask).logits[0, -1].sum().backward()
    assert inputs.grad is not None and inputs.grad[0, -1].abs().sum() > 0 and not inputs.grad[0, :-1].any()


def test_memory_is_not_that_of_a_mask(monkeypatch):
    model, policy = llama(1), SinkWindow(Budget(tokens=8), sinks=2, recent=16, run=16)
    ids, mask = torch.randint(2, VOCABULARY, (1, 512)), torch.ones(1, 512, dtype=torch.long)
    largest, made = 0, torch.Tensor.masked_fill

    def spy(self, *args):
        nonlocal largest
        largest = max(largest, self.numel())
        return made(self, *args)

    monkeypatch.setattr(torch.Tensor, "masked_fill", spy)
    with attach(model, policy):
        logits(model, ids, mask)
    assert 0 < largest < 512 * 512


def test_budgets_nest():
    model = llama(2)
    ids, mask = batch([25, 18])
    kept = []
    for count in (2, 5, 9):
        trace = Trace()
        with attach(model, RandomKeys(Budget(tokens=count), sinks=1, recent=2, run=4), trace=trace):
            logits(model, ids, mask)
        kept.append(trace.steps[0].decision.index)
    for small, large in pairwise(kept):
        for one, other in zip(small.flatten(0, 2).tolist(), large.flatten(0, 2).tolist(), strict=True):
            assert set(one) - {-1} <= set(other)


def test_what_cannot_be_is_refused_in_one_sentence():
    with pytest.raises(BadRequest, match=r"layers=3 means nothing"):
        RandomKeys(Budget(layers=3))
    with pytest.raises(BadRequest, match="recent=-1 is too small"):
        RandomKeys(recent=-1)
    with pytest.raises(BadRequest, match="run=0 is too small"):
        RandomKeys(run=0)
    both = llama(1, is_causal=False, mask_token_id=5)
    with pytest.raises(BadRequest, match="reads in both directions"), attach(both, RandomKeys()):
        pass
    for wrong in (RandomKeys(), SinkWindow()):
        with attach(llama(1), wrong) as attached:
            assert attached.policy is wrong


def test_what_is_packed_is_in_order():
    flags = torch.tensor([[True, False, True, True], [False, False, True, False]])
    assert packed(flags).tolist() == [[0, 2, 3], [2, -1, -1]]
    assert packed(flags[:, :0]).shape == (2, 0)


def test_layers_with_a_window_are_left_alone():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    model = Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, sliding_window=6, initializer_range=0.3, pad_token_id=0,
        )
    ).eval()  # fmt: skip
    ids, mask = batch([20])
    trace = Trace()
    with attach(model, replace(RandomKeys(), **RandomKeys.small), trace=trace):
        logits(model, ids, mask)
    assert [step.site for step in trace.steps] == ["attend.keys.1"]
