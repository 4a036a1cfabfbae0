"""Whether a row of the cache is still the text for which something was worked out earlier.

A beam search reorders the rows of a cache, a decoder drops rows or takes tokens back, and none of them tells an
attached policy. So whatever is kept between forwards is kept with the last keys of that moment, and is used only while
the row still holds them, bit by bit. In all layers but the first a key depends on the whole text before it; in the
first, on its token and position, which is why there are several.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pertoken.attend.key_view import KeyView
from pertoken.attend.sight import Causal

MARKED = 8


@dataclass(frozen=True)
class Mark:
    """The last keys of each row at some moment. column `[batch]`: where the last one stood; keys `[batch, MARKED,
    kv_heads, dim]`."""

    column: Tensor
    keys: Tensor

    @classmethod
    def now(cls, view: KeyView) -> Mark:
        """Up to the last column of this forward."""
        sight = view.runs.sight
        assert isinstance(sight, Causal)
        column = torch.full((len(view.keys),), sight.first + sight.queries - 1, device=view.keys.device)
        return cls(column, _keys(view, column))

    def holds(self, view: KeyView) -> Tensor:
        """`[batch]` bool: which rows still hold these keys. As many rows as there were."""
        return (_keys(view, self.column) == self.keys).flatten(1).all(-1) & (self.column < view.keys.shape[2])

    def put(self, rows: Tensor, other: Mark) -> Mark:
        """With `rows` `[n]` as they are in `other`."""
        column, keys = self.column.clone(), self.keys.clone()
        column[rows], keys[rows] = other.column[rows], other.keys[rows]
        return Mark(column, keys)


def ends(prompt: Tensor) -> Tensor:
    """`[batch, MARKED]` the places of the last tokens of prompts of so many tokens `[batch]`."""
    return (prompt[:, None] + torch.arange(-MARKED, 0, device=prompt.device)).clamp(min=0)


def taken(keys: Tensor, columns: Tensor) -> Tensor:
    """`[batch, n, kv_heads, dim]` of keys `[batch, kv_heads, key, dim]` those at `columns` `[batch, n]`, the last one
    for what lies beyond it."""
    rows = torch.arange(len(columns), device=columns.device)[:, None]
    return keys.detach()[rows, :, columns.clamp(0, keys.shape[2] - 1)]


def still(keys: Tensor, columns: Tensor, then: Tensor) -> Tensor:
    """`[batch]` bool: whether the keys of a row at its columns are, bit by bit, what was `taken` then."""
    return (taken(keys, columns) == then).flatten(1).all(-1)


def _keys(view: KeyView, column: Tensor) -> Tensor:
    return taken(view.keys, column[:, None] + torch.arange(MARKED, device=column.device) - MARKED + 1)
