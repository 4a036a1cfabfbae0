"""Key/value cache of an encoder whose layers differ in heads and widths, for a decoder that only reads it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Slots:
    """Keys and values `[row, kv_head, column, dim]` of one layer, as the decoder reads them."""

    keys: Tensor
    values: Tensor

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device):
        self.buffer = torch.zeros((2, *shape), dtype=dtype, device=device)


class EncoderCache:
    """What the encoder has read, one slot per column of the canvas and one more for padding: transformers' cache
    protocol, as far as this model uses it."""

    is_compileable = False

    def __init__(self, text: Any, rows: int, columns: int, dtype: torch.dtype, device: torch.device):
        self.layers = []
        for index in range(text.num_hidden_layers):
            own = text.per_layer_config[index]
            shape = (rows, own.num_key_value_heads, columns + 1, own.head_dim)
            self.layers.append(Slots(shape, dtype, device))
        self.columns = columns
        self.rows = self.slots = torch.zeros(0)
        self.read = 0

    def write_at(self, rows: Tensor, columns: Tensor, real: Tensor, read: int) -> None:
        """Direct the next writes of these rows to `columns` `[row, query]` where `real`; they read the first `read`."""
        self.rows, self.read = rows, read
        self.slots = columns.masked_fill(~real, self.columns)

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        layer = self.layers[layer_idx].buffer
        place = self.rows[:, None], slice(None), self.slots
        layer[0][place], layer[1][place] = keys.transpose(1, 2), values.transpose(1, 2)
        return layer[0, self.rows, :, : self.read], layer[1, self.rows, :, : self.read]

    def show(self, read: int) -> None:
        """Let the decoder read the first `read` columns of all rows."""
        for layer in self.layers:
            layer.keys, layer.values = layer.buffer[0, :, :, :read], layer.buffer[1, :, :, :read]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.read

    def select(self, rows: Tensor) -> None:
        for layer in self.layers:
            layer.buffer = layer.buffer[:, rows]
