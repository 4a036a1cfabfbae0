"""A cache layer that frees memory: it holds the keys that were kept and no others, and still counts all that were seen.

A *place* is the column that a token has in its row, padding included, as without eviction: positions, masks and lengths
go by it. Rows and heads may keep different places; kept keys lie at the right end in order of place, so that a new
token is one column more, and one token taken back is one column less, for all of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from pertoken.core.errors import BadRequest


class KeptLayer(DynamicLayer):
    """keys and values `[batch, kv_heads, kept, dim]`; places `[batch, groups, kept]` int64 ascending, -1 for none, one
    set for all heads (groups 1) or one per key head; seen: columns that were ever appended and not taken back; whole:
    nothing was evicted. beside: tensors `[batch, groups, kept]` that go with the keys, 0 for a new one; rows: tensors
    `[batch]` that go with the rows; bounds: who evicts from it, and the least and the most keys that a row of it may
    keep; attended: the attention that runs knows what was evicted.

    No tensor is ever written into, so that a fork shares them until either side changes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.attended = False
        self._empty()

    def _empty(self) -> None:
        self.seen, self.whole = 0, True
        self.places: Tensor | None = None
        self.beside: dict[str, Tensor] = {}
        self.rows: dict[str, Tensor] = {}
        self.bounds: tuple[Any, int, int] | None = None

    @classmethod
    def of(cls, layer: DynamicLayer) -> KeptLayer:
        """What `layer` holds, with nothing evicted."""
        made = cls()
        if layer.get_seq_length() and layer.keys is not None and layer.values is not None:
            made.update(layer.keys, layer.values)
        return made

    @property
    def held(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Keys, values and places; None before the first token."""
        if self.keys is None or self.values is None or self.places is None:
            return None
        return self.keys, self.values, self.places

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether tokens can be taken back without a trace."""
        return self.whole

    @property
    def kept(self) -> int:
        """Columns of keys held: as many as the fullest row and head keeps."""
        return 0 if self.places is None else self.places.shape[-1]

    @property
    def bytes(self) -> int:
        """Of all tensors that grow with the keys kept."""
        held = (self.keys, self.values, self.places, *self.beside.values())
        return sum(t.numel() * t.element_size() for t in held if t is not None)

    def get_seq_length(self) -> int:
        return self.seen

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append the keys and values `[batch, kv_heads, token, dim]` of the next columns; returns all that are kept."""
        if not (self.whole or self.attended):
            raise BadRequest(
                f"this cache has evicted keys ({self.kept} of {self.seen} columns are left), which the model's own "
                "attention does not know; go on inside pertoken.attach(model, policy) with a policy that evicts, or "
                "start with a new cache"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, _, new, _ = key_states.shape
        fresh = torch.arange(self.seen, self.seen + new, device=key_states.device)
        keys, values, places = key_states, value_states, fresh.expand(rows, 1, -1)
        if (held := self.held) is not None:
            keys, values = torch.cat([held[0], keys], -2), torch.cat([held[1], values], -2)
            places = torch.cat([held[2], fresh.expand(*held[2].shape[:2], -1)], -1)
            self.beside = {name: F.pad(tensor, (0, new)) for name, tensor in self.beside.items()}
        self.keys, self.values, self.places = keys, values, places
        self.seen += new
        return keys, values

    def evict(self, keep: Tensor) -> None:
        """Keep only these places `[batch, groups, slot]`, ascending and -1 for none (which go first); free the rest.
        A place that is not held is passed over. Groups as in `places`; heads that differ once stay apart."""
        if not self.kept or (held := self.held) is None:
            return
        keys, values, places = held
        rows, heads, _, _ = keys.shape
        groups = max(keep.shape[1], places.shape[1])
        if keep.shape[0] != rows or groups not in (1, heads):
            raise BadRequest(
                f"keep is {list(keep.shape)}; give places [batch, groups, slot] for {rows} rows and 1 or {heads} groups"
            )
        places = places.expand(-1, groups, -1).contiguous()
        keep = keep.expand(-1, groups, -1).contiguous()
        slots = torch.searchsorted(places, keep).clamp(max=places.shape[-1] - 1)
        found = (places.gather(-1, slots) == keep) & (keep >= 0)
        self.places, order = torch.where(found, keep, -1).sort(-1)  # what is not held goes to the left
        slots, found = slots.gather(-1, order), found.gather(-1, order)
        self.beside = {
            name: tensor.expand(-1, max(groups, tensor.shape[1]), -1)
            .gather(-1, slots.expand(-1, max(groups, tensor.shape[1]), -1))
            .masked_fill(~found, 0)
            for name, tensor in self.beside.items()
        }
        where = slots[..., None].expand(-1, heads, -1, -1)
        self.keys, self.values = (t.gather(2, where.expand(-1, -1, -1, t.shape[-1])) for t in (keys, values))
        self.whole = False

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last `-tokens_to_remove` tokens back (a number below 0). What they evicted does not come back."""
        if tokens_to_remove > 0:
            raise BadRequest(f"crop takes a number of tokens below 0, got {tokens_to_remove}; give -1 for the last one")
        count = min(-tokens_to_remove, self.seen)
        if not count or (held := self.held) is None:
            return
        keys, values, places = held
        if not self.whole:
            wanted = torch.arange(self.seen - count, self.seen, device=places.device)
            if count > self.kept or not bool((places[..., -count:] == wanted).all()):
                raise BadRequest(
                    f"the last {count} of {self.seen} tokens cannot be taken back: some of them were evicted in some "
                    "row or head. Keep a fork from before they were read, or keep more of the latest tokens (recent)"
                )
        stop = self.kept - count
        self.keys, self.values, self.places = keys[:, :, :stop], values[:, :, :stop], places[..., :stop]
        self.beside = {name: tensor[..., :stop] for name, tensor in self.beside.items()}
        self.seen -= count

    def fork(self) -> KeptLayer:
        """The same state, which from now on goes its own way; costs nothing until it does."""
        made = copy.copy(self)
        made.beside, made.rows = dict(self.beside), dict(self.rows)
        return made

    def _each_row(self, pick: Callable[[Tensor], Tensor]) -> None:
        if (held := self.held) is None:
            return
        self.keys, self.values, self.places = map(pick, held)
        self.beside = {name: pick(tensor) for name, tensor in self.beside.items()}
        self.rows = {name: pick(tensor) for name, tensor in self.rows.items()}

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each_row(lambda tensor: tensor[indices.to(tensor.device)])

    def reorder_cache(self, beam_idx: Tensor) -> None:  # type: ignore[override]
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each_row(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def reset(self) -> None:
        super().reset()
        self._empty()


def cache_bytes(cache: Cache) -> int:
    """Bytes of the tensors of a cache, wherever they lie, with what says which keys they are."""
    return sum(map(layer_bytes, cache.layers))


def layer_bytes(layer: Any) -> int:
    """As `cache_bytes`, of one of its layers."""
    if isinstance(layer, KeptLayer):
        return layer.bytes
    held = (getattr(layer, "keys", None), getattr(layer, "values", None))
    return sum(t.numel() * t.element_size() for t in held if t is not None)


def bytes_over_time(model: Any, ids: Tensor, **settings: Any) -> tuple[Tensor, list[int]]:
    """What `model.generate(ids, **settings)` returns, and the bytes of its cache after each forward: of the prompt
    first, then of every step. Whatever is attached to the model acts."""
    cache, sizes = DynamicCache(config=model.config), []

    def watch(ids: Tensor, scores: Any, **_: Any) -> Tensor:
        sizes.append(cache_bytes(cache))
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    also = list(settings.pop("stopping_criteria", None) or [])
    return model.generate(ids, past_key_values=cache, stopping_criteria=[*also, watch], **settings), sizes
