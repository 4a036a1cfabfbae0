"""A cache layer that appends in place: a step writes one token, where transformers' copies all keys and values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

SLACK = 8  # a layer that is full makes room for an eighth more
LEAST = 64


class Room:
    """keys and values `[batch, kv_heads, capacity, dim]`, of which the first `used` columns were written, by the one
    layer that holds them or by one that was copied from it."""

    def __init__(self, keys: Tensor, values: Tensor, stop: int):
        self.used = 0
        shape = lambda x: (*x.shape[:2], stop + max(stop // SLACK, LEAST), x.shape[3])  # noqa: E731
        self.keys, self.values = keys.new_empty(shape(keys)), values.new_empty(shape(values))

    def put(self, keys: Tensor, values: Tensor) -> None:
        """Write the next columns."""
        stop = self.used + keys.shape[2]
        self.keys[:, :, self.used : stop] = keys
        self.values[:, :, self.used : stop] = values
        self.used = stop

    def ends(self, keys: Tensor) -> bool:
        """Whether `keys` are all that was written here, and more can be."""
        if self.keys.is_inference() and not torch.is_inference_mode_enabled():
            return False
        mine = self.keys.data_ptr() == keys.data_ptr() and self.keys.stride() == keys.stride()
        return mine and keys.shape[2] == self.used and keys.shape[0] == self.keys.shape[0]


class GrowingLayer(DynamicLayer):
    """A `DynamicLayer` with room for more. Nothing is written where another layer can see it: a layer whose tokens were
    taken back, reordered or copied moves to a room of its own when it next grows."""

    def __init__(self) -> None:
        super().__init__()
        self.room: Room | None = None

    @classmethod
    def of(cls, layer: DynamicLayer) -> GrowingLayer:
        """What `layer` holds."""
        made = cls()
        if layer.is_initialized and layer.keys is not None and layer.values is not None:
            made.lazy_initialization(layer.keys, layer.values)
            made.keys, made.values = layer.keys, layer.values
        return made

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As `DynamicLayer`; keys that a gradient goes through are put together as it does."""
        held = self.get_seq_length()
        if not held or key_states.requires_grad or value_states.requires_grad or self.keys.requires_grad:  # type: ignore[union-attr]
            return super().update(key_states, value_states, *args, **kwargs)
        assert self.keys is not None and self.values is not None
        stop, room = held + key_states.shape[2], self.room
        if room is None or not room.ends(self.keys) or stop > room.keys.shape[2]:
            room = self.room = Room(self.keys, self.values, stop)
            room.put(self.keys, self.values)
        room.put(key_states, value_states)
        self.keys, self.values = room.keys[:, :, :stop], room.values[:, :, :stop]
        return self.keys, self.values

    def reset(self) -> None:
        super().reset()
        self.room = None


def let_grow(cache: Any) -> None:
    """Make the plain layers of a `DynamicCache` that hold tokens append in place; leaves other caches as they are."""
    if type(cache) is DynamicCache and not cache.offloading:
        for at, layer in enumerate(cache.layers):
            if type(layer) is DynamicLayer and layer.get_seq_length():
                cache.layers[at] = GrowingLayer.of(layer)
