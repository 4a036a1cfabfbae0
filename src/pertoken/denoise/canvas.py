"""The canvas: every row's prompt and the positions that are still to be decided, as tensors `[row, column]`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NEVER = -(10**6)


@dataclass
class Canvas:
    """State of the active rows. Prompts end at column `start`; the canvas goes from there.

    ids: tokens, the mask token where undecided; valid: False on padding and behind a row's end; masked: undecided;
    decided_at: the row's step at which a position was committed (`NEVER` for the prompt); step: forwards so far of each
    row; block_step: of these, in the row's present block; block_places: undecided positions that this block began with;
    size: positions per block; numbers: the rows' places in the batch; sliding: the block is the row's first so many
    undecided positions (None: blocks of `size`).
    """

    ids: Tensor
    valid: Tensor
    masked: Tensor
    decided_at: Tensor
    step: Tensor
    block_step: Tensor
    block: Tensor
    block_places: Tensor
    start: int
    size: int
    numbers: list[int]
    sliding: int | None = None

    @classmethod
    def of(
        cls, ids: Tensor, mask: Tensor, length: int, size: int, mask_token: int, sliding: int | None = None
    ) -> Canvas:
        """A canvas of `length` undecided positions behind prompts `[row, token]` with attention mask `[row, token]`."""
        rows, start = ids.shape
        pad = torch.nn.functional.pad
        valid = pad(mask.bool(), (0, length), value=True)
        masked = torch.zeros_like(valid)
        masked[:, start:] = True
        zeros = torch.zeros(rows, dtype=torch.long, device=ids.device)
        return cls(
            pad(ids, (0, length), value=mask_token),
            valid,
            masked,
            torch.full_like(valid, NEVER, dtype=torch.long),
            zeros,
            zeros.clone(),
            zeros.clone(),
            torch.full_like(zeros, size),
            start,
            size,
            list(range(rows)),
            sliding,
        )

    @property
    def rows(self) -> int:
        return self.ids.shape[0]

    @property
    def width(self) -> int:
        return self.ids.shape[1]

    @property
    def positions(self) -> Tensor:
        """`[row, column]`, counted over valid columns only."""
        return (self.valid.long().cumsum(-1) - 1).clamp_(min=0)

    @property
    def columns(self) -> Tensor:
        return torch.arange(self.width, device=self.ids.device)

    @property
    def block_columns(self) -> Tensor:
        """`[row, place]` columns of each row's present block. A sliding block that has run short is filled up with
        decided columns."""
        if self.sliding is not None:
            return self.masked.int().argsort(dim=-1, descending=True, stable=True)[:, : self.sliding]
        first = self.start + self.block * self.size
        return first[:, None] + torch.arange(self.size, device=self.ids.device)

    @property
    def in_block(self) -> Tensor:
        """`[row, column]`: whether a column belongs to the row's present block."""
        if self.sliding is not None:
            return self.masked & (self.masked.long().cumsum(-1) <= self.sliding)
        return (self.columns >= self.start) & ((self.columns - self.start) // self.size == self.block[:, None])

    @property
    def decided_last(self) -> Tensor:
        """`[row, column]`: decided at the row's last step."""
        return self.decided_at == self.step[:, None] - 1

    def commit(self, chosen: Tensor, tokens: Tensor) -> None:
        """Decide the positions `chosen` `[row, column]`, which get `tokens` `[row, column]`."""
        self.ids = torch.where(chosen, tokens, self.ids)
        self.masked &= ~chosen
        self.decided_at = torch.where(chosen, self.step[:, None], self.decided_at)

    def cut(self, ends: Tensor, filler: int | Tensor) -> None:
        """End each row before column `ends` `[row]`: what lies behind is neither valid nor undecided any more."""
        behind = self.columns >= ends[:, None]
        self.ids = self.ids.masked_fill(behind & self.valid, filler)
        self.valid &= ~behind
        self.masked &= ~behind

    def fill(self, ends: Tensor, filler: int) -> None:
        """Decide as `filler` what is undecided from column `ends` `[row]` on; it stays in place."""
        self.commit(self.masked & (self.columns >= ends[:, None]), torch.full_like(self.ids, filler))

    def advance(self) -> None:
        """Count the step, and move rows whose block is decided to their first block that is not."""
        self.step = self.step + 1
        self.block_step = self.block_step + 1
        first = self.masked.int().argmax(-1)
        block = torch.where(self.masked.any(-1), (first - self.start) // self.size, self.block)
        same, self.block = block == self.block, block
        self.block_step = torch.where(same, self.block_step, torch.zeros_like(self.block_step))
        self.block_places = torch.where(same, self.block_places, (self.masked & self.in_block).sum(-1))

    def select(self, rows: Tensor) -> None:
        """Keep only these rows, in this order."""
        for name in ("ids", "valid", "masked", "decided_at", "step", "block_step", "block", "block_places"):
            setattr(self, name, getattr(self, name)[rows])
        self.numbers = [self.numbers[r] for r in rows.tolist()]
