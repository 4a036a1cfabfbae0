"""Ragged layers: one layer runs for some tokens of a block, and nothing of it is computed for the others.

The mechanism of this folder. The tokens that run are gathered (rows without one are left out, in the others tokens move
together), the model's own layer computes them, and its output is scattered back; a token that does not run keeps its
hidden state. Everything that a layer is given for each token (positions, angles, mask) is gathered alike, and the cache
that it sees (`PartCache`) writes a whole block and gives back the keys of the rows that run.

What a layer holds for a token that did not run it is the method's own choice:

- "none": no keys. A layer that no token of a forward runs does not grow its cache (but for the first layer of each
  window size, which gets zeros: transformers reads the length of the context from those). Right only where a token
  never runs a layer that an earlier one of its row passed over: then no query ever looks for what is not there. A query
  that would is refused.
- "carried": the keys and values of the hidden state that passes by, as if the token had run the layers between without
  being changed (state copying). Every layer holds every token. Costs a layer's first norm and its projections.

A layer runs for all tokens, and those that should not have run keep their state, where moving tokens would change what
another method sees: beside an attached policy that chooses keys by query, on a model that reads both ways, and under
an attention that takes no `[batch, head, query, key]` mask. The results are the same, the cost is not lower.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from pertoken.core.attach import active
from pertoken.core.errors import BadRequest
from pertoken.core.policy import View
from pertoken.models.adapter import Adapter
from pertoken.models.kind import kind_of

NONE, CARRIED = "none", "carried"
PER_TOKEN = ("position_ids", "position_embeddings")


@dataclass(frozen=True)
class Part:
    """Some tokens of a block `[batch, token]`, packed. rows `[row, 1]`: the rows that have any; columns `[row, slot]`:
    their tokens in order, then others up to the longest row; real `[row, slot]`: which slots are meant."""

    rows: Tensor
    columns: Tensor
    real: Tensor
    shape: torch.Size

    @classmethod
    def of(cls, chosen: Tensor) -> Part:
        """The tokens that are chosen, `[batch, token]` bool; at least one is."""
        rows = chosen.any(-1).nonzero()
        there = chosen[rows[:, 0]]
        width = int(there.sum(-1).max())
        columns = there.int().argsort(dim=-1, descending=True, stable=True)[:, :width]
        return cls(rows, columns, there.gather(1, columns), chosen.shape)

    def take(self, x: Tensor) -> Tensor:
        """`[batch or 1, token, ...]` -> `[row, slot, ...]`."""
        return x.expand(self.shape[0], *x.shape[1:])[self.rows, self.columns]

    def put(self, into: Tensor, x: Tensor) -> Tensor:
        """`into` `[batch, token, ...]` with `x` `[row, slot, ...]` at the part's places."""
        return into.index_put((self.rows, self.columns), x)

    def rows_of(self, x: Tensor) -> Tensor:
        """`[batch, ...]` -> `[row, ...]`, without a copy if every row is there."""
        return x if len(self.rows) == self.shape[0] else x[self.rows[:, 0]]

    def mask(self, mask: Tensor | None) -> Tensor | None:
        """`[batch or 1, head, query, key]` -> `[row, head, slot, key]`; None stands for the causal mask of a block that
        nothing precedes, or of a single token."""
        if mask is not None:
            return mask.expand(self.shape[0], -1, -1, -1)[self.rows, :, self.columns].transpose(1, 2)
        if self.shape[1] == 1:
            return None
        return (self.columns[..., None] >= torch.arange(self.shape[1], device=self.columns.device))[:, None]

    def given(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """A layer's arguments for this part."""
        found = dict(kwargs)
        for name in PER_TOKEN:
            value = kwargs.get(name)
            if torch.is_tensor(value):
                found[name] = self.take(value)
            elif value is not None:
                found[name] = tuple(map(self.take, value))
        if "attention_mask" in kwargs:
            found["attention_mask"] = self.mask(kwargs["attention_mask"])
        return found


class PartCache:
    """What a layer that runs for a part of a block sees as its cache. held: keys and values `[batch, token, kv_head,
    dim]` of the tokens that do not run, None for zeros; inner: the cache of the whole batch, None for none."""

    is_compileable = False

    def __init__(self, inner: Any, part: Part, held: tuple[Tensor, Tensor] | None):
        self.inner, self.part, self.held = inner, part, held

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """transformers' cache protocol, `[row, kv_head, slot, dim]`."""
        new = []
        for x, old in zip((keys, values), self.held or (None, None), strict=True):
            x = x.transpose(1, 2)
            into = x.new_zeros(*self.part.shape, *x.shape[2:]) if old is None else old
            new.append(self.part.put(into, x).transpose(1, 2))
        if self.inner is not None:
            new = self.inner.update(*new, layer_idx, *args, **kwargs)
        return self.part.rows_of(new[0]), self.part.rows_of(new[1])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0 if self.inner is None else self.inner.get_seq_length(layer_idx)


class Seen(Exception):
    """Ends a layer once its keys are known."""

    def __init__(self, keys: Tensor, values: Tensor):
        self.keys, self.values = keys, values


class KeysOnly:
    """In place of a cache: a layer gets no further than the keys and values that it would write."""

    is_compileable = False

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise Seen(keys, values)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


Runs = bool | Tensor  # all tokens of the block run the layer, none does, or those of a `[batch, token]` bool


class RaggedLayer:
    """Layer `index` of a model, whose `forward` it was, run for some tokens. keys: "none" or "carried"."""

    def __init__(self, adapter: Adapter, index: int, forward: Callable[..., Any], keys: str):
        self.adapter, self.index, self.forward, self.keys = adapter, index, forward, keys
        self.names = list(inspect.signature(forward).parameters)[1:]
        self.measured = all(adapter.window(i) != adapter.window(index) for i in range(index))

    def __call__(self, runs: Runs, view: View, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Hidden states `[batch, token, width]` after the layer; view: of the forward."""
        if runs is False:
            return self.passed_over(hidden, *args, **kwargs)
        if args:
            kwargs = dict(zip(self.names, args, strict=False)) | kwargs
        cache = kwargs.get("past_key_values")
        if self.keys == NONE:
            self._fill(cache, runs, view, hidden)
        if runs is True:
            return self.forward(hidden, **kwargs)
        assert isinstance(runs, Tensor)
        mask = kwargs.get("attention_mask")
        if stays_whole(self.adapter) or (torch.is_tensor(mask) and mask.ndim != 4):
            return torch.where(runs[..., None], self.forward(hidden, **kwargs), hidden)
        part = Part.of(runs)
        held = self._held(hidden, view.valid & ~runs, kwargs) if self.keys == CARRIED else None
        mine, own = part.take(hidden), part.given(kwargs)
        out = self.forward(mine, **(own | {"past_key_values": PartCache(cache, part, held)}))
        return part.put(hidden, torch.where(part.real[..., None], out, mine))

    def passed_over(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """In place of the layer, where no token runs it."""
        if self.keys == NONE and not self.measured:
            return hidden
        if args:
            kwargs = dict(zip(self.names, args, strict=False)) | kwargs
        cache = kwargs.get("past_key_values")
        if self.keys == CARRIED and cache is not None:
            cache.update(*self._keys(hidden, kwargs), self.index)
        elif isinstance(cache, Cache):
            self._zeros(cache, hidden, hidden.shape[1])
        return hidden

    def _zeros(self, cache: Cache, hidden: Tensor, tokens: int) -> None:
        shape = (len(hidden), self.adapter.kv_heads, tokens, self.adapter.head_dim)
        cache.update(hidden.new_zeros(shape), hidden.new_zeros(shape), self.index)

    def _keys(self, hidden: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Keys and values `[batch, kv_head, token, dim]` that the layer would write."""
        try:
            self.forward(hidden, **(kwargs | {"past_key_values": KeysOnly()}))
        except Seen as seen:
            return seen.keys, seen.values
        raise BadRequest(f"layer {self.index} of {type(self.adapter.model).__name__} did not write to its cache")

    def _held(self, hidden: Tensor, passed: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
        if not bool(passed.any()):
            return None
        part, found = Part.of(passed), []
        for x in self._keys(part.take(hidden), part.given(kwargs)):
            x = x.transpose(1, 2)
            found.append(part.put(x.new_zeros(*part.shape, *x.shape[2:]), x))
        return found[0], found[1]

    def _fill(self, cache: Any, runs: Runs, view: View, hidden: Tensor) -> None:
        """Where a layer holds fewer tokens than were read, because none of them ran it, put zeros in their place for
        rows that begin only now; raise `BadRequest` if a row that runs it has read some of them."""
        if not self.index or not isinstance(cache, Cache):
            return
        held, read = cache.get_seq_length(self.index), cache.get_seq_length(0) - hidden.shape[1]
        if held >= read:
            return
        running = view.valid & (runs if isinstance(runs, Tensor) else True)
        assert view.positions is not None
        if bool((view.positions.masked_fill(~view.valid, 0).amin(-1)[running.any(-1)] > 0).any()):
            raise BadRequest(
                f"layer {self.index} holds the keys of {held} tokens, of {read} that were read: a token cannot run a "
                "layer that an earlier one passed over. Start over with an empty cache, or let no token go deeper than "
                "those before it"
            )
        self._zeros(cache, hidden, read - held)


def by_choice(x: Tensor, valid: Tensor, choices: Sequence[tuple[Tensor, Callable[[Tensor], Tensor]]]) -> Tensor:
    """Modules that act on every token by itself, each computed on the tokens that chose it.

    x `[batch, token, width]`; valid `[batch, token]` bool; choices: which tokens `[batch, token]`, and the module. A
    token that chose none gets zeros. A module that all real tokens chose is given the block as it is.
    """
    real, flat = int(valid.sum()), x.flatten(0, 1)
    out = torch.zeros_like(flat)
    for chosen, module in choices:
        index = (chosen & valid).flatten().nonzero().flatten()
        if len(index) == real:
            return module(x)
        if len(index):
            out.index_copy_(0, index, module(flat[index][None])[0])
    return out.view_as(x)


def stays_whole(adapter: Adapter) -> bool:
    """Whether tokens must stay where they are in this model's layers (see the module)."""
    model = adapter.model
    return kind_of(model) != "causal" or any("keys read" in one.policy.writes for one in active(model))
