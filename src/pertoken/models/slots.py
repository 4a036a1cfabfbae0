"""Key/value cache of a canvas: one slot per position, rewritten whenever that position is computed again."""

from __future__ import annotations

import torch
from torch import Tensor

from pertoken.models.adapter import Adapter
from pertoken.models.cache import WORTH_PACKING, Packing


class SlotCache:
    """buffer `[layer, 2, row, kv_head, slot, head_dim]`; one slot more than the canvas has columns takes padding.

    `open` says which columns the next forward computes; keys and values of the others stay as they were. After
    `keep_queries` there are also queries `[layer, row, head, slot, head_dim]`, scaled; cap, the bound of the scores in
    families that have one; observed, the layers whose queries were seen.
    """

    is_compileable = False

    def __init__(self, adapter: Adapter, rows: int, columns: int):
        shape = (adapter.depth, 2, rows, adapter.kv_heads, columns + 1, adapter.head_dim)
        self.buffer = torch.zeros(shape, dtype=adapter.dtype, device=adapter.device)
        self.queries: Tensor | None = None
        self.cap: float | None = None
        self.observed: set[int] = set()
        self.read = columns
        self.whole = True
        self.rows: Tensor | None = None
        self.slots = torch.zeros(0)
        self.packing: Packing | None = None

    def keep_queries(self, heads: int) -> None:
        """Keep the queries of every position too, from the next forward on."""
        layers, _, rows, _, slots, dim = self.buffer.shape
        self.queries = self.buffer.new_zeros(layers, rows, heads, slots, dim)

    @property
    def heads(self) -> int:
        """Heads of the queries that are kept, 0 without."""
        return 0 if self.queries is None else self.queries.shape[2]

    @property
    def columns(self) -> int:
        return self.buffer.shape[4] - 1

    @property
    def capacity(self) -> int:
        """No position is this large."""
        return self.columns

    def open(self, columns: Tensor, valid: Tensor, read: int, rows: Tensor | None = None) -> None:
        """Direct the next writes to `columns` `[row, query]` where `valid`; attention reads the first `read` slots.

        rows: the block is of these rows only, and reads and writes those; None: of all.
        """
        count, width = columns.shape
        self.read, self.rows = read, rows
        self.whole = rows is None and width == read and bool(valid.all())
        slots = columns.masked_fill(~valid, self.columns)
        if rows is None:
            slots = slots[:, None, :, None].expand(count, self.buffer.shape[3], width, self.buffer.shape[5])
        self.slots = slots
        sparse = count > 1 and int(valid.sum()) < WORTH_PACKING * valid.numel()
        self.packing = Packing(valid) if sparse else None

    def update(
        self,
        keys: Tensor,
        values: Tensor,
        layer_idx: int,
        *_: object,
        queries: Tensor | None = None,
        scaling: float = 1.0,
        **__: object,
    ) -> tuple[Tensor, Tensor]:
        """transformers' cache protocol: write into the open slots, return all slots that are read. queries: from layers
        that show them here."""
        layer = self.buffer[layer_idx]
        for kept, new in zip(layer, (keys, values), strict=True):
            self._write(kept, new)
        if queries is not None and self.queries is not None:
            self.observe(layer_idx, queries * scaling)
        if self.rows is not None:
            layer = layer[:, self.rows]
        return layer[0, :, :, : self.read], layer[1, :, :, : self.read]

    def observe(self, layer_idx: int, queries: Tensor, cap: float | None = None) -> None:
        """Keep the scaled queries `[row, head, query, head_dim]` of the open block."""
        assert self.queries is not None
        self._write(self.queries[layer_idx], queries)
        self.observed.add(layer_idx)
        self.cap = cap

    def _write(self, kept: Tensor, new: Tensor) -> None:
        if self.whole:
            kept[:, :, : self.read] = new
        elif self.rows is not None:
            kept[self.rows[:, None], :, self.slots] = new.transpose(1, 2)
        else:
            slots = self.slots
            if slots.shape != new.shape:
                slots = slots[:, :1].expand(new.shape)
            kept.scatter_(2, slots, new)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def select_rows(self, rows: Tensor) -> None:
        """Keep only these rows, in this order."""
        self.buffer = self.buffer[:, :, rows]
        if self.queries is not None:
            self.queries = self.queries[:, rows]


def mask(valid: Tensor, positions: Tensor, own: Tensor, read: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """Additive mask `[row, 1, query, column]`: queries at positions `own` `[row, query]` read all valid positions
    `[row, column]`, within `window` of their own where there is one."""
    seen = valid[:, None, :read].expand(-1, own.shape[1], -1)
    if window is not None:
        seen = seen & ((own[..., None] - positions[:, None, :read]).abs() < window)
    empty = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return empty.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]
