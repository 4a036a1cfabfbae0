"""Ragged layers: what is gathered, computed and scattered back is what every token would get by itself."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from pertoken.core.attach import attach
from pertoken.core.cost import count_flops
from pertoken.core.decision import Depth
from pertoken.core.errors import BadRequest
from pertoken.decode.dyspec import DySpec
from pertoken.decode.full import Full
from pertoken.depth.layers import LayerPolicy
from tests.depth import naive
from tests.depth.conftest import model_of, rows
from tests.depth.reading import continued, logits


def hashed(position, layer, seed):
    return layer == 0 or (position * 7 + layer * 5 + seed * 3) % 4 < 2


@dataclass(frozen=True)
class Scattered(LayerPolicy):
    """Half of the (place, layer) pairs, in a pattern that no order of places can hide."""

    seed: int = 0
    keys = "carried"

    def decide(self, view):
        layers = torch.zeros(*view.valid.shape, view.layers, dtype=torch.bool)
        for row, places in enumerate(view.positions.tolist()):
            for token, place in enumerate(places):
                for layer in range(view.layers):
                    layers[row, token, layer] = hashed(place, layer, self.seed)
        return Depth(valid=view.valid, layers=layers)


@dataclass(frozen=True)
class Dwindling(Scattered):
    """The first layers alone, fewer with every place; no keys where a token does not go."""

    keys = "none"

    def decide(self, view):
        count = (view.layers - view.positions // 3).clamp(min=1)
        return Depth(valid=view.valid, layers=torch.arange(view.layers) < count[..., None])


class Whole:
    """Every token is computed, and those that should not run keep their state: the costly definition."""

    def __init__(self, monkeypatch):
        self.monkeypatch = monkeypatch

    def __enter__(self):
        self.monkeypatch.setattr("pertoken.depth.ragged.stays_whole", lambda adapter: True)

    def __exit__(self, *error):
        self.monkeypatch.undo()


@pytest.mark.parametrize("policy", [Scattered(), Dwindling()], ids=["carried", "none"])
@pytest.mark.parametrize("cut", [14, 5, 1])
def test_a_batch_is_what_each_token_gets_by_itself(target, prompts, policy, cut):
    ids, mask = prompts
    ids, mask = ids.clone(), mask.clone()
    mask[:, -1] = 1
    with attach(target, policy):
        found = continued(target, ids, mask, cut)
    view_runs = {
        "carried": lambda place, layer: hashed(place, layer, 0),
        "none": lambda place, layer: layer < max(4 - place // 3, 1),
    }[policy.keys]
    for row, tokens in enumerate(rows(ids, mask)):
        wanted = naive.read(target, tokens, view_runs, policy.keys == "carried")
        assert torch.allclose(found[row, -len(tokens) :], wanted, atol=2e-4), row


@pytest.mark.parametrize("policy", [Scattered(), Dwindling()], ids=["carried", "none"])
def test_gathering_is_masking_and_costs_less(target, prompts, policy, monkeypatch):
    ids, mask = prompts
    with torch.inference_mode(), attach(target, policy):
        found, cost = logits(target, ids, mask), count_flops(lambda: logits(target, ids, mask))
        with Whole(monkeypatch):
            wanted, whole = logits(target, ids, mask), count_flops(lambda: logits(target, ids, mask))
    kept = mask.bool()
    assert torch.allclose(found[kept], wanted[kept], atol=2e-4)
    assert cost < 0.85 * whole


def test_gradients_are_those_of_masking(monkeypatch, prompts):
    ids, mask = prompts
    found = []
    for whole in (False, True):
        model = model_of("llama")
        with attach(model, Scattered(), training=True):
            if whole:
                monkeypatch.setattr("pertoken.depth.ragged.stays_whole", lambda adapter: True)
            out = logits(model, ids, mask, use_cache=False)
            out[mask.bool()].square().mean().backward()
        found.append([weight.grad for weight in model.parameters()])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, atol=1e-4 * float(other.abs().max() + 1e-6))


@pytest.mark.parametrize("policy", [Scattered(seed=1), Dwindling()], ids=["carried", "none"])
def test_decoders_over_it_write_what_it_writes_alone(target, prompts, policy):
    ids, mask = prompts
    options = {"attention_mask": mask, "max_new_tokens": 12, "pad_token_id": 0, "do_sample": False}
    with attach(target, policy):
        plain = target.generate(ids, **options)
        assert torch.equal(target.generate(ids, custom_generate=Full(), **options), plain)
        assert torch.equal(target.generate(ids, custom_generate=DySpec(size=6), **options), plain)


def test_a_token_that_goes_deeper_than_those_before_it_is_refused():
    @dataclass(frozen=True)
    class Rising(Scattered):
        keys = "none"

        def decide(self, view):
            return Depth(valid=view.valid, layers=torch.arange(view.layers) <= view.positions[..., None])

    model, ids = model_of("llama"), torch.arange(2, 8)[None]
    with attach(model, Rising()), pytest.raises(BadRequest, match="layer 1 holds the keys of 0 tokens, of 1"):
        continued(model, ids, torch.ones_like(ids), 1)


def test_where_nothing_differs_nothing_is_moved(target, prompts):
    ids, mask = prompts
    with torch.inference_mode():
        wanted = logits(target, ids, mask)

        @dataclass(frozen=True)
        class Everything(Scattered):
            def decide(self, view):
                return Depth(valid=view.valid, layers=torch.ones(*view.valid.shape, view.layers, dtype=torch.bool))

        with attach(target, Everything()):
            assert torch.equal(logits(target, ids, mask), wanted)


def test_beside_a_policy_that_chooses_keys_tokens_stay_where_they_are(prompts):
    from pertoken.attend.tokenselect import TokenSelect

    model, (ids, mask) = model_of("llama"), prompts
    chooser = TokenSelect(**TokenSelect.small)
    with torch.inference_mode(), attach(model, chooser), attach(model, Scattered()):
        found = logits(model, ids, mask)
        for row in range(len(ids)):
            kept = mask[row].bool()
            alone = logits(model, ids[row : row + 1, kept], mask[row : row + 1, kept])[0]
            assert torch.allclose(found[row, kept], alone, atol=2e-4)
