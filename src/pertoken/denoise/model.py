"""A bidirectional model over a canvas: computes chosen positions against kept keys, values and outputs of the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from pertoken.denoise.canvas import Canvas
from pertoken.models.adapter import Adapter
from pertoken.models.slots import SlotCache
from pertoken.models.stack import stack_of


class DiffusionModel:
    """Keys, values and outputs of every position as last computed.

    shift: the output at column c - shift predicts the token at c. outputs `[row, column, width]`: un-normed hidden
    states of the last layer.
    """

    def __init__(self, adapter: Adapter, canvas: Canvas, shift: int):
        self.stack, self.shift = stack_of(adapter.model), shift
        self.cache = SlotCache(adapter, canvas.rows, canvas.width)
        self.known = torch.zeros_like(canvas.valid)
        self.outputs: Tensor | None = None

    def forward(self, canvas: Canvas, planned: Tensor) -> Tensor:
        """Compute the planned positions and those whose outputs predict them; `[row, column]` of what was computed.

        A position that was never computed is computed whatever the plan says.
        """
        wanted = planned | (canvas.valid & ~self.known)
        if self.shift:
            wanted = wanted | torch.nn.functional.pad(wanted[:, self.shift :], (0, self.shift))
        wanted &= canvas.valid
        read = int(canvas.valid.any(0).nonzero().max()) + 1
        count = wanted.sum(-1)
        width = int(count.max())
        if width == read:
            columns = canvas.columns[:read].expand(canvas.rows, -1)
            real = wanted[:, :read]
        else:
            columns = wanted.int().argsort(dim=-1, descending=True, stable=True)[:, :width]
            real = torch.arange(width, device=columns.device) < count[:, None]
        positions = canvas.positions.gather(1, columns).masked_fill(~real, 0)
        self.cache.open(columns, real, read)
        self.stack.announce(real)
        hidden = self.stack.embed(canvas.ids.gather(1, columns), positions)
        masks = {w: self._mask(canvas, positions, read, w, hidden.dtype) for w in set(self.stack.windows)}
        hidden = self.stack.run(hidden, positions, self.cache, masks, 0, self.stack.adapter.depth)
        if self.outputs is None:
            self.outputs = hidden.new_zeros(canvas.rows, canvas.width, hidden.shape[-1])
        if width == read:
            self.outputs[:, :read] = torch.where(real[..., None], hidden, self.outputs[:, :read])
        else:
            row, query = real.nonzero(as_tuple=True)
            self.outputs[row, columns[row, query]] = hidden[row, query]
        self.known |= wanted
        return wanted

    def _mask(self, canvas: Canvas, positions: Tensor, read: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """Additive mask `[row, 1, query, column]`: every query reads all valid positions, within `window` of its own on
        layers that have one."""
        seen = canvas.valid[:, None, :read].expand(-1, positions.shape[1], -1)
        if window is not None:
            distance = (positions[..., None] - canvas.positions[:, None, :read]).abs()
            seen = seen & (distance < window)
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)[
            :, None
        ]

    def logits(self, places: Tensor) -> Tensor:
        """Logits `[row, place, vocabulary]` for the tokens at columns `places` `[row, place]`."""
        assert self.outputs is not None
        sources = (places - self.shift).clamp(min=0)
        return self.stack.logits(self.outputs.gather(1, sources[..., None].expand(-1, -1, self.outputs.shape[-1])))

    def logits_at(self, row: Tensor, column: Tensor) -> Tensor:
        """Logits `[position, vocabulary]` for the tokens at these rows and columns."""
        assert self.outputs is not None
        return self.stack.logits(self.outputs[row, (column - self.shift).clamp(min=0)])

    def select(self, rows: Tensor) -> None:
        """Keep only these rows."""
        self.cache.select_rows(rows)
        self.known = self.known[rows]
        if self.outputs is not None:
            self.outputs = self.outputs[rows]
