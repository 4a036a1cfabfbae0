"""SkipDecode: its schedule, its keys, and what it refuses."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from pertoken.core.attach import attach
from pertoken.core.budget import Budget
from pertoken.core.errors import BadRequest
from pertoken.core.policy import View
from pertoken.core.trace import Trace
from pertoken.decode.dyspec import DySpec
from pertoken.decode.full import Full
from pertoken.decode.lossless import lossless
from pertoken.depth.skipdecode import SkipDecode
from tests.depth import naive
from tests.depth.conftest import model_of, rows

SHORT = SkipDecode(reference=8)  # of 4 layers: 3, then down to 1


def active(policy, step, layers, most, least):
    """The layers of one step, by the digest."""
    if step < 0:
        return set(range(layers))
    count = round(most - (most - least) * min(step, policy.reference) / policy.reference)
    count = max(min(count, most), least)
    return set(range(policy.warmup)) | set(range(layers - (count - policy.warmup), layers))


def test_worked_example():
    policy = SkipDecode(Budget(layers=12), reference=100)
    positions = torch.tensor([[9, 10, 60, 110, 500]])
    view = View(torch.ones(1, 5, dtype=torch.bool), 24, positions=positions, prompt=torch.tensor([10]))
    layers = policy.decide(view).layers[0]
    assert policy.limits(24) == (18, 6)
    assert layers[0].all()
    for token, (first, count) in enumerate([(7, 18), (13, 12), (19, 6), (19, 6)], 1):
        assert layers[token].nonzero().flatten().tolist() == [0, *range(first, 24)]
        assert int(layers[token].sum()) == count


@pytest.mark.parametrize("warmup", [1, 2])
@pytest.mark.parametrize("anchor", ["generation", "sequence"])
def test_schedule_is_its_naive_twin_monotone_and_nested(warmup, anchor):
    policy = SkipDecode(bounds=(9, 3), reference=17, warmup=warmup, anchor=anchor)
    positions, prompt = torch.arange(40)[None], torch.tensor([11])
    view = View(torch.ones(1, 40, dtype=torch.bool), 12, positions=positions, prompt=prompt)
    sets = [set(row.nonzero().flatten().tolist()) for row in policy.decide(view).layers[0]]
    for place, found in enumerate(sets):
        assert found == active(policy, place - (11 if anchor == "generation" else 0), 12, 9, 3), place
    assert all(later <= earlier for earlier, later in itertools.pairwise(sets))


@pytest.mark.parametrize("share", [0.3, 0.5, 0.75])
def test_the_budget_is_the_mean_over_the_reference_length(share):
    for layers in (12, 24, 40):
        policy = SkipDecode(Budget(fraction=share), reference=400)
        view = View(torch.ones(1, 400, dtype=torch.bool), layers, positions=torch.arange(400)[None])
        spent = int(dataclasses.replace(policy, anchor="sequence").decide(view).spent())
        assert spent / 400 == pytest.approx(Budget(fraction=share).count(layers), abs=0.03)


def generate(model, ids, mask, decoder=None, new=16):
    extra = {} if decoder is None else {"custom_generate": decoder}
    options = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    out = model.generate(ids, attention_mask=mask, **options, **extra)
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, 1)


@pytest.mark.parametrize("anchor", ["generation", "sequence"])
def test_ragged_batches_are_the_definition_token_by_token(target, prompts, anchor):
    policy = dataclasses.replace(SHORT, anchor=anchor)
    with attach(target, policy):
        tokens, logits = generate(target, *prompts)
        by_decoder, _ = generate(target, *prompts, Full())

    def runs(position, prompt, layer, hidden):
        step = position - prompt if anchor == "generation" else position
        return layer in active(policy, step, 4, *policy.limits(4))

    for row, given in enumerate(rows(*prompts)):
        wanted, theirs = naive.decode(target, given, 16, runs)
        assert tokens[row].tolist() == wanted and by_decoder[row].tolist() == wanted
        assert torch.allclose(logits[row], theirs, atol=2e-4)


def test_keys_are_those_of_a_fresh_pass_over_the_whole_text(target, prompts):
    """Incremental decoding, and one teacher-forced forward without a cache, which the definition allows."""
    ids, mask = prompts
    policy = dataclasses.replace(SHORT, anchor="sequence")
    with attach(target, policy):
        tokens, logits = generate(target, ids, mask)
        whole, kept = torch.cat([ids, tokens], 1), torch.cat([mask, mask.new_ones(tokens.shape)], 1)
        positions = (kept.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            again = target(whole, attention_mask=kept, position_ids=positions, use_cache=False).logits
    assert torch.allclose(again[:, ids.shape[1] - 1 : -1], logits, atol=2e-4)


def test_layer_calls_are_those_of_the_schedule(prompts):
    model, (ids, mask) = model_of("llama"), prompts
    calls = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda module, given, out: calls.append(out.shape[0] * out.shape[1]))
    with attach(model, SHORT):
        generate(model, ids, mask, new=16)
    dense = 4 * ids.numel()
    steps = [len(active(SHORT, step, 4, 3, 1)) for step in range(15)]
    assert sum(calls) == dense + len(ids) * sum(steps)


def test_a_layer_that_is_passed_over_holds_nothing_from_then_on():
    model, ids = model_of("llama"), torch.arange(2, 12)[None]
    with attach(model, SHORT), torch.no_grad():
        cache = model.generate(ids, max_new_tokens=16, eos_token_id=None, return_dict_in_generate=True).past_key_values
    lengths = [layer.get_seq_length() for layer in cache.layers]
    ran = [sum(layer in active(SHORT, step, 4, 3, 1) for step in range(15)) for layer in range(4)]
    assert lengths == [10 + count for count in ran] and len(set(lengths)) > 2


def test_speculation_over_it_and_with_it_is_exact(target, prompts):
    ids, mask = prompts
    dense, _ = generate(target, ids, mask)
    for anchor in ("generation", "sequence"):
        policy = dataclasses.replace(SHORT, anchor=anchor)
        found, _ = generate(target, ids, mask, lossless(policy, size=4, economy=False))
        assert torch.equal(found, dense)
        with attach(target, policy):
            alone, _ = generate(target, ids, mask)
            assert not torch.equal(alone, dense)
            found, _ = generate(target, ids, mask, DySpec(size=5))
            assert torch.equal(found, alone)


def test_a_prompt_in_chunks_is_a_prompt():
    model, ids = model_of("llama"), torch.arange(2, 32)[None]
    found = []
    for chunk in (None, 7):
        with attach(model, SHORT):
            found.append(model.generate(ids, max_new_tokens=12, eos_token_id=None, prefill_chunk_size=chunk))
    assert torch.equal(*found)


def test_beams_go_on_as_rows_do():
    """Beams of a prompt are reordered in the cache; the step is read off positions, not counted."""
    model, ids = model_of("llama"), torch.arange(2, 12)[None]
    with attach(model, SHORT), torch.no_grad():
        found = model.generate(ids, num_beams=3, max_new_tokens=10, eos_token_id=None)

    def score(tokens):
        def runs(position, layer):
            return layer in active(SHORT, position - 10, 4, 3, 1)

        logits = naive.read(model, tokens[:-1], runs).log_softmax(-1)[9:]
        return float(logits.gather(-1, torch.tensor(tokens[10:])[:, None]).sum())

    greedy, _ = naive.decode(model, ids[0].tolist(), 10, lambda p, n, layer, h: layer in active(SHORT, p - n, 4, 3, 1))
    assert score(found[0].tolist()) >= score(ids[0].tolist() + greedy) - 1e-4


def test_replay_serves_a_ragged_recording(target, prompts):
    ids, mask = prompts
    policy, recorded, again = dataclasses.replace(SHORT, anchor="sequence"), Trace(), Trace()
    with attach(target, policy, trace=recorded):
        first, _ = generate(target, ids, mask)
    with attach(target, SkipDecode(Budget.full()), trace=again, replay=recorded):
        assert torch.equal(generate(target, ids, mask)[0], first)
    assert again.same_as(recorded)
    spent = torch.stack([step.decision.spent() for step in recorded.steps[1:]])
    assert len({tuple(column) for column in spent.T.tolist()}) > 1, "rows of unlike lengths stand at unlike steps"


def test_trains_with_the_schedule_on(prompts):
    model, (ids, mask) = model_of("llama"), prompts
    policy = SkipDecode(bounds=(3, 1), reference=6, anchor="sequence")
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=3e-3), []
    with attach(model, policy, training=True):
        for _ in range(30):
            labels = ids.masked_fill(mask == 0, -100)
            loss = model(ids, attention_mask=mask, labels=labels, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SkipDecode(bounds=(2, 3)), "bounds=.2, 3. would let later tokens run more layers"),
        (lambda: SkipDecode(anchor="column"), "anchor='column' is unknown"),
        (lambda: SkipDecode(warmup=0), "warmup=0 must be at least 1"),
        (lambda: SkipDecode(reference=0), "reference=0"),
        (lambda: SkipDecode(span=1.5), "span=1.5"),
        (lambda: SkipDecode(Budget(layers=1), warmup=2).limits(4), "a budget of layers=1 cannot be met"),
        (lambda: SkipDecode(Budget(layers=0)).limits(4), "a budget of layers=0 cannot be met"),
        (lambda: SkipDecode(bounds=(9, 2)).limits(4), "bounds=.9, 2. cannot be met: 9 down to 2 layers of 4"),
    ],
)
def test_refuses(build, message):
    with pytest.raises(BadRequest, match=message):
        build()


def test_a_budget_that_cannot_be_met_is_refused_before_anything_changes():
    model = model_of("llama")
    with pytest.raises(BadRequest, match="cannot be met"), attach(model, SkipDecode(Budget(layers=1), warmup=3)):
        pass
    model.config.is_causal = False
    with pytest.raises(BadRequest, match="fills in a canvas"), attach(model, SkipDecode()):
        pass
