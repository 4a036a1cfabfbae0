"""Selection attention: each run of queries reads only the keys that a policy chooses; no others are touched.

The mechanism of this folder. While a policy is attached, the model's full-attention layers run one attention function
under a private name, which is set on this model's configuration only. It sees queries, keys and a `Sight` of what the
mask allows, asks the policy for a `Select`, and attends over the chosen keys. Layers with a sliding window are left as
they are, and so is a forward in which nothing would be left out: it runs the model's own attention.

Queries of a prefill share keys in runs, which begin at each row's first real token; a token that is being decoded, and
every node of a decoder's token tree, chooses for itself. What is chosen is a function of the row alone, however it is
padded; chunks of a prefill give what the whole gives if they are multiples of the run.

Positions: with `positions="compact"`, keys are cached as they are before rotation, and are turned, with the queries, by
their places among the keys that are read. Distances are then never longer than what is read, so that a model reads
contexts longer than any it was trained on. With "original" keys keep the positions that the model gave them.

Memory: with `offload`, keys and values of these layers lie in host memory, the policy chooses there, and only what a
decoded token reads is fetched to the model's device, where it stays as long as it is read (`aside.py`). A forward of
several tokens brings the keys over whole, one layer at a time.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from pertoken.attend.aside import Aside
from pertoken.attend.history import ends, still, taken
from pertoken.attend.kept import layer_bytes
from pertoken.attend.key_view import KeyView
from pertoken.attend.reader import Reader, check_keys, readable
from pertoken.attend.sight import Causal, Kept, Masked, Sight
from pertoken.core.attach import Attachment
from pertoken.core.budget import Budget
from pertoken.core.decision import Select
from pertoken.core.errors import BadRequest
from pertoken.core.policy import Policy, View
from pertoken.models.adapter import Adapter
from pertoken.models.attention import own_attention
from pertoken.models.growing import GrowingLayer, let_grow
from pertoken.models.rotary import Rotary
from pertoken.ops.selected_attention import selected_attention
from pertoken.ops.selected_attention.torch import gathered_attention

SITE = "attend.keys"
PROMPT = "attend.prompt"
POSITIONS = ("original", "compact")
HOST = "cpu"


@dataclass(frozen=True)
class KeyPolicy(Policy):
    """Base of the policies that choose which keys are read.

    budget: keys chosen for each run, in tokens or as a share of those to choose from, besides the first `sinks` and the
    last `recent` that it sees, which are always read, as is all of a run by itself; run: queries of a prefill that
    share their keys; positions: "original", or "compact"; offload: keys lie in host memory (see the module for both).

    each: budget and `recent` are those of each query instead: `decide` gives a run the keys that any of its queries can
    need, and `weigh` says which of them each one reads.
    """

    budget: Budget = Budget(tokens=2048)
    sinks: int = 128
    recent: int = 512
    run: int = 512
    positions: str = "original"
    offload: bool = False
    reads: ClassVar[frozenset[str]] = frozenset({"queries", "keys"})
    writes: ClassVar[frozenset[str]] = frozenset({"keys read"})
    each: ClassVar[bool] = False
    small: ClassVar[dict[str, Any]] = {"budget": Budget(fraction=0.5), "sinks": 1, "recent": 2, "run": 2}

    def __post_init__(self) -> None:
        least = {"sinks": (self.sinks, 0), "recent": (self.recent, 0), "run": (self.run, 1)}
        check_keys(type(self).__name__, self.budget, **least)
        if self.positions not in POSITIONS:
            raise BadRequest(f"positions={self.positions!r} is unknown; choose {' or '.join(map(repr, POSITIONS))}")

    @property
    def compact(self) -> bool:
        """Whether keys are turned by their places among those that are read."""
        return self.positions == "compact"

    @abstractmethod
    def weigh(self, view: KeyView, index: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Of the chosen columns `index` `[batch, group, run, chosen]`: which each query reads, besides what the mask
        says, `[batch, group, run, query, chosen]` bool, and what is added to its scores, of that shape or with one
        query for all; None for all of them, and for nothing."""

    @abstractmethod
    def choose(self, view: KeyView, most: int, limits: Tensor) -> Tensor:
        """`[batch, group, run, most]` columns out of `view.kept.candidates`, the best first and so many of them as
        `limits` `[batch, run]` says; what stands behind is not looked at."""

    def decide(self, view: View) -> Select:
        assert isinstance(view, KeyView)
        kept, runs = view.kept, view.runs
        limits = self.limits(kept)
        most = min(self.budget.count(kept.most + kept.later), kept.most)
        base = kept.index[:, None]
        if most:
            best = self.choose(view, most, limits)
            slots = torch.arange(most, device=best.device)
            best = torch.where(slots < limits[:, None, :, None], best, -1)
            base = torch.cat([base.expand(-1, best.shape[1], -1, -1), best], -1)
        if self.compact:
            beyond = runs.sight.keys
            ordered = torch.where(base < 0, beyond, base).sort(-1).values
            base = torch.where(ordered == beyond, -1, ordered)
        return Select(view.valid, base, torch.full((len(base),), runs.length, device=base.device))

    def limits(self, kept: Kept) -> Tensor:
        """`[batch, run]` how many of the candidates are read."""
        if self.budget.fraction is not None:
            share = torch.ceil((kept.counts + kept.later) * self.budget.fraction - 1e-6).long()
            return torch.minimum(share, kept.counts)
        return kept.counts.clamp(max=self.budget.count(kept.most + kept.later))

    def leaves_out(self, kept: Kept) -> bool:
        """Whether any run would read less than it sees."""
        return self.budget.count(kept.most + kept.later) < kept.most + kept.later

    def adds(self, layer: int) -> bool:
        """Whether this layer's attention is another one even where all is read, because of what `weigh` adds."""
        return False

    def fitted(self, adapter: Adapter) -> KeyPolicy:
        """The policy with what it needs for this model; raises `BadRequest` where it was made for another."""
        return self

    def install(self, model: Any, attachment: Attachment) -> None:
        adapter = readable(type(self).__name__, model)
        if not self.budget.is_full or self.offload or attachment.taped:
            attachment.policy = policy = self.fitted(adapter)
            Reading(adapter, policy, attachment).install()


@dataclass(frozen=True)
class Selection(KeyPolicy):
    """Base of policies that score every key and read the best."""

    @abstractmethod
    def score(self, view: KeyView) -> Tensor:
        """`[batch, group, run, key]` finite; one group for all heads or one per key head, one run for all or each."""

    def choose(self, view: KeyView, most: int, limits: Tensor) -> Tensor:
        scores = self.score(view)
        return scores.masked_fill(~view.kept.candidates[:, None], -torch.inf).topk(most, -1).indices

    def weigh(self, view: KeyView, index: Tensor) -> tuple[None, None]:
        return None, None


class Reading(Reader):
    """One policy's attention function on one model."""

    def __init__(self, adapter: Adapter, policy: KeyPolicy, attachment: Attachment):
        super().__init__(adapter, attachment)
        self.policy = policy
        self.rotary = Rotary(adapter) if policy.compact else None
        self.tree, self.real, self.sights = False, None, {}

    def install(self) -> None:
        self.put_on()
        self.attachment.wrap(self.adapter.base, self.offloading if self.policy.offload else self.growing)
        if self.rotary is not None:
            for index in self.layers:
                self.attachment.wrap(self.adapter.attention(index), self.rotary.unturned)

    @staticmethod
    def growing(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around the model's forward: a step whose attention is cheap must not copy the cache either."""
        for given in (*args, *kwargs.values()):
            let_grow(given)
        return forward(*args, **kwargs)

    def offloading(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around the model's forward: its cache lies in host memory, and this attention fetches from there."""
        kwargs, cache = self.with_cache(*args, **kwargs)
        name, layers = type(self.policy).__name__, []
        if cache is not None:
            layers = self.put_in(cache, GrowingLayer, lambda one: GrowingLayer.of(one, HOST), name, "offloads keys of")
        for layer in layers:
            layer.attended = True
        try:
            return forward(**kwargs)
        finally:
            for layer in layers:
                layer.attended = False

    def begin(self, view: View) -> None:
        if self.policy.offload and not self.running:
            raise BadRequest(
                f"{type(self.policy).__name__} offloads keys of a DynamicCache, and this decoder has a cache of its "
                "own; call model.generate without custom_generate, or give offload=False"
            )
        self.tree, self.real, self.sights = view.tree, view.valid, {}

    def sight(self, mask: Any, query: Tensor, key: Tensor) -> Sight:
        """What this forward may read; one object for all of its layers, as what is worked out is kept in it."""
        if isinstance(mask, Sight):
            return mask
        if id(mask) not in self.sights:
            rows, queries, keys = query.shape[0], query.shape[2], key.shape[2]
            if mask is None:
                made = torch.ones(rows, 1, queries, keys, dtype=torch.bool, device=query.device)
            else:
                made = mask[..., :keys].expand(rows, -1, -1, -1)
            real = self.real if self.real is not None and self.real.shape == (rows, queries) else None
            self.sights[id(mask)] = Masked(made, real, mask)  # which holds the mask, so that its id stays its own
        return self.sights[id(mask)]

    def attention(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **given: Any
    ) -> tuple[Tensor, Any]:
        layer, own = module.layer_idx, own_attention(module, self.usual)
        if not self.attachment.enabled or layer not in self.layers:
            return own(module, query, key, value, mask.plain if isinstance(mask, Sight) else mask, **given)
        near = self.sight(mask, query, key)
        sight = near.on(key.device)  # offloaded keys are chosen where they lie
        if sight.prompt is None:
            sight.prompt = self.prompt(sight, key)
        runs = sight.runs(1 if self.tree else self.policy.run)
        kept = runs.kept(self.policy.sinks, self.policy.recent, self.policy.each)
        whole = not self.attachment.taped and not self.policy.leaves_out(kept) and not self.policy.adds(layer)
        if whole and self.rotary is None:
            return own(module, query, key.to(query.device), value.to(query.device), near.plain, **given)
        if whole and self.rotary is not None and isinstance(near, Causal):
            query, key = self.turned(self.rotary, query, key.to(query.device), near)
            return own(module, query, key, value.to(query.device), near.plain, **given)
        scale, softcap = self.scoring(query, given)
        here = near.runs(runs.length)
        queries = here.split(query)
        view = KeyView(
            valid=sight.real,
            layers=self.adapter.depth,
            layer=layer,
            queries=queries.to(key.device),
            keys=key,
            values=value,
            runs=runs,
            kept=kept,
            scale=scale,
            state=self.state(layer, sight),
            rotary=self.rotary,
            tree=self.tree,
            prompt=sight.prompt[0],
            prompt_before=sight.prompt[1],
        )
        decision = self.attachment.decide(f"{SITE}.{layer}", view)
        assert isinstance(decision, Select)
        out = attended(self.policy, view, decision, queries, softcap)
        return here.join(out).transpose(1, 2).contiguous(), None

    @staticmethod
    def turned(rotary: Rotary, query: Tensor, key: Tensor, sight: Causal) -> tuple[Tensor, Tensor]:
        """Queries and keys `[batch, heads, token, dim]` turned by their places among the real keys of their row."""
        places = (sight.valid.int().cumsum(-1) - 1).clamp(min=0)[:, None]
        own = places[..., sight.first : sight.first + sight.queries]
        return rotary.turn(query, own, sight.keys), rotary.turn(key, places, sight.keys)

    def state(self, layer: int, sight: Sight) -> dict[str, Any]:
        """This layer's part of the attachment's state, emptied when a forward has nothing before it."""
        states = self.attachment.state.setdefault(SITE, {})
        if sight.begins:
            states[layer] = {}
        return states.setdefault(layer, {})

    def prompt(self, sight: Sight, keys: Tensor) -> tuple[Tensor, Tensor]:
        """`[batch]` tokens of the prompt now, and before this forward: see `KeyView`. Rows of the cache that are not
        the text that they were, as some were dropped, reordered or taken back, are a prompt up to here. Empty for a
        policy that does not read it. keys `[batch, kv_heads, key, dim]`: of the first layer that asks."""
        state = self.attachment.state
        if sight.begins:
            state.pop(SITE, None)
            state.pop(PROMPT, None)
        if "prompt" not in self.policy.reads:
            nothing = torch.empty(0, dtype=torch.long, device=keys.device)
            return nothing, nothing
        rank, real = sight.filled.cumsum(-1), sight.real.sum(-1)
        everything = (rank[:, -1] - real).clamp(min=0) * (not self.tree)
        columns = lambda prompt: torch.searchsorted(rank, ends(prompt) + 1)  # noqa: E731
        before, held = everything, state.get(PROMPT)
        if held is not None and len(held["tokens"]) == len(keys):
            prompt = held["tokens"]
            known = (prompt == 0) | (still(keys, columns(prompt), held["keys"]) & (prompt <= rank[:, -1]))
            before = prompt if bool(known.all()) else torch.where(known, prompt, everything)
        extends = not self.tree and (sight.queries > 1 or sight.begins)
        now = rank[:, -1] if extends else before
        if held is None or now is not held["tokens"]:
            state[PROMPT] = {"tokens": now, "keys": taken(keys, columns(now))}
        return now, before


def attended(
    policy: KeyPolicy, view: KeyView, decision: Select, queries: Tensor, softcap: float | None = None
) -> Tensor:
    """`[batch, heads, run, query, dim]` attention over the decided keys, as the policy weighs them. queries: those of
    the view, on the model's device; what is read is fetched to it."""
    index, device = decision.index, queries.device
    aside = Aside.of(view, index, device if policy.offload else None)
    if aside is not None:
        index = aside.columns[:, :, None]
    reads = view.runs.sight.reads(view.runs.slots, index)
    more, bias = policy.weigh(view, index)
    count, turned = index.shape[-1], None
    if view.rotary is not None:
        places = (reads.sum(-1) - 1).clamp(min=0).repeat_interleave(queries.shape[1] // index.shape[1], 1)
        queries = view.rotary.turn(queries, places, count)
        turned = view.rotary.table(count)
    if more is not None:
        reads = reads & more
    reads, bias = reads.to(device), None if bias is None else bias.to(device)
    if aside is None:
        keys, values, index = (x.to(device) for x in (view.keys, view.values, index.clamp(min=0)))
        return selected_attention(queries, keys, values, index, reads, view.scale, bias, softcap, turned)
    keys = aside.keys if view.rotary is None else view.rotary.turn(aside.keys, aside.places(), count)
    return gathered_attention(queries, keys[:, :, None], aside.values[:, :, None], reads, view.scale, bias, softcap)


def device_bytes(cache: Cache, attached: Attachment) -> int:
    """Bytes of keys and values that lie on the model's device between two forwards: those of the cache that are not
    offloaded, and the copies that the attached policy has set aside to read."""
    stays = [one for one in cache.layers if not (isinstance(one, GrowingLayer) and one.home is not None)]
    asides = [state["aside"] for state in attached.state.get(SITE, {}).values() if "aside" in state]
    return sum(map(layer_bytes, stays)) + sum(aside.bytes for aside in asides)
