"""A cache layer that appends in place: a step writes one token, where transformers' copies all keys and values. It can
hold them elsewhere than on the model's device, in host memory, for an attention that fetches what it reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from pertoken.core.errors import BadRequest

SLACK = 8  # a layer that is full makes room for an eighth more
LEAST = 64


class Room:
    """keys and values `[batch, kv_heads, capacity, dim]`, of which the first `used` columns were written, by the one
    layer that holds them or by one that was copied from it."""

    def __init__(self, keys: Tensor, values: Tensor, stop: int):
        self.used = 0
        pinned = keys.device.type == "cpu" and torch.cuda.is_available()
        shape = lambda x: (*x.shape[:2], stop + max(stop // SLACK, LEAST), x.shape[3])  # noqa: E731
        self.keys, self.values = (x.new_empty(shape(x), pin_memory=pinned) for x in (keys, values))

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
    taken back, reordered or copied moves to a room of its own when it next grows.

    home: the device that keys and values lie on, None for that of the model; attended: the attention that runs fetches
    what it reads from there. Any other gets copies of all of them on its own device.
    """

    def __init__(self, home: str | torch.device | None = None) -> None:
        super().__init__()
        self.room: Room | None = None
        self.home = None if home is None else torch.device(home)
        self.attended = False

    @classmethod
    def of(cls, layer: DynamicLayer, home: str | torch.device | None = None) -> GrowingLayer:
        """What `layer` holds."""
        made = cls(home)
        if layer.is_initialized and layer.keys is not None and layer.values is not None:
            keys, values = (x if made.home is None else x.to(made.home) for x in (layer.keys, layer.values))
            made.lazy_initialization(keys, values)
            made.keys, made.values = keys, values
        return made

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As `DynamicLayer`; keys that a gradient goes through are put together as it does."""
        held, near = self.get_seq_length(), key_states.device
        parts = (key_states, value_states, self.keys) if held else (key_states, value_states)
        tracked = any(part is not None and part.requires_grad for part in parts)
        if self.home is None and (tracked or not held):
            return super().update(key_states, value_states, *args, **kwargs)
        if self.home is not None:
            if tracked:
                raise BadRequest(
                    f"keys that lie on {self.home} take no gradient; run the model under torch.no_grad(), or attach "
                    "the policy with offload=False"
                )
            key_states, value_states = key_states.to(self.home), value_states.to(self.home)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        stop, room = held + key_states.shape[2], self.room
        if room is None or not room.ends(self.keys) or stop > room.keys.shape[2]:
            room = self.room = Room(key_states, value_states, stop)
            if held:
                room.put(self.keys, self.values)
        room.put(key_states, value_states)
        keys, values = self.keys, self.values = room.keys[:, :, :stop], room.values[:, :, :stop]
        return (keys, values) if self.attended else (keys.to(near), values.to(near))

    def batch_select_indices(self, indices: Tensor) -> None:
        """As `DynamicLayer`, of indices on any device."""
        super().batch_select_indices(indices.to(self.keys.device) if self.keys is not None else indices)

    def reset(self) -> None:
        super().reset()
        self.room = None


def let_grow(cache: Any) -> None:
    """Make the plain layers of a `DynamicCache` that hold tokens append in place; leaves other caches as they are."""
    if type(cache) is DynamicCache and not cache.offloading:
        for at, layer in enumerate(cache.layers):
            if type(layer) is DynamicLayer and layer.get_seq_length():
                cache.layers[at] = GrowingLayer.of(layer)
