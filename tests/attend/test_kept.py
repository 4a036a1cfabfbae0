"""The cache layer that frees memory, driven at random beside a plain list of what each row and head should hold."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, rule
from transformers import DynamicCache

from pertoken.attend.kept import KeptLayer, cache_bytes
from pertoken.core.errors import BadRequest

HEADS, DIM = 2, 3


class Plain:
    """What a layer should hold: rows of heads of (place, key, age)."""

    def __init__(self, rows: int):
        self.rows = [[[] for _ in range(HEADS)] for _ in range(rows)]
        self.seen = 0

    def copy(self) -> Plain:
        made = Plain(0)
        made.rows, made.seen = [[list(head) for head in row] for row in self.rows], self.seen
        return made


class Machine(RuleBasedStateMachine):
    """Every branch of a layer (its forks live on) against its own plain list."""

    branches = Bundle("branches")

    @initialize(target=branches, rows=st.integers(1, 3))
    def begin(self, rows):
        self.made = 0
        layer = KeptLayer()
        layer.attended = True
        return self.checked([layer, Plain(rows)])

    @rule(branch=branches, new=st.integers(1, 4))
    def append(self, branch, new):
        layer, plain = branch
        rows = len(plain.rows)
        keys = torch.arange(self.made, self.made + rows * HEADS * new).view(rows, HEADS, new, 1).float()
        self.made += rows * HEADS * new
        keys = keys.expand(-1, -1, -1, DIM)
        all_keys, all_values = layer.update(keys, -keys)
        assert all_keys is layer.keys and all_values is layer.values
        older = layer.beside.get("age", torch.zeros(rows, 1, layer.kept))
        layer.beside["age"] = older + (layer.places >= 0)
        for r, row in enumerate(plain.rows):
            for h, head in enumerate(row):
                head[:] = [(place, key, age + 1) for place, key, age in head]
                head += [(plain.seen + i, float(keys[r, h, i, 0]), 1) for i in range(new)]
        plain.seen += new
        self.checked(branch)

    @rule(branch=branches, data=st.data(), apart=st.booleans())
    def evict(self, branch, data, apart):
        layer, plain = branch
        sets = [
            [sorted(data.draw(st.sets(st.integers(0, max(plain.seen - 1, 0))))) for _ in range(HEADS if apart else 1)]
            for _ in plain.rows
        ]
        width = max(len(places) for row in sets for places in row)
        keep = [[[-1] * (width - len(places)) + places for places in row] for row in sets]
        layer.evict(torch.tensor(keep, dtype=torch.long).view(len(sets), HEADS if apart else 1, width))
        if plain.seen and layer.kept:
            assert layer.kept == width
        for row, kept in zip(plain.rows, sets, strict=True):
            for h, head in enumerate(row):
                head[:] = [entry for entry in head if entry[0] in kept[h if apart else 0]]
        self.checked(branch)

    @rule(branch=branches, count=st.integers(0, 4))
    def rollback(self, branch, count):
        layer, plain = branch
        count = min(count, plain.seen)
        gone = list(range(plain.seen - count, plain.seen))
        there = all([e[0] for e in head][len(head) - count :] == gone for row in plain.rows for head in row)
        if not there:
            with pytest.raises(BadRequest, match="cannot be taken back"):
                layer.crop(-count)
        else:
            layer.crop(-count)
            plain.seen -= count
            for row in plain.rows:
                for head in row:
                    del head[len(head) - count :]
        self.checked(branch)

    @rule(branch=branches, data=st.data(), beams=st.booleans())
    def select(self, branch, data, beams):
        layer, plain = branch
        rows = data.draw(st.lists(st.integers(0, len(plain.rows) - 1), min_size=1, max_size=4))
        if plain.seen == 0:
            return
        (layer.reorder_cache if beams else layer.batch_select_indices)(torch.tensor(rows))
        plain.rows = [[list(head) for head in plain.rows[r]] for r in rows]
        self.checked(branch)

    @rule(branch=branches, repeats=st.integers(1, 2))
    def repeat(self, branch, repeats):
        layer, plain = branch
        if plain.seen == 0 or len(plain.rows) > 3:
            return
        layer.batch_repeat_interleave(repeats)
        plain.rows = [[list(head) for head in row] for row in plain.rows for _ in range(repeats)]
        self.checked(branch)

    @rule(target=branches, branch=branches)
    def fork(self, branch):
        layer, plain = branch
        return self.checked([layer.fork(), plain.copy()])

    @rule(branch=branches)
    def nothing_elsewhere_has_moved(self, branch):
        self.checked(branch)

    def checked(self, branch):
        layer, plain = branch
        assert layer.get_seq_length() == plain.seen and layer.get_mask_sizes(2) == (plain.seen + 2, 0)
        if plain.seen == 0:
            return branch
        assert layer.keys.shape == layer.values.shape == (len(plain.rows), HEADS, layer.kept, DIM)
        for r, row in enumerate(plain.rows):
            for h, head in enumerate(row):
                places = layer.places[r, h if layer.places.shape[1] > 1 else 0].tolist()
                assert places == sorted(places) and [p for p in places if p >= 0] == [e[0] for e in head]
                slots = [i for i, p in enumerate(places) if p >= 0]
                assert layer.keys[r, h, slots, 0].tolist() == [e[1] for e in head]
                assert layer.values[r, h, slots, 0].tolist() == [-e[1] for e in head]
                ages = layer.beside["age"]
                assert ages[r, h if ages.shape[1] > 1 else 0, slots].tolist() == [e[2] for e in head]
        return branch


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def filled(rows=2, tokens=6):
    layer = KeptLayer()
    keys = torch.randn(rows, HEADS, tokens, DIM, generator=torch.Generator().manual_seed(1))
    layer.update(keys, keys + 1)
    return layer, keys


def test_evicted_memory_is_freed():
    layer, keys = filled()
    storage = layer.keys.untyped_storage().nbytes()
    layer.evict(torch.tensor([[[0, 5]], [[-1, 3]]]))
    assert layer.keys.untyped_storage().nbytes() * 3 == storage == keys.numel() * 4
    assert layer.bytes == 2 * (2 * HEADS * 2 * DIM * 4) + 2 * HEADS // 2 * 2 * 8
    assert torch.equal(layer.keys[0], keys[0][:, [0, 5]]) and torch.equal(layer.keys[1, :, 1], keys[1, :, 3])


def test_an_evicted_cache_is_refused_outside():
    layer, keys = filled()
    layer.update(keys, keys)
    layer.evict(torch.tensor([[[1, 2]], [[1, 2]]]))
    with pytest.raises(BadRequest, match="has evicted keys"):
        layer.update(keys, keys)


def test_errors_say_what_to_do():
    layer, _ = filled()
    with pytest.raises(BadRequest, match="below 0"):
        layer.crop(2)
    with pytest.raises(BadRequest, match="2 rows and 1 or 2 groups"):
        layer.evict(torch.zeros(3, 1, 1, dtype=torch.long))


def test_it_begins_as_a_layer_of_transformers_and_again_after_reset():
    cache = DynamicCache()
    keys = torch.randn(1, HEADS, 4, DIM)
    cache.update(keys, keys, 0)
    dense = cache_bytes(cache)
    layer = cache.layers[0] = KeptLayer.of(cache.layers[0])
    assert layer.whole and layer.is_croppable and torch.equal(layer.keys, keys)
    assert cache_bytes(cache) == dense + 4 * 8 and cache.get_seq_length() == 4
    layer.attended = True
    layer.evict(torch.tensor([[[2]]]))
    assert not layer.is_croppable and cache.get_seq_length() == 4 and cache_bytes(cache) == dense // 4 + 8
    layer.reset()
    assert layer.whole and layer.kept == 0 == cache.get_seq_length()
    layer.update(keys, keys)
    assert layer.places.tolist() == [[[0, 1, 2, 3]]]
