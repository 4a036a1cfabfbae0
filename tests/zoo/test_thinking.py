"""Training of second passes and of their decider, on tiny models."""

from __future__ import annotations

import pytest
import torch

from pertoken.core.attach import attach
from pertoken.core.errors import BadRequest
from pertoken.depth.deciders import NeuralDecider
from pertoken.depth.lora import Lora
from pertoken.depth.think_at_hard import ThinkAtHard
from pertoken.models.load import load
from pertoken.models.signature import signature
from pertoken.zoo.thinking import ALWAYS, ONCE, Thinking, asked
from pertoken.zoo.tuning import tune
from tests.contract.conftest import FAMILIES

SHORT = {"rank": 4, "alpha": 8.0, "inner": 8, "looks": 3}


def text():
    """Rows in which every token follows from the one before, and half of them are answers."""
    ids = (torch.randint(0, 50, (4, 1), generator=torch.Generator().manual_seed(1)) + 3 * torch.arange(25)) % 50
    return torch.stack([ids, torch.arange(25).expand(4, -1) % 2], 1)


def llama():
    torch.manual_seed(0)
    return FAMILIES["llama"](3).eval()


def trained(recipe, steps, lr=1e-2):
    model = llama().requires_grad_(False)
    task, ids, losses = recipe.task(model, None), text(), []
    optimizer = torch.optim.Adam([{"lr": lr * one["pace"], **one} for one in task.groups()])
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


@pytest.mark.parametrize("backbone", [0.5, 0.0])
@pytest.mark.parametrize("again", ["hard", ALWAYS])
def test_model_and_weights_learn_and_the_reference_stays(again, backbone):
    untouched = signature(llama())
    model, task, losses = trained(Thinking(first=40, steps=40, again=again, backbone=backbone, **SHORT), 40)
    assert losses[-1] < 0.8 * losses[0]
    assert signature(task.reference) == untouched and (signature(model) == untouched) == (backbone == 0)
    assert bool(task.lora.up[0].abs().sum() > 0) and task.lora.gate == 1.0
    assert all(weight.grad is None for weight in [*task.decider.parameters(), *task.reference.parameters()])


def test_in_a_control_of_one_pass_the_model_learns_alone():
    model, task, losses = trained(Thinking(first=40, steps=40, again=ONCE, **SHORT), 40)
    assert losses[-1] < 0.8 * losses[0] and signature(model) != signature(task.reference)
    assert all(weight.grad is None for weight in task.lora.parameters())
    tokens, truth = asked(text())
    plain = model(tokens).logits[truth >= 0]
    wanted = torch.nn.functional.cross_entropy(plain, truth[truth >= 0])
    assert torch.allclose(task.loss(text(), 0), wanted, rtol=1e-5)


def test_the_model_has_the_slower_pace():
    task = Thinking(backbone=0.25, **SHORT).task(llama(), None)
    paces = {id(weight): one["pace"] for one in task.groups() for weight in one["params"]}
    assert all(paces[id(weight)] == 0.25 for weight in task.model.parameters())
    assert all(paces[id(weight)] == 1.0 for weight in [*task.lora.parameters(), *task.decider.parameters()])


def test_gradients_of_both_passes_are_those_of_finite_differences():
    """Of the whole loss, through the expected embedding, the keys of the first pass and the summed logits."""
    recipe = Thinking(first=1, steps=1, dropout=0.0, **SHORT)
    model = llama().double()
    task = recipe.task(model, None)
    task.lora.double()
    with torch.no_grad():
        for weight in task.lora.up:
            weight.normal_(std=0.1)
    task.loss(text(), 0).backward()
    inner, last = model.model, model.model.layers[-1]
    for weight in (
        *(inner.embed_tokens.weight, inner.layers[0].self_attn.v_proj.weight, last.mlp.down_proj.weight),
        *(task.lora.down[3], task.lora.up[-1]),
    ):
        way = torch.randn(weight.shape, dtype=torch.double, generator=torch.Generator().manual_seed(1))
        if weight is inner.embed_tokens.weight:
            way[inner.embed_tokens.padding_idx] = 0  # a row that never learns
        found, losses = float((weight.grad * way).sum()), []
        for step in (1e-4, -1e-4):  # no smaller: sums of logits are in fp32
            with torch.no_grad():
                weight += step * way
                losses.append(float(task.loss(text(), 0)))
                weight -= step * way
        assert found == pytest.approx((losses[0] - losses[1]) / 2e-4, rel=3e-3, abs=3e-3)


def test_the_decider_learns_which_tokens_are_hard_and_what_shares_go_on(tmp_path):
    _, tokenizer = load("zoo:reasoning", "fp32")
    model, task, losses = trained(Thinking(first=0, steps=60, **SHORT), 60, lr=3e-3)
    assert losses[-1] < 0.8 * losses[0]
    assert all(weight.grad is None for weight in [*task.lora.parameters(), *model.parameters()])
    task.tokenizer = tokenizer
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


def test_what_is_trained_is_a_model_with_its_weights_and_decider_and_goes_on(tmp_path):
    recipe = Thinking(steps=3, first=2, batch=2, length=64, lr=1e-2, **SHORT)
    tune("reasoning-think", tmp_path, recipe, steps=1)
    place = str(tune("reasoning-think", tmp_path, recipe))
    (before, _), (model, tokenizer) = load("zoo:reasoning", "fp32"), load(place)
    assert model.config.recipe["trained_steps"] == 3 and model.dtype == torch.bfloat16
    inputs = tokenizer(["3+4=", "sort 5 31 9="], return_tensors="pt", padding=True)
    with torch.inference_mode(), attach(model, ThinkAtHard(decider=place, lora=place, threshold=0.0)):
        assert model.generate(**inputs, max_new_tokens=3, pad_token_id=0).shape[1] > inputs["input_ids"].shape[1]
    with pytest.raises(BadRequest, match="was trained for the model"), attach(before, ThinkAtHard(decider=place)):
        pass


def test_an_unknown_group_is_refused():
    with pytest.raises(BadRequest, match="again='some' is unknown"):
        Thinking(again="some", **SHORT).task(llama(), None)


def test_a_control_of_one_pass_in_which_nothing_learns_is_refused():
    with pytest.raises(BadRequest, match="give backbone above 0"):
        Thinking(again=ONCE, backbone=0.0, **SHORT).task(llama(), None)
