"""DHSA against its definition with loops, its limits, and what is kept from forward to forward."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from pertoken.attend.boundaries import Boundaries
from pertoken.attend.dhsa import DHSA
from pertoken.attend.selection import SITE, KeyView
from pertoken.attend.sight import Causal
from pertoken.core.attach import attach
from pertoken.core.budget import Budget
from pertoken.core.errors import BadRequest
from pertoken.core.trace import Trace
from pertoken.decode.dyspec import DySpec
from pertoken.decode.full import Full

torch.set_num_threads(1)
HEADS, KV, DIM, WIDTH = 4, 2, 4, 8


def llama(layers: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=HEADS,
        num_key_value_heads=KV, max_position_embeddings=256, initializer_range=0.4, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def network(window: int = 2) -> Boundaries:
    torch.manual_seed(5)
    return Boundaries(WIDTH, window, 2, 6).eval()


def batch(lengths: list[int], seed: int = 0):
    """Left-padded random rows."""
    generator = torch.Generator().manual_seed(seed)
    widest = max(lengths)
    ids = torch.randint(2, 61, (len(lengths), widest), generator=generator)
    mask = torch.stack([torch.arange(widest) >= widest - n for n in lengths]).long()
    return ids * mask, mask


def logits(model, ids, mask, **more):
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    with torch.inference_mode():
        return model(ids, attention_mask=mask, position_ids=positions, **more).logits


def seen(policy, valid, queries, keys, first, prompt, before=None, state=None) -> KeyView:
    """What the policy is shown of queries that stand in the columns from `first` on."""
    sight = Causal(valid, first, queries.shape[2], lambda: None)
    runs = sight.runs(policy.run)
    kept = runs.kept(policy.sinks, policy.recent)
    return KeyView(
        valid=sight.real, layers=1, queries=runs.split(queries), keys=keys, values=keys, runs=runs, kept=kept,
        state={} if state is None else state, prompt=prompt, prompt_before=prompt if before is None else before,
    )  # fmt: skip


def naive_starts(policy, keys, prompt):
    """Places of the prompt at which chunks begin. keys `[token, kv_heads, dim]` of one row."""
    if policy.blocks:
        return [place for place in range(prompt) if place % policy.chunk == 0]
    found = set()
    if policy.starts is not None:
        found = {place for place in range(prompt) if policy.starts[place]}
    else:
        w = policy.predictor.window
        score = {}
        for place in range(w, prompt - w + 1):
            window = keys[place - w : place + w].flatten(1)
            score[place] = policy.predictor(window[None]).item()
        for block in range(0, prompt, policy.run):
            taken = []
            for place in sorted(score, key=lambda p: -score[p]):
                inside = block <= place < block + policy.run and score[place] > policy.theta
                if inside and len(taken) < policy.most and all(abs(place - t) > policy.spacing for t in taken):
                    taken.append(place)
            found |= set(taken)
    starts = [0]
    for place in range(1, prompt):
        if place in found or place - starts[-1] == policy.longest:
            starts.append(place)
    return starts


def naive_read(policy, queries, keys, own, prompt):
    """Places that the run at `own` chooses besides those it always reads, the best first; queries `[query, head, dim]`,
    keys `[token, kv_heads, dim]`, both of one row."""
    size = policy.chunk if policy.blocks else policy.longest
    starts = [s for s in naive_starts(policy, keys, min(prompt, len(keys))) if s < own]
    behind = prompt - prompt % policy.chunk if policy.blocks else prompt
    starts = [s for s in starts if s < behind] + list(range(behind, own, size)) if own >= prompt else starts
    asked, scored = queries.float().mean((0, 1)), []
    for number, start in enumerate(starts):
        stop = starts[number + 1] if number + 1 < len(starts) else own
        total = keys[start:stop].double().mean(1).sum(0)
        mean = total / (math.sqrt(stop - start) if policy.scaled else stop - start)
        scored.append((float(asked.double() @ mean), range(start, stop)))
    end = min(own, own + len(queries) - policy.recent)
    chosen = [p for _, chunk in sorted(scored, key=lambda one: -one[0]) for p in chunk if policy.sinks <= p < end]
    return chosen[: policy.budget.tokens]


POLICIES = st.builds(
    lambda kind, **more: DHSA(**more, **kind()),
    st.sampled_from([
        dict,
        lambda: {"predictor": network()},
        lambda: {"starts": torch.arange(60) % 7 < 2},
    ]),
    budget=st.integers(1, 9).map(lambda n: Budget(tokens=n)),
    sinks=st.integers(0, 3), recent=st.integers(0, 6), run=st.integers(1, 6), chunk=st.integers(1, 5),
    longest=st.integers(1, 9), theta=st.sampled_from([-9.0, 0.0]), spacing=st.integers(0, 2), most=st.integers(1, 3),
    scaled=st.booleans(),
)  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(POLICIES, st.lists(st.integers(3, 26), min_size=1, max_size=3), st.integers(0, 99))
def test_a_prompt_is_read_as_the_definition_says(policy, lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    widest = max(lengths)
    valid = torch.stack([torch.arange(widest) >= widest - n for n in lengths])
    queries = torch.randn(len(lengths), HEADS, widest, DIM, generator=generator)
    keys = torch.randn(len(lengths), KV, widest, DIM, generator=generator)
    view = seen(policy, valid, queries, keys, 0, torch.tensor(lengths), torch.zeros(len(lengths), dtype=torch.long))
    limits = policy.limits(view.kept)
    most = min(policy.budget.count(view.kept.most), view.kept.most)
    if not most:
        return
    chosen = policy.choose(view, most, limits)
    for row, length in enumerate(lengths):
        lead = widest - length
        for run, own in enumerate(range(0, length, policy.run)):
            asked = queries[row, :, lead + own : lead + min(own + policy.run, length)].transpose(0, 1)
            wanted = naive_read(policy, asked, keys[row, :, lead:].transpose(0, 1), own, length)
            found = (chosen[row, 0, run, : limits[row, run]] - lead).tolist()
            assert found == wanted


@settings(max_examples=25, deadline=None)
@given(POLICIES, st.lists(st.integers(1, 14), min_size=1, max_size=3), st.integers(0, 12), st.integers(0, 99))
def test_decoding_reads_the_prompts_chunks_and_what_was_generated(policy, prompts, more, seed):
    generator = torch.Generator().manual_seed(seed)
    first = max(prompts) + more
    lengths = [n + more + 1 for n in prompts]
    valid = torch.stack([torch.arange(first + 1) >= first + 1 - n for n in lengths])
    queries = torch.randn(len(prompts), HEADS, 1, DIM, generator=generator)
    keys = torch.randn(len(prompts), KV, first + 1, DIM, generator=generator)
    view = seen(policy, valid, queries, keys, first, torch.tensor(prompts))
    limits = policy.limits(view.kept)
    most = min(policy.budget.count(view.kept.most), view.kept.most)
    if not most:
        return
    chosen, again = policy.choose(view, most, limits), policy.choose(view, most, limits)
    assert torch.equal(chosen, again), "what was kept must say the same"
    for row, length in enumerate(lengths):
        lead = first + 1 - length
        row_keys = keys[row, :, lead:].transpose(0, 1)
        wanted = naive_read(policy, queries[row].transpose(0, 1), row_keys, length - 1, prompts[row])
        assert (chosen[row, 0, 0, : limits[row, 0]] - lead).tolist() == wanted


@pytest.mark.parametrize("groups", [False, True])
def test_tokens_as_chunks_are_the_best_tokens_for_the_mean_query(groups):
    policy = DHSA(Budget(tokens=5), sinks=2, recent=3, run=4, chunk=1, scaled=False, groups=groups)
    generator = torch.Generator().manual_seed(1)
    queries, keys = (torch.randn(2, heads, 24, DIM, generator=generator) for heads in (HEADS, KV))
    view = seen(policy, torch.ones(2, 24, dtype=torch.bool), queries, keys, 0, torch.full((2,), 24))
    limits = policy.limits(view.kept)
    chosen = policy.choose(view, 5, limits)
    each = (KV, HEADS // KV) if groups else (1, HEADS)
    asked = queries.view(2, *each, 6, 4, DIM).mean((2, 4))
    scores = asked @ (keys if groups else keys.mean(1, keepdim=True)).transpose(-1, -2)
    wanted = scores.masked_fill(~view.kept.candidates[:, None], -torch.inf).topk(5, -1).indices
    for run in range(6):
        for row in range(2):
            count = int(limits[row, run])
            assert torch.equal(chosen[row, :, run, :count], wanted[row, :, run, :count])
    assert limits.max() == 5 and chosen.shape[1] == each[0]


def test_the_norm_by_length_decides_nothing_between_chunks_of_one_length():
    generator = torch.Generator().manual_seed(1)
    queries, keys = (torch.randn(1, heads, 32, DIM, generator=generator) for heads in (HEADS, KV))
    chosen = {}
    for name, more in (("blocks", {}), ("ragged", {"starts": torch.isin(torch.arange(32), torch.tensor([3, 4, 11]))})):
        for scaled in (True, False):
            policy = DHSA(Budget(tokens=6), sinks=0, recent=0, run=8, chunk=4, scaled=scaled, **more)
            view = seen(policy, torch.ones(1, 32, dtype=torch.bool), queries, keys, 0, torch.tensor([32]))
            chosen[name, scaled] = policy.choose(view, 6, policy.limits(view.kept))[0, 0, 1:]
    assert torch.equal(chosen["blocks", True], chosen["blocks", False])
    assert not torch.equal(chosen["ragged", True], chosen["ragged", False])


KINDS = {
    "blocks": lambda: DHSA(Budget(tokens=5), sinks=1, recent=3, run=4, chunk=3),
    "groups": lambda: DHSA(Budget(tokens=5), sinks=1, recent=3, run=4, chunk=3, groups=True),
    "predicted": lambda: DHSA(
        Budget(tokens=5), sinks=1, recent=3, run=4, predictor=network(), theta=-0.1, spacing=0, longest=6
    ),
    "shared": lambda: replace(KINDS["predicted"](), share=True),
    "compact": lambda: replace(KINDS["predicted"](), positions="compact"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [4, 8, 12])
def test_a_prefill_in_chunks_is_the_whole(kind, chunk):
    model, policy = llama(3), KINDS[kind]()
    ids, mask = batch([26, 26])
    with attach(model, policy):
        whole, cache, parts = logits(model, ids, mask), DynamicCache(), []
        for start in range(0, 26, chunk):
            part = ids[:, start : start + chunk]
            parts.append(logits(model, part, mask[:, : start + part.shape[1]], past_key_values=cache))
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-4)
    assert not torch.allclose(whole, logits(model, ids, mask), atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [2, 5, 9])
def test_rows_together_are_rows_alone_also_if_some_leave_nothing_out_at_first(kind, tokens):
    model, policy = llama(3), replace(KINDS[kind](), budget=Budget(tokens=tokens))
    lengths = [26, 9, 14, 1]
    ids, mask = batch(lengths)
    options = {"max_new_tokens": 14, "do_sample": False}
    with attach(model, policy):
        together = model.generate(ids, attention_mask=mask, **options)[:, 26:]
        for row, length in enumerate(lengths):
            alone = model.generate(
                ids[row : row + 1, -length:], attention_mask=mask[row : row + 1, -length:], **options
            )
            assert torch.equal(alone[0, length:], together[row])
    assert not torch.equal(model.generate(ids, attention_mask=mask, **options)[:, 26:], together)


@pytest.mark.parametrize("sizes", [[7, 7, 7, 5], [1, 25], [13, 13]])
def test_boundaries_kept_over_odd_chunks_are_those_of_the_whole(sizes):
    model = llama(2)
    policy = replace(KINDS["predicted"](), run=5)
    ids, mask = batch([26, 26])
    tables = []
    for parts in ([26], sizes):
        with attach(model, policy) as attached:
            cache, start = DynamicCache(), 0
            for size in parts:
                stop = start + size
                logits(model, ids[:, start:stop], mask[:, :stop], past_key_values=cache)
                start = stop
            tables.append([attached.state[SITE][0]["table"][name] for name in ("begin", "stop", "key")])
            kept = attached.state[SITE][0]["table"]
            logits(model, ids[:, :1], torch.ones(2, 27, dtype=torch.long), past_key_values=cache)
            assert attached.state[SITE][0]["table"] is kept, "decoding goes on with the prompt's chunks"
    used = tables[0][1] > tables[0][0]
    assert used.sum() > 8
    for one, other in zip(*tables, strict=True):
        one, other = (x.squeeze(1)[used].double() for x in (one, other))
        assert torch.allclose(one, other, atol=1e-5)


def test_shared_boundaries_are_those_of_the_first_layer():
    model, found = llama(3), {}
    ids, mask = batch([26])
    for kind in ("predicted", "shared"):
        with attach(model, KINDS[kind]()) as attached:
            logits(model, ids, mask)
            found[kind] = [attached.state[SITE][layer]["table"]["begin"].tolist() for layer in range(3)]
    assert found["shared"] == [found["predicted"][0]] * 3 != found["predicted"]


@pytest.mark.parametrize("decoder", ["full", "dyspec"])
def test_token_trees_choose_for_each_node(decoder):
    """Blocks do not depend on where the prompt ends, so that a tree decoder is exact; rows end at different times."""
    model, policy = llama(3), DHSA(Budget(tokens=3), sinks=1, recent=2, run=8, chunk=3)
    ids, mask = batch([17, 9, 25])
    options = {"attention_mask": mask, "max_new_tokens": 14, "do_sample": False, "pad_token_id": 0}
    made = Full() if decoder == "full" else DySpec(llama(1), size=6)
    with attach(model, policy):
        free = model.generate(ids, **options)
        end = int(free[1, 28])
        for eos in (None, end):
            wanted = model.generate(ids, eos_token_id=eos, **options)
            assert torch.equal(model.generate(ids, custom_generate=made, eos_token_id=eos, **options), wanted)
    assert not torch.equal(model.generate(ids, **options), free)


def test_a_tree_decoder_goes_on_with_predicted_chunks_when_rows_end():
    model, policy = llama(2), KINDS["predicted"]()
    ids, mask = batch([17, 9, 25])
    options = {"custom_generate": DySpec(llama(1), size=6), "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    with attach(model, policy):
        free = model.generate(ids, attention_mask=mask, **options)
        end = int(free[0, 27])
        together = model.generate(ids, attention_mask=mask, eos_token_id=end, **options)
        for row, length in enumerate([17, 9, 25]):
            own = {"attention_mask": mask[row : row + 1, -length:], "eos_token_id": end}
            alone = model.generate(ids[row : row + 1, -length:], **own, **options)[0, length:]
            assert torch.equal(alone, together[row, 25 : 25 + len(alone)])
    assert (together[0, 25:] == 0).any()


@pytest.mark.parametrize("kind", KINDS)
def test_no_key_is_read_twice(kind):
    model, trace = llama(2), Trace()
    ids, mask = batch([40, 23])
    with attach(model, replace(KINDS[kind](), sinks=6, run=4), trace=trace):
        model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    for step in trace.steps:
        for keys in step.decision.index.flatten(0, 2).tolist():
            real = [key for key in keys if key >= 0]
            assert len(set(real)) == len(real)


def test_half_precision():
    model = llama(2).to(torch.bfloat16)
    ids, mask = batch([30, 11])
    with attach(model, KINDS["predicted"]()):
        low = logits(model, ids, mask)
    assert low.dtype == torch.bfloat16 and low.isfinite().all()


def test_what_cannot_be_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(BadRequest, match="chunk=0 is too small"):
        DHSA(chunk=0)
    with pytest.raises(BadRequest, match="both a predictor and starts"):
        DHSA(predictor=network(), starts=torch.ones(3, dtype=torch.bool))
    wrong = DHSA(Budget(tokens=2), sinks=0, recent=1, run=2, predictor=Boundaries(12))
    model = llama()
    with attach(model, wrong), pytest.raises(BadRequest, match="keys of width 12, this model's are 8 wide"):
        logits(model, *batch([9]))
    path = tmp_path / "boundaries.safetensors"
    network().save(path)
    ids, mask = batch([30])
    outs = []
    for predictor in (network(), path, tmp_path):
        with attach(model, replace(KINDS["predicted"](), predictor=predictor)):
            outs.append(logits(model, ids, mask))
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])
