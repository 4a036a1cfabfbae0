"""Laws of every registered policy that reduces image tokens, on every family, with no word about any one of them."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from pertoken.core.attach import active, attach
from pertoken.core.budget import Budget
from pertoken.core.cost import count_flops
from pertoken.core.errors import BadRequest
from pertoken.core.fingerprint import fingerprint
from pertoken.core.trace import Trace
from tests.contract.reducing import REDUCERS, built, host, out_of
from tests.reduce.families import FAMILIES, images


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module", params=REDUCERS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def model(name, family):
    return host(name, family)


@pytest.fixture
def policy(name, model):
    return built(name, model)


def seen(model, pixels, policy, **options):
    with torch.inference_mode(), attach(model, policy, **options):
        return out_of(model, pixels)


def dense(model, pixels):
    with torch.inference_mode():
        return out_of(model, pixels)


def at(policy, budget):
    return dataclasses.replace(policy, budget=budget)


def test_full_budget_is_the_identity(model, policy):
    expected = dense(model, images())
    assert torch.equal(seen(model, images(), at(policy, Budget.full())), expected)
    trace = Trace()
    found = seen(model, images(), at(policy, Budget.full()), trace=trace)
    assert torch.allclose(found, expected, atol=1e-5) and trace.steps


def test_undo_is_exact(model, policy):
    before, expected = fingerprint(model, deep=True), dense(model, images())
    for _ in range(2):
        with torch.inference_mode(), attach(model, policy):
            assert fingerprint(model) != before
            changed = out_of(model, images())
        assert changed.shape != expected.shape or not torch.equal(changed, expected)
    with pytest.raises(RuntimeError, match="inside"), attach(model, policy):
        raise RuntimeError("inside")
    assert fingerprint(model, deep=True) == before and not active(model)
    assert torch.equal(dense(model, images()), expected)


def test_disabled_is_the_model_as_it_was(model, policy):
    expected = dense(model, images())
    with torch.inference_mode(), attach(model, policy) as attached:
        out_of(model, images())
        with attached.disabled():
            assert torch.equal(out_of(model, images()), expected)
        found = out_of(model, images())
        assert found.shape != expected.shape or not torch.equal(found, expected)


def test_a_batch_is_each_image_alone_and_in_any_order(model, policy):
    pixels = images(6)
    together = seen(model, pixels, policy)
    assert not torch.allclose(together[0], together[1])
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert torch.allclose(seen(model, pixels[order], policy), together[order], atol=1e-4)
    for row in range(6):
        assert torch.allclose(seen(model, pixels[row : row + 1], policy)[0], together[row], atol=1e-4)


def test_replay_serves_the_recording(model, policy, tmp_path):
    recorded, again = Trace(), Trace()
    first = seen(model, images(), policy, trace=recorded)
    recorded.save(tmp_path / "trace")
    loaded = Trace.load(tmp_path / "trace")
    assert loaded.same_as(recorded) and recorded.steps
    other = at(policy, Budget.full())
    assert torch.equal(seen(model, images(), other, trace=again, replay=loaded), first)
    assert again.same_as(recorded)


def test_cost_falls_as_the_budget_says(model, policy):
    found = [count_flops(lambda: dense(model, images()))]
    for share in (0.7, 0.5, 0.25):
        found.append(count_flops(lambda share=share: seen(model, images(), at(policy, Budget(fraction=share)))))
    assert found == sorted(found, reverse=True) and len(set(found)) == len(found)


def test_decisions_never_make_tokens_and_end_near_the_budget(model, policy):
    trace, pixels = Trace(), images(8, seed=9)
    seen(model, pixels, at(policy, Budget(fraction=0.4)), trace=trace)
    before = None
    for step in trace.steps:
        now = step.decision.valid.sum(-1)
        assert before is None or torch.equal(now, before)
        before = step.decision.spent()
        assert (before <= now).all() and (before > 0).all()
    prefix = int(trace.steps[0].decision.valid.sum(-1)[0]) - 64
    left = float((before - prefix).float().mean())
    assert abs(left - 0.4 * 64) <= 0.05 * 64


def test_half_precision_runs(name, family):
    low = host(name, family).to(torch.bfloat16)
    found = seen(low, images().bfloat16(), built(name, low))
    assert found.dtype == torch.bfloat16 and found.isfinite().all()


def test_eager_attention_gives_the_same(policy, model, name, family):
    other = host(name, family)
    whole = other if hasattr(other, "set_attn_implementation") else other.encoder
    whole.set_attn_implementation("eager")
    assert torch.allclose(seen(other, images(), policy), seen(model, images(), policy), atol=1e-3)


def test_gradients_flow_and_are_finite(model, policy):
    pixels = images(3).requires_grad_()
    with attach(model, policy):
        out_of(model, pixels).square().mean().backward()
    assert pixels.grad is not None and pixels.grad.isfinite().all() and pixels.grad.abs().sum() > 0
    model.zero_grad()


def test_every_pair_is_refused_in_one_sentence():
    model = host("dtop", "vit")
    before = fingerprint(model)
    for one, other in itertools.combinations_with_replacement(REDUCERS, 2):
        first, second = built(one, model), built(other, model)
        with attach(model, first), pytest.raises(ValueError, match="both decide"), attach(model, second):
            pass
    assert fingerprint(model) == before


@pytest.mark.parametrize("budget", [Budget(layers=2), Budget(nodes=3)], ids=str)
def test_other_units_are_refused(name, budget, model):
    with pytest.raises(BadRequest, match="give Budget"):
        built(name, model, budget=budget)
