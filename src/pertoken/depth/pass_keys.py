"""Keys of tokens that run again (see `passes`): where they are kept, and what another pass reads of them.

Attention over tokens and passes ("duo-causal"): a query of token i in pass d sees the keys of tokens j <= i of passes
k <= d. Which j it may see (padding, windows, the branch of a token tree) is what the mask of the first pass says about
the two tokens. Only tokens that ran pass k own keys of it.

Those keys lie in a pool `[entry, layer, 2, key head, dim]`, and beside a cache's columns stands which entries a token
owns (`-1`: none). That note is kept in the model's own cache, as one more layer of it, so that whatever cuts, reorders
or repeats the cache does so to the note; entries that nothing points to any more stay in the pool until the cache goes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from pertoken.core.errors import BadRequest
from pertoken.depth.ragged import Part
from pertoken.models.cache import TreeCache

POOL = "depth.passes.pool"
BOTH, FIRST, OWN = "both", "first", "own"
SEES = (BOTH, FIRST, OWN)


class Pool:
    """Keys and values of passes beyond the first, `[entry, layer, 2, key head, dim]`."""

    def __init__(self) -> None:
        self.entries: Tensor | None = None

    def add(self, new: Tensor) -> int:
        """Keep new entries; returns the number of the first."""
        first = 0 if self.entries is None else len(self.entries)
        self.entries = new if self.entries is None else torch.cat([self.entries, new])
        return first


class PassNotes(DynamicLayer):
    """One more layer of a model's cache: its keys `[batch, 1, token, pass]` are entries of the pool, which it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = Pool()


class Witness:
    """In place of a layer's cache: remembers the keys and values that the layer was given to read."""

    is_compileable = False

    def __init__(self, inner: Any):
        self.inner, self.keys, self.values = inner, torch.empty(0), torch.empty(0)

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.inner is not None:
            keys, values = self.inner.update(keys, values, layer_idx, *args, **kwargs)
        self.keys, self.values = keys, values
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0 if self.inner is None else self.inner.get_seq_length(layer_idx)


class PassCache:
    """What a layer of another pass sees as its cache: keys and values of all passes that its queries may read, `[row,
    key head, key, dim]`, behind which it puts its own; new: those, once it has run."""

    is_compileable = False

    def __init__(self, before: list[tuple[Tensor, Tensor]]):
        self.before, self.new = before, (torch.empty(0), torch.empty(0))

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.new = keys, values
        parts = [*self.before, self.new]
        return torch.cat([one for one, _ in parts], 2), torch.cat([other for _, other in parts], 2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return sum(keys.shape[2] for keys, _ in self.before)


@dataclass(frozen=True)
class Owned:
    """Entries of the pool that rows of a part may read, packed `[row, key]`: index into the pool, the column of the
    token that owns it, and which of them are meant."""

    index: Tensor
    columns: Tensor
    real: Tensor

    @classmethod
    def of(cls, notes: Tensor) -> Owned:
        """notes `[row, column, pass]`: entries, -1 for none."""
        flat, passes = notes.flatten(1), notes.shape[-1]
        there = flat >= 0
        width = int(there.sum(-1).max()) if flat.numel() else 0
        order = there.int().argsort(dim=-1, descending=True, stable=True)[:, :width]
        return cls(flat.gather(1, order).clamp(min=0), order // max(passes, 1), there.gather(1, order))


class Notes:
    """Which entries of the pool the tokens of a cache own, `all` `[batch, column, pass]`, this block's from column
    `start` on; where a forward keeps nothing they last as long as it does.

    state: of the request; read: by layer, the keys and values that the first pass read; out: the block's hidden states
    `[batch, token, width]`; depth: layers of the model; passes: the most that a token runs.
    """

    def __init__(
        self,
        cache: Any,
        state: dict[str, Any],
        read: dict[int, tuple[Tensor, Tensor]],
        out: Tensor,
        depth: int,
        passes: int,
    ):
        self.cache, self.read, self.depth = cache, read, depth
        batch, tokens = out.shape[:2]
        more = max(passes - 1, 1)
        self.start, self.pool, old = 0, Pool(), None
        if isinstance(cache, TreeCache):
            self.start = cache.columns.start
            self.pool = state.setdefault(POOL, self.pool)
            if cache.notes is None or cache.notes.shape[-1] != more:
                cache.notes = cache.valid.new_full((*cache.valid.shape, more), -1, dtype=torch.long)
            old = cache.notes[:, : self.start]
        elif cache is not None:
            layer = self.layer(cache)
            self.pool = layer.pool
            self.start = int(cache.get_seq_length()) - tokens
            old = None if not layer.get_seq_length() or layer.keys is None else layer.keys[:, 0]
            if old is not None and old.shape[-1] != more:
                raise BadRequest(
                    f"this cache was begun with up to {old.shape[-1] + 1} passes per token, not {more + 1}; go on as "
                    "it was begun, or start over with an empty one"
                )
        known = 0 if old is None else old.shape[1]
        blank = torch.full((batch, self.start - known + tokens, more), -1, dtype=torch.long, device=out.device)
        self.all = blank if old is None else torch.cat([old, blank], 1)
        self.known = known

    def layer(self, cache: Any) -> PassNotes:
        """The layer of a transformers cache that holds the notes."""
        layers = cache.layers if isinstance(cache, DynamicCache) else []
        if len(layers) < self.depth or not all(isinstance(layer, DynamicLayer) for layer in layers[: self.depth]):
            raise BadRequest(
                f"passes keep keys beside those of a DynamicCache, got {type(cache).__name__}; leave "
                "cache_implementation unset"
            )
        if len(layers) == self.depth:
            layers.append(PassNotes())
        notes = layers[self.depth]
        assert isinstance(notes, PassNotes)
        return notes

    def first(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values `[batch, key head, column, dim]` of the first pass in layer `index`."""
        if isinstance(self.cache, TreeCache):
            layer = self.cache.buffer[index]
            return layer[0, :, :, : self.cache.read], layer[1, :, :, : self.cache.read]
        return self.read[index]

    def pooled(self, owned: Owned, index: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values `[row, key head, key, dim]` of the entries that are owned."""
        if not owned.index.shape[1] or self.pool.entries is None:
            return []
        keys, values = self.pool.entries[:, index][owned.index].unbind(2)
        return [(keys.transpose(1, 2), values.transpose(1, 2))]

    def within(self, mask: Tensor | None, positions: Tensor, window: int) -> Tensor:
        """A mask `[batch, 1, query, column]` of a layer without a window, cut to one."""
        assert isinstance(self.cache, TreeCache)
        distance = positions[..., None] - self.cache.positions[:, None, : self.cache.read]
        far = (distance >= window)[:, None]
        if mask is None:
            mask = torch.zeros(far.shape, dtype=self.cache.buffer.dtype, device=far.device)
        return mask.masked_fill(far, lowest(mask))

    def add(self, part: Part, new: Tensor, passed: int) -> None:
        """Keep what the part's tokens wrote, new `[layer, 2, row, key head, slot, dim]`, in the pass after `passed`."""
        entries = new.permute(2, 4, 0, 1, 3, 5)[part.real]
        first = self.pool.add(entries)
        numbers = torch.full_like(part.columns, -1)
        numbers[part.real] = torch.arange(first, first + len(entries), device=numbers.device)
        self.all = self.all.clone()
        self.all[part.rows, self.start + part.columns, passed - 1] = numbers

    def write(self) -> None:
        """Keep the notes with the cache."""
        if isinstance(self.cache, TreeCache):
            assert self.cache.notes is not None
            self.cache.notes[:, self.start : self.all.shape[1]] = self.all[:, self.start :]
        elif isinstance(self.cache, Cache):
            new = self.all[:, None, self.known :]
            self.layer(self.cache).update(new, new[..., :0])


def lowest(mask: Tensor) -> float | bool:
    """What a mask says of a key that is not seen."""
    return False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min


def widened(
    part: Part,
    mask: Tensor | None,
    hidden: Tensor,
    keys: int,
    total: int,
    seen: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]],
    sees: str,
) -> Tensor | None:
    """The mask `[row, head, slot, key]` of another pass, None if every query reads every key.

    mask: of the first pass over its `keys` keys, the last of `total` columns; seen: columns and reality `[row, key]` of
    the part's own tokens, and of the entries of the pool, which stand before those; sees: see `PassPolicy`.
    """
    (own, own_real), (columns, real) = seen
    if mask is not None and (not torch.is_tensor(mask) or mask.ndim != 4):
        raise BadRequest(
            f"passes need an attention that takes a mask [batch, head, query, key], got {type(mask).__name__}; call "
            'model.set_attn_implementation("sdpa")'
        )
    where = torch.cat([columns, own], 1) - max(total - keys, 0)
    there = torch.cat([real, own_real], 1) & (where >= 0)
    if mask is None and part.shape[1] == 1 and bool(there.all()):
        return None
    begun = part.mask(mask)
    if begun is None:
        begun = hidden.new_zeros(len(part.rows), 1, 1, keys)
    index = where.clamp(min=0)[:, None, None].expand(-1, begun.shape[1], begun.shape[2], -1)
    more = torch.where(there[:, None, None], begun.gather(-1, index), lowest(begun))
    if sees == FIRST:
        itself = torch.eye(own.shape[1], dtype=torch.bool, device=own.device)
        more = torch.where(itself, more, lowest(more))
    return more if sees == OWN else torch.cat([begun, more], -1)
