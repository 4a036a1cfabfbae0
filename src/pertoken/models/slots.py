"""Key/value cache of a canvas: one slot per position, rewritten whenever that position is computed again."""

from __future__ import annotations

import torch
from torch import Tensor

from pertoken.models.adapter import Adapter
from pertoken.models.cache import WORTH_PACKING, Packing


class SlotCache:
    """buffer `[layer, 2, row, kv_head, slot, head_dim]`; one slot more than the canvas has columns takes padding.

    `open` says which columns the next forward computes; keys and values of the others stay as they were.
    """

    is_compileable = False

    def __init__(self, adapter: Adapter, rows: int, columns: int):
        shape = (adapter.depth, 2, rows, adapter.kv_heads, columns + 1, adapter.head_dim)
        self.buffer = torch.zeros(shape, dtype=adapter.dtype, device=adapter.device)
        self.read = columns
        self.whole = True
        self.slots = torch.zeros(0)
        self.packing: Packing | None = None

    @property
    def columns(self) -> int:
        return self.buffer.shape[4] - 1

    @property
    def capacity(self) -> int:
        """No position is this large."""
        return self.columns

    def open(self, columns: Tensor, valid: Tensor, read: int) -> None:
        """Direct the next writes to `columns` `[row, query]` where `valid`; attention reads the first `read` slots."""
        rows, width = columns.shape
        self.read = read
        self.whole = width == read and bool(valid.all())
        slots = columns.masked_fill(~valid, self.columns)[:, None, :, None]
        self.slots = slots.expand(rows, self.buffer.shape[3], width, self.buffer.shape[5])
        sparse = rows > 1 and int(valid.sum()) < WORTH_PACKING * valid.numel()
        self.packing = Packing(valid) if sparse else None

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """transformers' cache protocol: write into the open slots, return all slots that are read."""
        layer = self.buffer[layer_idx]
        for kept, new in zip(layer, (keys, values), strict=True):
            if self.whole:
                kept[:, :, : self.read] = new
            else:
                kept.scatter_(2, self.slots, new)
        return layer[0, :, :, : self.read], layer[1, :, :, : self.read]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def select_rows(self, rows: Tensor) -> None:
        """Keep only these rows, in this order."""
        self.buffer = self.buffer[:, :, rows]
