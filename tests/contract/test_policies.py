"""Laws of every registered policy, on every family, with no word about any one of them."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch

from pertoken.core.attach import active, attach
from pertoken.core.budget import Budget
from pertoken.core.cost import count_flops
from pertoken.core.fingerprint import fingerprint
from pertoken.core.trace import Trace
from tests.contract.conftest import POLICIES, attachable, built


@pytest.fixture(params=POLICIES)
def policy(request, target):
    policy = built(request.param)
    attachable(target, policy)
    return policy


def at(policy, budget):
    return dataclasses.replace(policy, budget=budget)


def logits(model, ids, mask):
    with torch.inference_mode():
        return model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits


def continued(model, ids, mask):
    """Logits of the prompt and of three tokens after it, one at a time."""
    found, cache = [], None
    with torch.inference_mode():
        for step in range(4):
            if step:
                ids, mask = (ids[:, -1:] + step) % 61, torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            out = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            found.append(out.logits)
    return torch.cat(found, 1)


def spent(model, ids, mask, what):
    """Operations of a forward, or numbers that its cache holds afterwards."""
    if what != "memory":
        return count_flops(lambda: logits(model, ids, mask))
    with torch.inference_mode():
        cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
    return sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)


def test_full_budget_is_the_identity(target, policy, prompts):
    ids, mask = prompts
    expected, ids_out = logits(target, ids, mask), target.generate(ids, attention_mask=mask, max_new_tokens=8)
    with attach(target, at(policy, Budget.full())):
        assert torch.equal(logits(target, ids, mask), expected)
        assert torch.equal(target.generate(ids, attention_mask=mask, max_new_tokens=8), ids_out)


def test_undo_is_exact(target, policy, prompts):
    before, expected = fingerprint(target, deep=True), continued(target, *prompts)
    for _ in range(2):
        with attach(target, policy):
            assert fingerprint(target) != before, "an attached policy must be visible in the fingerprint"
            changed = continued(target, *prompts)
        assert not torch.equal(changed, expected), "the default budget must change something"
    with pytest.raises(RuntimeError, match="inside"), attach(target, policy):
        raise RuntimeError("inside")
    assert fingerprint(target, deep=True) == before and not active(target)
    assert torch.equal(continued(target, *prompts), expected)


def test_disabled_is_the_model_as_it_was(target, policy, prompts):
    expected = continued(target, *prompts)
    with attach(target, policy) as attached:
        with attached.disabled():
            assert torch.equal(continued(target, *prompts), expected)
        assert not torch.equal(continued(target, *prompts), expected)


def test_ragged_batch_is_each_row_alone(target, policy, prompts):
    ids, mask = prompts
    with attach(target, policy):
        together = target.generate(ids, attention_mask=mask, max_new_tokens=10)[:, ids.shape[1] :]
        assert len({tuple(row.tolist()) for row in together}) > 1
        for row in range(len(ids)):
            kept = mask[row].bool()
            alone = target.generate(
                ids[row : row + 1, kept], attention_mask=mask[row : row + 1, kept], max_new_tokens=10
            )[0, int(kept.sum()) :]
            assert torch.equal(alone, together[row, : len(alone)])


def test_replay_serves_the_recording(target, policy, prompts):
    ids, mask = prompts
    recorded, again = Trace(), Trace()
    with attach(target, policy, trace=recorded):
        first = target.generate(ids, attention_mask=mask, max_new_tokens=6)
    other = at(policy, Budget.full())
    with attach(target, other, trace=again, replay=recorded):
        assert torch.equal(target.generate(ids, attention_mask=mask, max_new_tokens=6), first)
    assert again.same_as(recorded) and recorded.steps


def test_cost_falls_as_the_budget_says(target, policy):
    """On a text long enough that deciding costs less than it saves."""
    ids = torch.randint(2, 61, (3, 84), generator=torch.Generator().manual_seed(2))
    mask = (torch.arange(84) >= torch.tensor([[0], [30], [55]])).long()
    found = []
    for share in (1.0, 0.75, 0.5):
        with attach(target, at(policy, Budget(fraction=share))):
            found.append(spent(target, ids, mask, policy.saves))
    assert found[0] == spent(target, ids, mask, policy.saves) and len(set(found)) == 3
    assert found == sorted(found, reverse=policy.saves != "nothing")


def layers_run(policy, mask):
    """Half of the four layers for every token."""
    return [int(n) * 2 for n in mask.sum(-1)]


def layers_run_again(policy, mask):
    """The four layers for every token, and once more for half of them."""
    return [4 * (int(n) + int(n) // 2) for n in mask.sum(-1)]


def keys_read(policy, mask):
    """Per run of queries: the first, the last, the run itself, and half of what is between, each query counted."""
    totals = []
    for count in mask.sum(-1).tolist():
        total = 0
        for start in range(0, count, policy.run):
            stop = min(start + policy.run, count)
            always = {p for p in range(stop) if p < policy.sinks or p >= stop - policy.recent or p >= start}
            total += (len(always) + math.ceil((stop - len(always)) / 2)) * (stop - start)
        totals.append(total)
    return totals


def keys_held(policy, mask):
    """Half of the row, for the token that comes next."""
    return [math.ceil(count / 2) for count in mask.sum(-1).tolist()]


COUNTS = {
    ("depth", "operations"): layers_run,
    ("exit", "operations"): layers_run,
    ("depth", "nothing"): layers_run_again,
    ("select", "operations"): keys_read,
    ("select", "memory"): keys_held,
}


def test_decisions_count_what_the_budget_allows(target, policy, prompts):
    ids, mask = prompts
    trace = Trace()
    with attach(target, at(policy, Budget(fraction=0.5)), trace=trace):
        logits(target, ids, mask)
    assert trace.steps
    for step in trace.steps:
        assert torch.equal(step.decision.valid, mask[:, -1:].bool() if policy.saves == "memory" else mask.bool())
        wanted = COUNTS[step.decision.kind, policy.saves](at(policy, Budget(fraction=0.5)), mask)
        assert step.decision.spent().tolist() == wanted


@pytest.mark.parametrize("pair", list(itertools.combinations_with_replacement(POLICIES, 2)), ids="+".join)
def test_pairs_compose_or_are_refused_in_one_sentence(target, pair, prompts):
    one, other = map(built, pair)
    before = fingerprint(target)
    attachable(target, one)
    attachable(target, other)
    with attach(target, one):
        if one.writes & other.writes:
            with pytest.raises(ValueError, match="both decide"), attach(target, other):
                pass
        else:
            with attach(target, other):
                assert logits(target, *prompts).isfinite().all()
    assert fingerprint(target) == before
