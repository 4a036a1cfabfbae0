"""Running again: when a block has run all layers, some of its tokens run them once more, on what they would have said.

The third way into ragged depth (see `ragged`): decided behind the last layer. Tokens that go on are gathered into a
packed block, so that another pass costs what they cost and nothing for the others. In pass d + 1 a token's input is the
embedding that it expects, the mean of those of its `top` likeliest next tokens by the sum of its logits so far, and it
stands where it stood: positions are those of the token in every pass.

Attention over tokens and passes ("duo-causal"): a query of token i in pass d sees the keys of tokens j <= i of passes
k <= d. Which j it may see (padding, windows, the branch of a token tree) is what the mask of the first pass says about
the two tokens. Only tokens that ran pass k own keys of it.

Those keys lie in a pool `[entry, layer, 2, key head, dim]`, and beside a cache's columns stands which entries a token
owns (`-1`: none). That note is kept in the model's own cache, as one more layer of it, so that whatever cuts, reorders
or repeats the cache does so to the note; entries that nothing points to any more stay in the pool until the cache goes.

What a token says is the sum of its passes' logits. It travels with the hidden state, as more channels of it, from
behind the last layer to the head, which gives it back; decoders cut, join and reorder it like any state. So all logits
of a block are computed, of a prompt too. transformers' `output_hidden_states` shows the channels.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from pertoken.core.attach import Attachment, swapped
from pertoken.core.budget import Budget
from pertoken.core.decision import Depth
from pertoken.core.errors import BadRequest
from pertoken.core.policy import Policy, View
from pertoken.depth.lora import Lora
from pertoken.depth.ragged import Part
from pertoken.models.adapter import Adapter, adapter_for
from pertoken.models.cache import TreeCache
from pertoken.models.kind import kind_of

SITE = "depth.passes"
POOL = "depth.passes.pool"
AT_ONCE = 4096  # embeddings that are mixed at once
BOTH, FIRST, OWN = "both", "first", "own"
SEES = (BOTH, FIRST, OWN)


@dataclass(frozen=True)
class PassView(View):
    """What is seen after pass `passed`. passes `[batch, token]` int: passes run; asked `[batch, token]` bool: tokens
    that may run another one, n in all; states: by layers run, un-normed hidden states of this pass `[n, width]`; logits
    `[n, vocabulary]`: the sum of all passes."""

    passed: int = 1
    passes: Tensor | None = None
    asked: Tensor | None = None
    states: dict[int, Tensor] = field(default_factory=dict)
    logits: Tensor | None = None


@dataclass(frozen=True)
class PassPolicy(Policy):
    """Base of policies that let tokens run all layers again.

    budget: share of the tokens that one pass is enough for; the full budget switches the method off. passes: the most
    that any token runs. top: likeliest tokens whose embeddings are mixed. lora: low-rank weights that act in every pass
    but the first, None for none. prompt: whether the tokens of a prompt may run again too; else only the last one,
    whose guess is the first new token. sees: the passes whose keys another pass reads: "both" the first and those
    behind it, or for ablations the "first" alone (and the token's own) or its "own" alone.
    """

    budget: Budget = field(default=Budget(fraction=0.93), kw_only=True)
    passes: int = field(default=2, kw_only=True)
    top: int = field(default=100, kw_only=True)
    lora: Lora | str | None = field(default=None, kw_only=True)
    prompt: bool = field(default=True, kw_only=True)
    sees: str = field(default=BOTH, kw_only=True)
    reads: ClassVar[frozenset[str]] = frozenset({"states", "logits"})
    writes: ClassVar[frozenset[str]] = frozenset({"layers", "passes", "keys read"})
    saves: ClassVar[str] = "nothing"
    small: ClassVar[dict[str, Any]] = {"budget": Budget(fraction=0.5)}

    def __post_init__(self) -> None:
        if self.passes < 1 or self.top < 1:
            raise BadRequest(f"passes={self.passes} and top={self.top} must be at least 1")
        if self.sees not in SEES:
            raise BadRequest(f"sees={self.sees!r} is unknown; choose one of {', '.join(map(repr, SEES))}")
        if self.budget.units() not in ([], ["fraction"]):
            raise BadRequest(
                f"a budget of {self.budget} says nothing about passes; give Budget(fraction=...), the share of tokens "
                "that one pass is enough for, or Budget.full()"
            )
        if isinstance(self.lora, str):
            object.__setattr__(self, "lora", Lora.load(self.lora))

    @property
    def weights(self) -> Lora | None:
        """The low-rank weights, once they are loaded."""
        assert not isinstance(self.lora, str)
        return self.lora

    @property
    def watched(self) -> tuple[int, ...]:
        """Numbers of layers run after which hidden states are shown to `again`; 0 for the input."""
        return ()

    @abstractmethod
    def again(self, view: PassView) -> Tensor:
        """`[n]` bool: which of the tokens asked run another pass."""

    def check(self, model: Any) -> None:
        """Raise `BadRequest` if this cannot run on the model."""
        return None

    def decide(self, view: View) -> Depth:
        assert isinstance(view, PassView) and view.passes is not None and view.asked is not None
        passes = view.passes.clone()
        if bool(view.asked.any()):
            passes[view.asked] += self.again(view).to(passes.dtype)
        unrolled = torch.arange(self.passes * view.layers, device=passes.device)
        return Depth(valid=view.valid, layers=unrolled < passes[..., None] * view.layers)

    def install(self, model: Any, attachment: Attachment) -> None:
        adapter = adapter_for(model)
        if kind_of(model) != "causal":
            raise BadRequest(
                f"{type(self).__name__} thinks again about the next token, and this model reads in both directions and "
                "fills in a canvas; give a causal model"
            )
        if self.weights is not None:
            self.weights.check(model)
        self.check(model)
        Passes(self, adapter, attachment).install()


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


@dataclass
class Running:
    """A forward under way. given: by layer, what it was given beside its input; read: the keys and values that it read;
    inputs: hidden states by layers run, those that are watched."""

    view: View
    given: dict[int, dict[str, Any]] = field(default_factory=dict)
    read: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    inputs: dict[int, Tensor] = field(default_factory=dict)


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


class Passes:
    """A policy of passes at work on one model."""

    def __init__(self, policy: PassPolicy, adapter: Adapter, attachment: Attachment):
        self.policy, self.adapter, self.attachment = policy, adapter, attachment
        self.depth, self.width = adapter.depth, adapter.config.hidden_size
        self.layers = [layer.forward for layer in adapter.layers]
        self.names = [list(inspect.signature(forward).parameters)[1:] for forward in self.layers]
        self.norm, self.head = adapter.final_norm.forward, adapter.model.lm_head.forward

    def install(self) -> None:
        attachment, adapter, lora = self.attachment, self.adapter, self.policy.weights
        if self.policy.budget.is_full and not attachment.replaying:
            return
        if lora is not None:
            lora.to(adapter.device)
            lora.install(adapter.model, attachment)
            attachment.set_attribute(lora, "gate", 0.0)
        attachment.on_forward(self.begin)
        attachment.announce(adapter.base, self.depth)
        for index, layer in enumerate(adapter.layers):
            attachment.set_attribute(layer, "forward", self.around_layer(index))
        if adapter.entry is not None:
            attachment.wrap(adapter.entry, self.around_entry)
        attachment.wrap(adapter.final_norm, self.around_norm)
        attachment.wrap(adapter.model.lm_head, self.around_head)

    def begin(self, view: View) -> None:
        self.attachment.state[SITE] = Running(view)

    def around_entry(self, forward: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        """Gives states their channels where the last layer would be too late for it."""
        out = forward(hidden)
        more = out.new_zeros(*out.shape[:-1], self.adapter.vocabulary)
        return torch.cat([out, more], -1) if SITE in self.attachment.state else out

    def around_layer(self, index: int) -> Callable[..., Any]:
        forward, names, attachment = self.layers[index], self.names[index], self.attachment

        def run(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            now: Running | None = attachment.state.get(SITE)
            if not attachment.enabled or now is None:
                return forward(hidden, *args, **kwargs)
            hidden = hidden[..., : self.width].contiguous()
            kwargs = dict(zip(names, args, strict=False)) | kwargs
            witness = Witness(kwargs.get("past_key_values"))
            if index in self.policy.watched:
                now.inputs[index] = hidden
            out = forward(hidden, **(kwargs | {"past_key_values": witness}))
            now.given[index], now.read[index] = kwargs, (witness.keys, witness.values)
            return self.think(now, out) if index == self.depth - 1 else out

        return run

    def around_norm(self, forward: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        if hidden.shape[-1] == self.width:
            return forward(hidden)
        return torch.cat([forward(hidden[..., : self.width].contiguous()), hidden[..., self.width :]], -1)

    def around_head(self, forward: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        return forward(hidden) if hidden.shape[-1] == self.width else hidden[..., self.width :]

    def think(self, now: Running, out: Tensor) -> Tensor:
        """The last layer's output `[batch, token, width]` after all passes, and the sum of their logits."""
        view, policy = now.view, self.policy
        logits = self.head(self.norm(out))
        notes = Notes(now.given[self.depth - 1].get("past_key_values"), self, out, now)
        passes, asked = torch.ones_like(view.valid, dtype=torch.long), view.valid
        if not policy.prompt and view.prompt is not None and view.positions is not None:
            asked = asked & (view.positions >= view.prompt[:, None] - 1)
        states = dict(now.inputs) | ({self.depth: out} if self.depth in policy.watched else {})
        for passed in range(1, policy.passes):
            shown = {ran: chosen_of(state, asked) for ran, state in states.items()}
            seen = PassView(
                *(view.valid, self.depth, {}, view.tree, view.positions, view.prompt),
                *(passed, passes, asked, shown, chosen_of(logits, asked)),
            )
            decision = self.attachment.decide(f"{SITE}.{passed}", seen)
            assert isinstance(decision, Depth)
            passes = decision.layers.sum(-1) // self.depth
            asked = (passes > passed) & view.valid
            if not bool(asked.any()):
                break
            part = Part.of(asked)
            before = part.take(logits)
            hidden, states = self.again(now, part, before, notes, passed)
            total = (before.float() + self.head(self.norm(hidden)).float()).to(logits.dtype)
            real = part.real[..., None]
            logits = part.put(logits, torch.where(real, total, before))
            out = part.put(out, torch.where(real, hidden, part.take(out)))
            states = {ran: part.put(out.new_zeros(out.shape), state) for ran, state in states.items()}
        notes.write()
        for kept in (now.given, now.read, now.inputs):  # or they would outlive the cache's own
            kept.clear()
        return torch.cat([out, logits], -1)

    def again(
        self, now: Running, part: Part, logits: Tensor, notes: Notes, passed: int
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Another pass of a part: its last hidden states `[row, slot, width]`, and those that are watched."""
        sees = self.policy.sees
        of = {BOTH: slice(0, passed), FIRST: slice(0, 0), OWN: slice(passed - 1, passed)}[sees]
        owned = Owned.of(part.rows_of(notes.all)[..., of])
        columns = notes.start + part.columns
        total = notes.start + part.shape[1]
        masks: dict[Any, Tensor | None] = {}
        hidden, states, new = self.expected(logits, now, part), {}, []
        with self.low_rank():
            for index, forward in enumerate(self.layers):
                if index in self.policy.watched:
                    states[index] = hidden
                given, cut = self.given(now, index)
                keys = [part.rows_of(x) for x in notes.first(index)]
                key = (id(given.get("attention_mask")), cut, keys[0].shape[2])
                if key not in masks:
                    mask = given.get("attention_mask")
                    if cut is not None:
                        mask = notes.within(mask, given["position_ids"], cut)
                    seen = (columns, part.real), (owned.columns, owned.real)
                    masks[key] = widened(part, mask, hidden, keys[0].shape[2], total, seen, sees)
                first = [] if sees == OWN else [(keys[0], keys[1])]
                cache = PassCache([*first, *notes.pooled(owned, index)])
                rest = {name: value for name, value in given.items() if name != "attention_mask"}
                mine = part.given(rest) | {"attention_mask": masks[key], "past_key_values": cache}
                hidden = forward(hidden, **mine)
                new.append(torch.stack(cache.new))
        if self.depth in self.policy.watched:
            states[self.depth] = hidden
        notes.add(part, torch.stack(new), passed)
        return hidden, states

    def given(self, now: Running, index: int) -> tuple[dict[str, Any], int | None]:
        """What layer `index` was given in this forward. Where it ran in an earlier one (drafts through the first
        layers): what a layer of the same window was given, or one without, and the window to cut its mask to."""
        if index in now.given:
            return now.given[index], None
        window = self.adapter.window(index)
        for other, given in now.given.items():
            if self.adapter.window(other) == window:
                return given, None
        for other, given in now.given.items():
            if self.adapter.window(other) is None:
                return given, window
        raise BadRequest(
            f"layer {index} reads a window of {window} tokens and did not run in this forward, and no other layer that "
            "did tells what it may read; give a decoder that does not draft through the model's first layers"
        )

    def expected(self, logits: Tensor, now: Running, part: Part) -> Tensor:
        """Mean embedding `[row, slot, width]` of the likeliest tokens, logits `[row, slot, vocabulary]`."""
        best, tokens = logits.float().topk(min(self.policy.top, logits.shape[-1]), -1)
        weights, view = best.softmax(-1), now.view
        positions = torch.zeros_like(part.columns) if view.positions is None else part.take(view.positions)
        found, step = None, max(AT_ONCE // part.columns.numel(), 1)
        for ids, share in zip(tokens.split(step, -1), weights.split(step, -1), strict=True):
            places = positions[..., None].expand_as(ids).flatten(1)
            rows = self.adapter.embed(ids.flatten(1), places)[..., : self.width].unflatten(1, ids.shape[1:])
            mixed = (share[..., None] * rows.float()).sum(-2)
            found = mixed if found is None else found + mixed
        assert found is not None
        return found.to(logits.dtype)

    @contextmanager
    def low_rank(self) -> Iterator[None]:
        """The low-rank weights act inside the block."""
        if self.policy.weights is None:
            yield
            return
        with swapped(self.policy.weights, "gate", 1.0):
            yield


class Notes:
    """Which entries of the pool the tokens of a cache own, `all` `[batch, column, pass]`, this block's from column
    `start` on; where a forward keeps nothing they last as long as it does."""

    def __init__(self, cache: Any, at_work: Passes, out: Tensor, now: Running):
        self.cache, self.now, self.depth = cache, now, at_work.depth
        batch, tokens = out.shape[:2]
        more = max(at_work.policy.passes - 1, 1)
        self.start, self.pool, old = 0, Pool(), None
        if isinstance(cache, TreeCache):
            self.start = cache.columns.start
            self.pool = at_work.attachment.state.setdefault(POOL, self.pool)
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
        return self.now.read[index]

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


def chosen_of(x: Tensor, chosen: Tensor) -> Tensor:
    """`[batch, token, ...]` -> `[n, ...]`, without a copy if all are chosen."""
    return x.flatten(0, 1) if bool(chosen.all()) else x[chosen]


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
