"""A cache that holds merged tokens once and still counts every position at which they stand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from pertoken.core.errors import BadRequest


@dataclass(frozen=True)
class Book:
    """Which token stands where. columns `[row, position]` int64: its column in the cache, -1 for none; positions
    `[row, position]`: as the model counts them; real `[row, column]` bool: columns that hold a token."""

    columns: Tensor
    positions: Tensor
    real: Tensor

    @property
    def length(self) -> int:
        """Positions so far, those of padding and of dropped tokens included."""
        return self.columns.shape[1]

    @property
    def held(self) -> int:
        """Columns of the cache."""
        return self.real.shape[1]

    def then(self, other: Book) -> Book:
        """This one, and after it another, whose columns begin where this one's end."""
        columns = torch.where(other.columns < 0, -1, other.columns + self.held)
        pairs = ((self.columns, columns), (self.positions, other.positions), (self.real, other.real))
        return Book(*(torch.cat(pair, 1) for pair in pairs))

    def each(self, pick: Callable[[Tensor], Tensor]) -> Book:
        """With another choice of rows."""
        return Book(pick(self.columns), pick(self.positions), pick(self.real))

    def without(self, count: int) -> Book:
        """Before its last `count` positions; raises `BadRequest` if one of them is not a token of its own."""
        kept = Book(self.columns[:, :-count], self.positions[:, :-count], self.real[:, :-count])
        wanted = torch.arange(self.held - count, self.held, device=self.columns.device)
        if count > self.held or not bool((self.columns[:, -count:] == wanted).all()):
            raise BadRequest(
                f"the last {count} tokens cannot be taken back: image tokens among them were merged. Keep the cache of "
                "before, or take back text only"
            )
        return kept


class CompactLayer(DynamicLayer):
    """keys and values `[row, kv_heads, column, dim]`, not turned, a column for each token; book: where they stand.

    From outside its length is that of the text with all its image tokens; `inside`, while the model runs on merged
    tokens, it is the number of columns.
    """

    def __init__(self) -> None:
        super().__init__()
        self.book: Book | None = None
        self.inside = False

    def get_seq_length(self) -> int:
        if self.book is None or self.inside:
            return super().get_seq_length()
        return self.book.length

    @property
    def bytes(self) -> int:
        """Of keys and values, and of the book's share."""
        if self.book is None or self.keys is None or self.values is None:
            return 0
        held = (self.keys, self.values, self.book.columns, self.book.positions, self.book.real)
        return sum(t.numel() * t.element_size() for t in held)

    def crop(self, tokens_to_remove: int) -> None:
        if self.book is not None and tokens_to_remove < 0:
            self.book = self.book.without(-tokens_to_remove)
        super().crop(tokens_to_remove)

    def _rows(self, pick: Callable[[Tensor], Tensor]) -> None:
        if self.book is not None:
            self.book = self.book.each(pick)

    def reorder_cache(self, beam_idx: Tensor) -> None:  # type: ignore[override]
        self._rows(lambda tensor: tensor[beam_idx.to(tensor.device)])
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]

    def batch_select_indices(self, indices: Tensor) -> None:
        self._rows(lambda tensor: tensor[indices.to(tensor.device)])
        super().batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rows(lambda tensor: tensor.repeat_interleave(repeats, 0))
        super().batch_repeat_interleave(repeats)

    def reset(self) -> None:
        super().reset()
        self.book = None


def compact_layers(cache: Any, layers: int) -> list[CompactLayer]:
    """The layers of a cache, made compact while it is empty; raises `BadRequest` where they cannot be."""
    while len(cache.layers) < layers and getattr(cache, "layer_class_to_replicate", None) is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    found = []
    for index in range(layers):
        layer = cache.layers[index]
        if type(layer) is DynamicLayer and not layer.get_seq_length():
            layer = cache.layers[index] = CompactLayer()
        elif not isinstance(layer, CompactLayer):
            raise BadRequest(
                f"image tokens are merged in a DynamicCache that begins with them; layer {index} of this cache is a "
                f"{type(layer).__name__} of length {layer.get_seq_length()}. Give past_key_values=DynamicCache(), or "
                "none, and the images in the first forward"
            )
        found.append(layer)
    return found
