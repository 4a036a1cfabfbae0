"""The layer that appends in place, driven at random beside transformers' own."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from pertoken.core.errors import BadRequest
from pertoken.models import growing
from pertoken.models.growing import GrowingLayer, let_grow


class Machine(RuleBasedStateMachine):
    """Every copy of a layer beside a `DynamicLayer` that does the same."""

    branches = Bundle("branches")

    @initialize(target=branches, rows=st.integers(1, 3), home=st.sampled_from([None, "cpu"]))
    def begin(self, rows, home):
        self.made, self.all = 0, []
        return self.kept([GrowingLayer(home), DynamicLayer(), rows])

    def kept(self, branch):
        self.all.append(branch)
        return branch

    def states(self, rows, new):
        self.made += 1
        keys = torch.randn(rows, 2, new, 3, generator=torch.Generator().manual_seed(self.made))
        return keys, -keys

    @rule(branch=branches, new=st.integers(1, 80))
    def append(self, branch, new):
        one, other, rows = branch
        states = self.states(rows, new)
        for mine, theirs in zip(one.update(*states), other.update(*states), strict=True):
            assert torch.equal(mine, theirs)

    @rule(branch=branches, count=st.integers(1, 3))
    def crop(self, branch, count):
        one, other, _ = branch
        if other.get_seq_length() > count:
            one.crop(-count)
            other.crop(-count)

    @rule(branch=branches, data=st.data())
    def reorder(self, branch, data):
        one, other, rows = branch
        if other.get_seq_length():
            order = torch.tensor(data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=3)))
            one.batch_select_indices(order)
            other.batch_select_indices(order)
            branch[2] = len(order)

    @rule(target=branches, branch=branches, deep=st.booleans())
    def fork(self, branch, deep):
        made = copy.deepcopy if deep else copy.copy
        return self.kept([made(branch[0]), made(branch[1]), branch[2]])

    @rule(branch=branches, fetches=st.booleans())
    def attend(self, branch, fetches):
        branch[0].attended = fetches

    @rule(target=branches, branch=branches, home=st.sampled_from([None, "cpu"]))
    def move(self, branch, home):
        """Another layer goes on with what this one holds."""
        return self.kept([GrowingLayer.of(branch[0], home), copy.copy(branch[1]), branch[2]])

    @rule(branch=branches)
    def reset(self, branch):
        branch[0].reset()
        branch[1].reset()

    @invariant()
    def same(self):
        for one, other, _ in getattr(self, "all", []):
            assert one.get_seq_length() == other.get_seq_length()
            if other.get_seq_length():
                assert torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


def test_a_step_writes_one_token():
    layer = GrowingLayer()
    layer.update(torch.randn(1, 2, 512, 4), torch.randn(1, 2, 512, 4))
    layer.update(torch.randn(1, 2, 1, 4), torch.randn(1, 2, 1, 4))
    rooms = set()
    for _ in range(growing.LEAST - 1):
        keys, values = layer.update(torch.randn(1, 2, 1, 4), torch.randn(1, 2, 1, 4))
        rooms.add((keys.data_ptr(), values.data_ptr()))
    assert len(rooms) == 1


def test_gradients_reach_cached_keys():
    layer = GrowingLayer()
    first, second = (torch.randn(1, 1, 2, 4, requires_grad=True) for _ in range(2))
    layer.update(first, first)
    keys, _ = layer.update(second, second)
    keys.sum().backward()
    assert first.grad is not None and second.grad is not None


def test_what_lies_elsewhere_takes_no_gradient():
    layer, states = GrowingLayer("cpu"), torch.randn(1, 1, 2, 4)
    layer.update(states, states)
    for wrong in ((states.clone().requires_grad_(), states), (states, states.clone().requires_grad_())):
        with pytest.raises(BadRequest, match="take no gradient"):
            layer.update(*wrong)


def test_what_lies_elsewhere_grows_in_place_from_the_first_token_on():
    layer, rooms = GrowingLayer("cpu"), set()
    for _ in range(growing.LEAST):
        keys, _ = layer.update(torch.randn(1, 2, 1, 4), torch.randn(1, 2, 1, 4))
        rooms.add(keys.data_ptr())
    assert len(rooms) == 1


def test_only_plain_caches_are_changed():
    cache = DynamicCache()
    cache.update(torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3, 4), 0)
    cache.layers.append(DynamicLayer())
    let_grow(cache)
    assert [type(layer) for layer in cache.layers] == [GrowingLayer, DynamicLayer]
    kept = [1, {"cache": cache}]
    let_grow(kept)
    assert kept == [1, {"cache": cache}]
