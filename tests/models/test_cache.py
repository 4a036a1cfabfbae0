"""TreeCache against plain lists: Hypothesis drives writes, commits and row selection over ragged rows."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pertoken.models.cache import TreeCache

torch.set_num_threads(1)
LAYERS, HEADS, DIM = 2, 2, 3
SHAPE = SimpleNamespace(depth=LAYERS, kv_heads=HEADS, head_dim=DIM, dtype=torch.float32, device=torch.device("cpu"))


def entry(name: int, layer: int, side: int) -> torch.Tensor:
    """What the cache must hold for the token called `name`: `[head, dim]`, different in every place."""
    return name * 100.0 + layer * 40 + side * 20 + torch.arange(HEADS * DIM, dtype=torch.float32).view(HEADS, DIM)


class CacheMachine(RuleBasedStateMachine):
    """Each row is a list of (name, position); provisional blocks are lists of the same, one column at a time."""

    @initialize(rows=st.integers(1, 3), capacity=st.integers(1, 6))
    def start(self, rows, capacity):
        self.cache = TreeCache(SHAPE, rows, capacity)
        self.rows = [[] for _ in range(rows)]
        self.open_ = [[] for _ in range(rows)]
        self.name = 0

    def write(self, columns, depths):
        """One forward's keys and values behind what is provisional already."""
        cache, used = self.cache, len(self.open_[0])
        positions = torch.zeros(len(self.rows), columns, dtype=torch.long)
        names = torch.zeros(len(self.rows), columns, dtype=torch.long)
        for row, known in enumerate(self.rows):
            for column in range(columns):
                self.name += 1
                place = len(known) + depths[column]
                positions[row, column], names[row, column] = place, self.name
                self.open_[row].append((self.name, place))
        cache.open(cache.base + used, positions)
        for layer in range(LAYERS):
            block = [
                torch.stack([torch.stack([entry(int(n), layer, side) for n in line], 1) for line in names])
                for side in (0, 1)
            ]
            keys, values = cache.update(block[0], block[1], layer)
            assert keys.shape == values.shape == (len(self.rows), HEADS, cache.base + used + columns, DIM)
            assert torch.equal(keys[:, :, -columns:], block[0]) and torch.equal(values[:, :, -columns:], block[1])
        assert cache.get_seq_length() == cache.base + used

    @rule(columns=st.integers(1, 4), data=st.data())
    def append(self, columns, data):
        self.write(columns, [data.draw(st.integers(0, 3)) for _ in range(columns)])

    @precondition(lambda self: self.open_[0])
    @rule(data=st.data())
    def commit(self, data):
        """Keep an increasing subset of each row's provisional columns, as `Context.keep` does."""
        width = len(self.open_[0])
        kept = [sorted(data.draw(st.sets(st.integers(0, width - 1)))) for _ in self.rows]
        longest = max(map(len, kept))
        columns = torch.tensor([[*k, *[0] * (longest - len(k))] for k in kept], dtype=torch.long)
        counts = torch.tensor([len(k) for k in kept])
        self.cache.commit(columns.view(len(kept), longest) + self.cache.base, counts, longest)
        for row, k in enumerate(kept):
            self.rows[row] += [self.open_[row][c] for c in k]
        self.open_ = [[] for _ in self.rows]

    @precondition(lambda self: not self.open_[0])
    @rule(data=st.data())
    def select(self, data):
        order = data.draw(st.permutations(range(len(self.rows))))
        order = order[: data.draw(st.integers(1, len(order)))]
        self.cache.select_rows(torch.tensor(order))
        self.rows = [self.rows[i] for i in order]
        self.open_ = [[] for _ in order]

    @precondition(lambda self: self.open_[0])
    @rule(data=st.data(), window=st.one_of(st.none(), st.integers(1, 5)))
    def look(self, data, window):
        """The mask of queries in the open columns, entry by entry."""
        cache, width = self.cache, len(self.open_[0])
        queries = cache.columns.stop - cache.columns.start
        flags = st.lists(st.booleans(), min_size=queries * width, max_size=queries * width)
        allow = torch.stack([torch.tensor(data.draw(flags)).view(queries, width) for _ in self.rows])
        mask = cache.mask(allow, window)
        assert mask.shape == (len(self.rows), 1, queries, cache.read)
        assert set(mask.unique().tolist()) <= {0.0, torch.finfo(torch.float32).min}
        for row in range(len(self.rows)):
            for query in range(queries):
                at = self.open_[row][width - queries + query][1]
                seen = mask[row, 0, query] == 0
                near = [name for name, place in self.rows[row] if window is None or at - place < window]
                columns = seen[: cache.base].nonzero().flatten().tolist()
                assert [self.held(row, c) for c in columns] == near
                for column, (_, place) in enumerate(self.open_[row]):
                    expected = bool(allow[row, query, column]) and (window is None or at - place < window)
                    assert bool(seen[cache.base + column]) == expected

    def held(self, row, column):
        """The name that a column holds, after checking that all its layers and heads agree."""
        name = int(self.cache.buffer[0, 0, row, 0, column, 0]) // 100
        for layer in range(LAYERS):
            for side in (0, 1):
                assert torch.equal(self.cache.buffer[layer, side, row, :, column], entry(name, layer, side))
        return name

    @invariant()
    def committed_columns_hold_what_was_kept(self):
        if not hasattr(self, "cache"):
            return
        cache = self.cache
        assert cache.rows == len(self.rows) and cache.base <= cache.capacity
        for row, tokens in enumerate(self.rows):
            columns = cache.valid[row, : cache.base].nonzero().flatten().tolist()
            assert [self.held(row, c) for c in columns] == [name for name, _ in tokens]
            assert cache.positions[row, columns].tolist() == [place for _, place in tokens]
        if cache.dense:
            assert cache.valid[:, : cache.base].all(), "a dense cache needs no mask: it must have no holes"

    @invariant()
    def holes_do_not_pile_up(self):
        if hasattr(self, "cache") and len(self.rows) > 1 and not self.open_[0]:
            longest = max(map(len, self.rows))
            assert self.cache.base - longest <= self.cache.base // 4


CacheMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=30, derandomize=True, deadline=None)
TestCache = CacheMachine.TestCase


def test_a_dense_cache_and_a_single_query_need_no_mask():
    cache = TreeCache(SHAPE, 2, 8)
    cache.open(0, torch.arange(3).expand(2, 3))
    cache.commit(torch.arange(3).expand(2, 3), torch.tensor([3, 3]), 3)
    cache.open(3, torch.full((2, 1), 3))
    assert cache.mask(None) is None
    assert cache.mask(None, window=2) is not None
    cache.commit(torch.full((2, 1), 3), torch.tensor([1, 0]), 1)
    cache.open(4, torch.tensor([[4], [3]]))
    mask = cache.mask(None)
    assert (mask[:, 0, 0] == 0).tolist() == [[True] * 5, [True, True, True, False, True]]


def test_growing_keeps_what_is_there():
    cache = TreeCache(SHAPE, 1, 2)
    for step in range(9):
        cache.open(step, torch.tensor([[step]]))
        for layer in range(LAYERS):
            cache.update(*(entry(step, layer, side)[None, :, None] for side in (0, 1)), layer)
        cache.commit(torch.tensor([[step]]), torch.tensor([1]), 1)
    assert cache.base == 9 <= cache.capacity
    for step in range(9):
        assert torch.equal(cache.buffer[1, 1, 0, :, step], entry(step, 1, 1))
    assert cache.positions[0, :9].tolist() == list(range(9))
