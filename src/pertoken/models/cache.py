"""Key/value cache for ragged rows and token trees: one buffer for all layers, written in place, compacted in one move.

Columns `0..base` hold committed tokens (with `valid` False where a row has padding or a hole); columns from `base` on
are provisional: they hold the nodes of a tree until `commit` keeps the accepted path of each row. Positions are stored
per column, so that a hole costs nothing but memory; `commit` closes holes when they pass a quarter of the columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pertoken.models.adapter import Adapter

GROWTH = 1.5
# On a CPU, products in half precision are compiled once per shape: reading a multiple of columns repeats the shapes.
LOW_PRECISION_MULTIPLE = 64
WORTH_PACKING = 0.9  # share of real tokens in a block below which moving them together saves time


class Packing:
    """The real tokens of a padded block `[row, token]` side by side, for what acts on single tokens."""

    def __init__(self, valid: Tensor):
        self.shape = valid.shape
        self.index = valid.flatten().nonzero().flatten()

    def pack(self, padded: Tensor) -> Tensor:
        """`[row, token, ...]` -> `[1, real token, ...]`."""
        return padded.flatten(0, 1)[None, self.index]

    def unpack(self, packed: Tensor) -> Tensor:
        """`[1, real token, ...]` -> `[row, token, ...]`, zeros at the padding."""
        padded = packed.new_zeros(self.shape.numel(), *packed.shape[2:])
        return padded.index_copy_(0, self.index, packed[0]).view(*self.shape, *packed.shape[2:])


class TreeCache:
    """buffer `[layer, 2, row, kv_head, column, head_dim]`; valid and positions `[row, column]`; prompt `[row]`: how
    many tokens of each row were given and not generated, None where that is not known; notes `[row, column, note]` int:
    what a policy keeps for each token, moved with its column, -1 where nothing is."""

    is_compileable = False

    def __init__(self, adapter: Adapter, rows: int, capacity: int = 256):
        shape = (adapter.depth, 2, rows, adapter.kv_heads, capacity, adapter.head_dim)
        self.buffer = torch.zeros(shape, dtype=adapter.dtype, device=adapter.device)
        self.valid = torch.zeros(rows, capacity, dtype=torch.bool, device=adapter.device)
        self.positions = torch.zeros(rows, capacity, dtype=torch.long, device=adapter.device)
        self.base = 0
        self.columns = slice(0, 0)
        self.packing: Packing | None = None
        self.prompt: Tensor | None = None
        self.notes: Tensor | None = None
        self.dense = True
        low = adapter.dtype in (torch.bfloat16, torch.float16) and adapter.device.type == "cpu"
        self.multiple = LOW_PRECISION_MULTIPLE if low else 1

    @property
    def rows(self) -> int:
        return self.buffer.shape[2]

    @property
    def capacity(self) -> int:
        return self.buffer.shape[4]

    @property
    def read(self) -> int:
        """How many columns attention reads: up to the open ones, and the masked rest of a multiple."""
        return min(-(-self.columns.stop // self.multiple) * self.multiple, self.capacity)

    def open(self, start: int, positions: Tensor, valid: Tensor | None = None) -> None:
        """Direct the next writes to the columns from `start` on, one per position of `positions` `[row, token]`.

        valid `[row, token]`: which tokens are real; a block with enough padding gets a `packing`.
        """
        stop = start + positions.shape[1]
        sparse = valid is not None and valid.shape[0] > 1 and int(valid.sum()) < WORTH_PACKING * valid.numel()
        self.packing = Packing(valid) if sparse and valid is not None else None
        if stop > self.capacity:
            self._grow(stop)
        self.columns = slice(start, stop)
        self.positions[:, start:stop] = positions

    def _grow(self, needed: int) -> None:
        extra = max(int(GROWTH * self.capacity), needed) - self.capacity
        pad = torch.nn.functional.pad
        self.buffer = pad(self.buffer, (0, 0, 0, extra))
        self.valid, self.positions = pad(self.valid, (0, extra)), pad(self.positions, (0, extra))
        self.notes = None if self.notes is None else pad(self.notes, (0, 0, 0, extra), value=-1)

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """transformers' cache protocol: write into the open columns, return everything that is read."""
        layer = self.buffer[layer_idx]
        layer[0, :, :, self.columns] = keys
        layer[1, :, :, self.columns] = values
        return layer[0, :, :, : self.read], layer[1, :, :, : self.read]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns.start

    def mask(self, allow: Tensor | None, window: int | None = None) -> Tensor | None:
        """Additive mask `[row, 1, query, column]` for queries in the open columns, None if every query sees everything.

        allow `[row, query, provisional column]` bool says which columns from `base` on each query sees (itself
        included); None stands for a chain of one query. All valid committed columns are seen; `window` limits by
        position.
        """
        stop, queries = self.columns.stop, self.columns.stop - self.columns.start
        if self.dense and allow is None and window is None and stop == self.read:
            return None
        if allow is None:
            allow = self.valid.new_ones(self.rows, queries, stop - self.base)
        seen = torch.cat([self.valid[:, None, : self.base].expand(-1, queries, -1), allow], -1)
        if window is not None:
            distance = self.positions[:, self.columns, None] - self.positions[:, None, :stop]
            seen = seen & (distance < window)
        if stop < self.read:
            seen = torch.nn.functional.pad(seen, (0, self.read - stop))
        dtype = self.buffer.dtype
        mask = torch.full_like(seen, torch.finfo(dtype).min, dtype=dtype).masked_fill_(seen, 0)
        return mask[:, None]

    def commit(self, kept: Tensor, counts: Tensor, longest: int) -> None:
        """Keep, of the provisional columns, `kept[row, :counts[row]]` (absolute columns, in order); drop the rest.

        kept `[row, slot]` with `longest` slots in use by the longest row. Rows that keep fewer get holes.
        """
        base = self.base
        if longest:
            ragged = self.rows > 1
            kept = kept[:, :longest]
            if not ragged:
                if int(kept[0, -1]) != base + longest - 1:
                    self.buffer[:, :, :, :, base : base + longest] = self.buffer.index_select(4, kept[0])
                    self.positions[:, base : base + longest] = self.positions[:, kept[0]]
                    if self.notes is not None:
                        self.notes[:, base : base + longest] = self.notes[:, kept[0]]
                self.valid[:, base : base + longest] = True
            else:
                self._gather(kept, base)
                slots = torch.arange(longest, device=counts.device)
                self.valid[:, base : base + longest] = slots < counts[:, None]
        self.base = base + longest
        if self.rows > 1:
            self._close_holes()

    def _gather(self, columns: Tensor, start: int) -> None:
        index = columns[None, None, :, None, :, None]
        shape = (*self.buffer.shape[:4], columns.shape[1], self.buffer.shape[5])
        stop = start + columns.shape[1]
        self.buffer[:, :, :, :, start:stop] = self.buffer.gather(4, index.expand(shape))
        self.positions[:, start:stop] = self.positions.gather(1, columns)
        if self.notes is not None:
            self.notes[:, start:stop] = self.notes.gather(1, columns[..., None].expand(-1, -1, self.notes.shape[-1]))

    def _close_holes(self) -> None:
        filled = self.valid[:, : self.base].sum(-1)
        longest = int(filled.max())
        self.dense = longest == self.base and bool((filled == longest).all())
        if self.base - longest <= self.base // 4:
            return
        order = self.valid[:, : self.base].int().argsort(dim=-1, descending=True, stable=True)[:, :longest]
        self._gather(order, 0)
        self.valid[:, : self.base] = False
        self.valid[:, :longest] = torch.arange(longest, device=filled.device) < filled[:, None]
        self.base = longest
        self.dense = bool((filled == longest).all())

    def select_rows(self, rows: Tensor) -> None:
        """Keep only these rows, in this order."""
        self.buffer = self.buffer[:, :, rows]
        self.valid, self.positions = self.valid[rows], self.positions[rows]
        self.prompt = None if self.prompt is None else self.prompt[rows]
        self.notes = None if self.notes is None else self.notes[rows]
        if self.base:
            self._close_holes()
