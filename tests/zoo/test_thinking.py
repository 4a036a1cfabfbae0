"""Training of second passes and of their decider, on tiny models."""

from __future__ import annotations

import pytest
import torch

from pertoken.core.attach import attach, fingerprint
from pertoken.core.errors import BadRequest
from pertoken.depth.deciders import NeuralDecider
from pertoken.depth.lora import Lora
from pertoken.depth.think_at_hard import ThinkAtHard
from pertoken.zoo.thinking import ALWAYS, ONCE, Thinking, asked
from tests.contract.conftest import FAMILIES

SHORT = {"rank": 4, "alpha": 8.0, "inner": 8, "looks": 3}


def text():
    """Rows in which every token follows from the one before, and half of them are answers."""
    ids = (torch.randint(0, 50, (4, 1), generator=torch.Generator().manual_seed(1)) + 3 * torch.arange(25)) % 50
    return torch.stack([ids, torch.arange(25).expand(4, -1) % 2], 1)


def trained(recipe, steps, lr=1e-2):
    torch.manual_seed(0)
    model = FAMILIES["llama"](3).eval().requires_grad_(False)
    task, ids, losses = recipe.task(model, None), text(), []
    optimizer = torch.optim.Adam(task.module.parameters(), lr=lr)
    for step in range(steps):
        loss = task.loss(ids, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return model, task, losses


def test_what_is_asked():
    ids = torch.tensor([[[5, 6, 7, 8], [0, 0, 1, 1]]])
    tokens, truth = asked(ids)
    assert tokens.tolist() == [[5, 6, 7]] and truth.tolist() == [[-1, 7, 8]]
    tokens, truth = asked(ids[:, 0])
    assert tokens.tolist() == [[5, 6, 7]] and truth.tolist() == [[6, 7, 8]]


@pytest.mark.parametrize("again", ["hard", ALWAYS, ONCE])
def test_weights_learn_and_the_model_stays(again):
    recipe = Thinking(first=40, steps=40, again=again, **SHORT)
    model, task, losses = trained(recipe, 40)
    assert losses[-1] < 0.8 * losses[0]
    before = fingerprint(FAMILIES["llama"](3), deep=False).keys()
    assert fingerprint(model).keys() == before and task.lora.gate == 1.0
    assert all(weight.grad is None for weight in task.decider.parameters())


def test_the_decider_learns_which_tokens_are_hard_and_what_shares_go_on(tmp_path):
    model, task, losses = trained(Thinking(first=0, steps=60, **SHORT), 60, lr=3e-3)
    assert losses[-1] < 0.8 * losses[0]
    assert all(weight.grad is None for weight in task.lora.parameters())
    task.save(tmp_path, {})
    judge, low = NeuralDecider.load(tmp_path), Lora.load(tmp_path)
    assert judge.threshold(0.0) >= judge.threshold(0.3) >= judge.threshold(1.0)
    tokens, truth = asked(text())
    odds, hard, counted = task.judged(tokens, truth)
    above = odds[counted].sigmoid() > judge.threshold(0.4)
    assert abs(float(above.float().mean()) - 0.4) < 0.08
    assert bool(hard.any()) and not bool((hard & ~counted).any())
    with torch.inference_mode(), attach(model, ThinkAtHard(decider=judge, lora=low)):
        assert model(tokens).logits.isfinite().all()


def test_an_unknown_group_is_refused():
    with pytest.raises(BadRequest, match="again='some' is unknown"):
        Thinking(again="some", **SHORT).task(FAMILIES["llama"](3), None)
