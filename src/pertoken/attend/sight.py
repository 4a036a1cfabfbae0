"""What the queries of one forward may read, and how they fall into runs that share their keys.

A *column* is a place in the keys that attention is given, a *slot* a query of the forward. Nothing here is of the size
[query, key] unless the mask that was given is: a causal mask is two numbers per row.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor


class Sight(ABC):
    """valid `[batch, key]` bool: real keys; real `[batch, query]` bool: real queries; plain: makes the mask that the
    model's own attention takes, or None. parts: the names of its tensors."""

    parts: ClassVar[tuple[str, ...]] = ("valid", "real")

    def __init__(self, valid: Tensor, real: Tensor, plain: Callable[[], Any]):
        self.valid, self.real, self._plain = valid, real, plain
        self._runs: dict[int, Runs] = {}
        self._elsewhere: dict[torch.device, Sight] = {}
        self.prompt: tuple[Tensor, Tensor] | None = None

    @property
    @abstractmethod
    def begins(self) -> bool:
        """Whether nothing stands before the queries."""

    @property
    @abstractmethod
    def filled(self) -> Tensor:
        """`[batch, key]` bool: the real keys up to the last query."""

    @cached_property
    def plain(self) -> Any:
        """The mask for the model's own attention."""
        return self._plain()

    def on(self, device: torch.device) -> Sight:
        """The same on another device, where a policy chooses among keys that lie there; made once."""
        if device == self.valid.device:
            return self
        if device not in self._elsewhere:
            made = self._elsewhere[device] = copy.copy(self)
            made._runs, made._elsewhere = {}, {}
            for name in self.parts:
                setattr(made, name, getattr(self, name).to(device))
        return self._elsewhere[device]

    @property
    def keys(self) -> int:
        return self.valid.shape[1]

    @property
    def queries(self) -> int:
        return self.real.shape[1]

    def runs(self, length: int) -> Runs:
        """The queries in runs of `length`, which begin at each row's first real query."""
        length = max(min(length, self.queries), 1)
        if length not in self._runs:
            self._runs[length] = Runs(self, length)
        return self._runs[length]

    @abstractmethod
    def seen(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """`[batch, run, key]`: keys that some query of a run may read, and keys before the run that all may; slots
        `[batch, run, query]`, -1 where there is none."""

    @abstractmethod
    def reads(self, slots: Tensor, index: Tensor) -> Tensor:
        """`[batch, group, run, query, chosen]`: whether each query may read each chosen column of its run."""


class Causal(Sight):
    """Every query reads the real keys up to its own column, which is that of the first query and its slot."""

    def __init__(self, valid: Tensor, first: int, queries: int, plain: Callable[[], Any]):
        super().__init__(valid, valid[:, first : first + queries], plain)
        self.first = first

    @property
    def begins(self) -> bool:
        return self.first == 0

    @property
    def filled(self) -> Tensor:
        return self.valid[:, : self.first + self.queries]

    def seen(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        column = torch.arange(self.keys, device=self.valid.device)
        last = (slots.amax(-1) + self.first)[..., None]
        first = (slots[..., 0] + self.first)[..., None]
        return self.valid[:, None] & (column <= last), self.valid[:, None] & (column < first)

    def reads(self, slots: Tensor, index: Tensor) -> Tensor:
        rows = torch.arange(len(index), device=index.device)[:, None, None, None]
        real = self.valid[rows, index.clamp(min=0)] & (index >= 0)
        return real[:, :, :, None] & (index[:, :, :, None] <= (slots + self.first)[:, None, :, :, None])


class Masked(Sight):
    """Queries read what a mask `[batch, 1, query, key]` lets them, bool or added to the scores; given: the mask as the
    model's own attention takes it."""

    parts: ClassVar[tuple[str, ...]] = ("valid", "real", "mask")

    def __init__(self, mask: Tensor, real: Tensor | None, given: Any):
        seen = (mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2)[:, 0]
        real = seen.any(-1) if real is None else real & seen.any(-1)
        super().__init__((seen & real[..., None]).any(1), real, lambda: given)
        self.mask = seen

    @cached_property
    def begins(self) -> bool:
        return self.keys == self.queries or bool((self.valid.sum(-1) == self.real.sum(-1)).all())

    @property
    def filled(self) -> Tensor:
        return self.valid

    def _of(self, slots: Tensor) -> Tensor:
        """`[batch, run, query, key]`, all False where there is no query."""
        rows = torch.arange(len(slots), device=slots.device)[:, None, None]
        return self.mask[rows, slots.clamp(min=0)] & (slots >= 0)[..., None]

    def seen(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        seen = self._of(slots)
        column = torch.arange(self.keys, device=seen.device)
        own = (seen[:, :, 0] * column).amax(-1, keepdim=True)  # a token is the last one that it sees
        return seen.any(2), (seen | (slots < 0)[..., None]).all(2) & seen.any(2) & (column < own)

    def reads(self, slots: Tensor, index: Tensor) -> Tensor:
        seen = self._of(slots)[:, None].expand(-1, index.shape[1], -1, -1, -1)
        where = index.clamp(min=0)[:, :, :, None].expand(-1, -1, -1, slots.shape[-1], -1)
        return seen.gather(-1, where) & (index >= 0)[:, :, :, None]


class Runs:
    """Queries in runs of `length`. slots `[batch, run, query]`: which query of the forward stands there, -1 for none;
    some and all `[batch, run, key]`: keys that some query of the run may read, those before it that all may."""

    def __init__(self, sight: Sight, length: int):
        self.sight, self.length = sight, length
        real, device = sight.real, sight.real.device
        rows, queries = real.shape
        count = -(-queries // length)
        order = torch.arange(count * length, device=device).expand(rows, -1)
        leads = real.int().argmax(-1, keepdim=True)  # 0 for a row without a real query
        self.aligned = queries == count * length and (queries == 1 or not bool(leads.any()))
        slots = order + leads
        inside = slots < queries
        slots = torch.where(inside, slots, -1)
        inside = inside & real.gather(1, slots.clamp(min=0))
        self.slots = torch.where(inside, slots, -1).view(rows, count, length)
        if queries == 1:  # a row that is padding in a decoding step still has its one slot
            self.slots = self.slots.clamp(min=0)
        self.real = self.slots >= 0
        self.some, self.all = sight.seen(self.slots)
        self._kept: dict[tuple[int, int, bool], Kept] = {}

    @property
    def count(self) -> int:
        return self.slots.shape[1]

    @property
    def decoding(self) -> bool:
        """Whether this is the next token of each row of a text that grows column by column."""
        return isinstance(self.sight, Causal) and self.sight.queries == 1

    def split(self, queries: Tensor) -> Tensor:
        """`[batch, heads, query, dim]` -> `[batch, heads, run, query, dim]`, zeros where there is no query."""
        rows, heads, _, dim = queries.shape
        if self.aligned:
            return queries.view(rows, heads, self.count, self.length, dim)
        where = self.slots.clamp(min=0).view(rows, 1, -1, 1).expand(-1, heads, -1, dim)
        picked = queries.gather(2, where).view(rows, heads, self.count, self.length, dim)
        return picked.masked_fill(~self.real[:, None, :, :, None], 0)

    def join(self, out: Tensor) -> Tensor:
        """`[batch, heads, run, query, dim]` -> `[batch, heads, query, dim]`, zeros at padding."""
        rows, heads, _, _, dim = out.shape
        flat = out.flatten(2, 3)
        if self.aligned:
            return flat
        joined = flat.new_zeros(rows, heads, self.sight.queries + 1, dim)  # the last one takes what is no query
        where = torch.where(self.real, self.slots, self.sight.queries).view(rows, 1, -1, 1).expand(-1, heads, -1, dim)
        return joined.scatter(2, where, flat)[:, :, :-1]

    def kept(self, sinks: int, recent: int, each: bool = False) -> Kept:
        """The keys that every run keeps: its first `sinks`, its last `recent`, and those that not all of it sees; with
        `each` the last `recent` of each of its queries."""
        if (sinks, recent, each) not in self._kept:
            self._kept[sinks, recent, each] = Kept(self, sinks, recent, each)
        return self._kept[sinks, recent, each]


class Kept:
    """index `[batch, run, kept]` columns in order, -1 for none; candidates `[batch, run, key]` bool: those between, of
    which a method chooses; counts `[batch, run]` how many, most the largest of these; later: with `each`, so many more
    at most are between for a later query of a run."""

    def __init__(self, runs: Runs, sinks: int, recent: int, each: bool = False):
        self.later = runs.length - 1 if each else 0
        recent += self.later if recent else 0
        some = runs.some
        rank = some.int().cumsum(-1)
        total = rank[..., -1:]
        kept = some & ((rank <= sinks) | (rank > total - recent) | ~runs.all)
        self.candidates = some & ~kept
        self.counts = self.candidates.sum(-1)
        self.most = int(self.counts.max()) if self.counts.numel() else 0
        self.index = packed(kept)
        self.rank = rank
        self.worked_out: dict[Any, Any] = {}  # by policies, for all layers of the forward

    @cached_property
    def span(self) -> tuple[int, int, bool]:
        """The first column that is a candidate of some run, that behind the last, and whether each run has all between:
        then nothing of them has to be masked."""
        columns = self.candidates.flatten(0, 1).any(0).nonzero()
        low, stop = (int(columns[0]), int(columns[-1]) + 1) if len(columns) else (0, 0)
        return low, stop, bool((self.counts == stop - low).all())


def packed(chosen: Tensor) -> Tensor:
    """`[..., key]` bool -> `[..., slot]` columns that are True, in order, then -1; as wide as the fullest needs."""
    flat = chosen.flatten(0, -2)
    counts = flat.sum(-1)
    width = int(counts.max()) if len(counts) else 0
    row, column = flat.nonzero(as_tuple=True)
    index = torch.full((len(flat), width), -1, dtype=torch.long, device=flat.device)
    starts = counts.cumsum(0) - counts
    index[row, torch.arange(len(row), device=flat.device) - starts[row]] = column
    return index.view(*chosen.shape[:-1], width)
