"""The oracle search against trying every route by itself."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from pertoken.core.errors import BadRequest
from pertoken.depth import oracle
from pertoken.depth.duo import BIG, SMALL
from tests.depth.conftest import model_of
from tests.depth.test_duo import duo_for


def losses(model, duo, ids, mask, route, labels):
    logits = oracle.read(model, duo, ids, mask, route)[:, :-1].float()
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")


@pytest.mark.parametrize("options", [2, 3])
def test_uniform_losses_are_those_of_each_route_by_itself(target, prompts, options, monkeypatch):
    monkeypatch.setattr(oracle, "TOKENS", 400)  # so that nodes go on in parts
    ids, mask = prompts
    duo = duo_for(target, options, rank=2)
    routes = oracle.all_routes(4, options)[::3]
    drawn = oracle.resampled(target, duo, ids, mask, seed=1)
    found = oracle.uniform(target, duo, ids, mask, routes, drawn)
    assert torch.equal(found.routes, routes) and found.valid.sum() == (mask.sum(-1) - 1).clamp(min=0).sum()
    for number, route in enumerate(routes):
        for label, truth in enumerate((ids[:, 1:], drawn)):
            wanted = losses(target, duo, ids, mask, route[None, None], truth)
            assert torch.allclose(found.losses[number, label][found.valid], wanted[found.valid], atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_the_consistent_search_is_greedy_over_the_keys_of_what_was_chosen(name, prompts, monkeypatch):
    monkeypatch.setattr(oracle, "NODES", 3)
    model, (ids, mask) = model_of(name, layers=3), prompts
    duo, routes = duo_for(model, 3), oracle.all_routes(3, 3)[::4]
    chosen, least = oracle.consistent(model, duo, ids, mask, routes)
    for row in (0, 2, 4):
        tokens = ids[row][mask[row].bool()][None]
        own, taken = torch.ones_like(tokens), torch.zeros(1, 0, 3, dtype=torch.long)
        for place in range(tokens.shape[1] - 1):
            read, label = slice(0, place + 1), tokens[:, place + 1]
            tried = [torch.cat([taken, route[None, None]], 1) for route in routes]
            found = [oracle.read(model, duo, tokens[:, read], own[:, read], one)[:, -1] for one in tried]
            each = torch.stack([F.cross_entropy(logits, label) for logits in found])
            best = int(each.argmin())
            column = ids.shape[1] - tokens.shape[1] + place
            assert torch.equal(chosen[row, column], routes[best]), (row, place)
            assert float(least[row, column]) == pytest.approx(float(each[best]), abs=1e-3)
            taken = tried[best]


def test_the_least_of_drawn_routes_is_the_mean_over_all_draws():
    numbers = torch.rand(6, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    search = oracle.Search(torch.zeros(6, 2), numbers, torch.ones(3, 4, dtype=torch.bool))
    for drawn in range(1, 7):
        wanted = [numbers[list(some), 1].amin(0) for some in itertools.combinations(range(6), drawn)]
        assert torch.allclose(search.least_of(drawn, 1), torch.stack(wanted).double().mean(0))
    with pytest.raises(BadRequest, match="7 of 6 routes cannot be drawn"):
        search.least_of(7)


def test_search_speaks_of_places_that_have_a_next_token():
    routes, valid = oracle.all_routes(2), torch.tensor([[False, True], [True, True]])
    numbers = torch.tensor([4.0, 1.0, 2.0, 3.0]).view(4, 1, 1, 1).expand(4, 1, 2, 2).clone()
    numbers[:, :, 0, 0], numbers[2, 0, 1, 1] = math.nan, 0.5
    search = oracle.Search(routes, numbers, valid)
    assert search.big.tolist() == [2, 1, 1, 0] and search.best_fixed() == 1
    assert search.with_big(1).routes.tolist() == [[BIG, SMALL], [SMALL, BIG]]
    assert search.mean(search.losses[:, 0]).tolist() == pytest.approx([4, 1, 1.5, 3])
    assert search.mean(search.oracle()).item() == pytest.approx((1 + 1 + 0.5) / 3)
    assert search.best()[valid].tolist() == [1, 1, 2]


def test_labels_are_drawn_from_the_all_big_distribution(prompts):
    model, (ids, mask) = model_of("llama"), prompts
    model.lm_head.weight.data *= 1000  # nearly certain
    duo = duo_for(model)
    drawn = oracle.resampled(model, duo, ids, mask)
    best = oracle.read(model, duo, ids, mask, torch.full((1, 1, 4), BIG)).argmax(-1)[:, :-1]
    assert (drawn == best)[mask[:, :-1].bool()].float().mean() > 0.9


def test_routes_that_are_too_many_are_drawn_instead():
    with pytest.raises(BadRequest, match="3 options in 12 layers are 531441 routes"):
        oracle.all_routes(12, 3)
    routes = oracle.drawn_routes(12, 6, 100)
    assert routes.unique(dim=0).shape == (100, 12) and ((routes == BIG).sum(-1) == 6).all()
    assert len(oracle.drawn_routes(4, 1, 100)) == 4
