"""Eviction: keys that a rule gives up leave the cache, so that memory and time follow what is kept, not what was read.

The second mechanism of this folder. While a policy is attached, the cache that a forward is given (or makes) holds its
full-attention layers as `KeptLayer`s; the attention of such a layer runs on the kept keys only, and after it a rule
chooses which stay. A prompt is read by full attention and evicted from layer by layer, so that its keys are never all
in memory at once; a prompt that comes in chunks is evicted from after each, and later chunks read what is left.
Positions are those of the text: keys stay rotated as they were. Layers with a sliding window are left as they are.

What is lost is lost: choose `Selection` policies where a key may be needed again.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from pertoken.attend.kept import KeptLayer
from pertoken.attend.reader import Reader, check_keys, readable
from pertoken.attend.sight import Causal, Sight
from pertoken.core.attach import Attachment
from pertoken.core.budget import Budget
from pertoken.core.decision import Select
from pertoken.core.errors import BadRequest
from pertoken.core.policy import Policy, View
from pertoken.models.adapter import Adapter
from pertoken.models.attention import own_attention
from pertoken.ops.weighed_attention import attention_mass, weighed_attention

SITE = "attend.kept"
NO_LIMIT = 2**62


@dataclass(frozen=True)
class KeptView(View):
    """What a rule sees of one layer after its attention.

    keys and values `[batch, kv_heads, kept, dim]`; places and real `[batch, groups, kept]`: the column of each in its
    row, and whether it is a key of a real token; mass and total `[batch, kv_heads, kept]`: attention that each got from
    the watched queries of this forward, and of all since it was stored, None where nothing was watched; prompt
    `[batch]`: tokens of the prompt; due `[batch]` bool: whether the row gives up keys now; queries: columns of this
    forward; most: no row keeps more if all are due.
    """

    layer: int = 0
    keys: Tensor = field(default_factory=lambda: torch.empty(0))
    values: Tensor = field(default_factory=lambda: torch.empty(0))
    places: Tensor = field(default_factory=lambda: torch.empty(0))
    real: Tensor = field(default_factory=lambda: torch.empty(0))
    mass: Tensor | None = None
    total: Tensor | None = None
    prompt: Tensor = field(default_factory=lambda: torch.empty(0))
    due: Tensor = field(default_factory=lambda: torch.empty(0))
    queries: int = 0
    most: int = 0


@dataclass(frozen=True)
class Eviction(Policy):
    """Base of the policies that evict.

    budget: keys that each key head keeps in all, in tokens or as a share of the prompt (what a row read several tokens
    at a time, and its first; a share of 1 evicts nothing); the first `sinks` and the last `latest(limits)` stay in any
    case. Its decisions are `Select`s of the places that the next token will read besides itself.
    """

    budget: Budget = Budget(tokens=1024)
    sinks: int = 0
    reads: ClassVar[frozenset[str]] = frozenset({"queries", "keys"})
    writes: ClassVar[frozenset[str]] = frozenset({"keys read"})
    saves: ClassVar[str] = "memory"

    def __post_init__(self) -> None:
        check_keys(type(self).__name__, self.budget, sinks=(self.sinks, 0))
        if self.budget.tokens is not None and self.sinks > self.budget.tokens:
            raise BadRequest(
                f"sinks={self.sinks} are more keys than the budget of {self.budget.tokens}, which holds them too; give "
                "fewer sinks or a larger budget"
            )

    @property
    @abstractmethod
    def watched(self) -> int | None:
        """Of how many of its last queries a forward's attention is weighed: a row with fewer new tokens evicts nothing.
        None for all, in which case each forward evicts and `view.total` is kept."""

    @abstractmethod
    def score(self, view: KeptView) -> Tensor:
        """`[batch, groups, kept]` finite, the best stay; one group for all heads or one per key head."""

    @abstractmethod
    def latest(self, limits: Tensor) -> Tensor:
        """`[batch]` of the `limits` `[batch]` keys, how many are the latest ones, whatever their score."""

    def limits(self, prompt: Tensor) -> Tensor:
        """`[batch]` keys that a head keeps, for prompts of `[batch]` tokens."""
        if self.budget.is_full or self.budget.fraction == 1:
            return torch.full_like(prompt, NO_LIMIT)
        if self.budget.fraction is not None:
            share = torch.ceil(prompt.double() * self.budget.fraction - 1e-9).long()
            limits = share.clamp(min=1 if self.budget.fraction else 0)
        else:
            limits = torch.full_like(prompt, self.budget.tokens or 0)
        return torch.maximum(limits, self.latest(limits) + self.sinks)

    def decide(self, view: View) -> Select:
        assert isinstance(view, KeptView)
        kept = view.places.shape[-1]
        limits = self.limits(view.prompt)
        rank = view.real.cumsum(-1)
        total = rank[..., -1:]
        stays = torch.where(view.due[:, None, None], torch.minimum(limits[:, None, None], total), total)
        width = kept
        if view.queries > 1:
            width = int(stays.max())
        elif self.watched is None:
            width = min(kept, view.most)
        scores = view.real.float() if view.mass is None else self.score(view)
        scores = scores.expand(-1, max(scores.shape[1], view.real.shape[1]), -1)
        latest = self.latest(limits)[:, None, None]
        surely = view.real & ((rank <= self.sinks) | (rank > total - latest))
        scores = scores.masked_fill(surely, torch.inf).masked_fill(~view.real, -torch.inf)
        best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :width]  # of equals the earlier
        places = view.places.expand(-1, best.shape[1], -1).gather(-1, best)
        places = torch.where(torch.arange(width, device=best.device) < stays, places, -1).sort(-1).values
        one = torch.ones(len(best), 1, dtype=torch.bool, device=best.device)
        return Select(one, places[:, :, None], one[:, 0].long())

    def install(self, model: Any, attachment: Attachment) -> None:
        adapter = readable(type(self).__name__, model)
        if not self.budget.is_full or attachment.taped:
            Evicting(adapter, self, attachment).install()


class Evicting(Reader):
    """One policy's attention function on one model, and the caches of the forwards that it runs in."""

    def __init__(self, adapter: Adapter, policy: Eviction, attachment: Attachment):
        super().__init__(adapter, attachment)
        self.policy = policy
        self.cache: DynamicCache | None = None
        self.worked_out: dict[str, Any] = {}  # for all layers of the forward

    def install(self) -> None:
        self.put_on()
        self.attachment.wrap(self.adapter.base, self.around)

    def begin(self, view: View) -> None:
        if not self.running:
            raise BadRequest(
                f"{type(self.policy).__name__} and this decoder both decide what the cache holds; call "
                "model.generate without custom_generate, or give the decoder a policy that evicts nothing"
            )

    def around(self, forward: Any, *args: Any, **kwargs: Any) -> Any:
        """Around the model's forward: its cache gets kept layers."""
        kwargs, cache = self.with_cache(*args, **kwargs)
        name = type(self.policy).__name__
        layers = [] if cache is None else self.put_in(cache, KeptLayer, KeptLayer.of, name, "evicts from")
        for layer in layers:
            layer.attended = True
        self.cache, self.worked_out = cache, {}
        try:
            return forward(**kwargs)
        finally:
            self.cache = None
            for layer in layers:
                layer.attended = False

    def attention(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **given: Any
    ) -> tuple[Tensor, Any]:
        layer, own = module.layer_idx, own_attention(module, self.usual)
        if self.cache is None or layer not in self.layers:
            return own(module, query, key, value, mask.plain if isinstance(mask, Sight) else mask, **given)
        if not isinstance(mask, Causal):
            raise BadRequest(
                f"{type(self.policy).__name__} evicts where each token reads all before it; give attention_mask as "
                "[batch, token] with 0 for padding, not a mask of each query and key"
            )
        kept, sight = self.cache.layers[layer], mask
        assert isinstance(kept, KeptLayer) and kept.places is not None
        scale, softcap = self.scoring(query, given)
        watched, until = self.policy.watched, self.once("until", lambda: self.until(sight))
        real, over = self.real(kept, sight), self.over(kept, sight)
        mass = None
        if kept.whole and watched is not None:
            out = own(module, query, key, value, sight.plain, **given)[0]
        else:
            out, mass = weighed_attention(query, key, value, kept.places, real, until, scale, softcap)
            out = out.transpose(1, 2).contiguous()
        if watched is None and mass is not None:
            before = kept.beside.get("mass")
            kept.beside["mass"] = mass if before is None else before + mass
        elif watched is not None:
            mass, over = None, over and (sight.queries >= watched or self.attachment.taped)
            if over and sight.queries >= watched:
                last = self.once("last", lambda: until.topk(watched, -1))
                asked = query.gather(2, last.indices[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[-1]))
                mass = attention_mass(asked, key, kept.places, real, last.values, scale, softcap)
        if over:
            self.shrink(layer, kept, sight, real, mass)
        return out, None

    def once(self, name: str, make: Any) -> Any:
        """What `make` gives, worked out by the first layer of the forward."""
        if name not in self.worked_out:
            self.worked_out[name] = make()
        return self.worked_out[name]

    @staticmethod
    def until(sight: Causal) -> Tensor:
        """`[batch, query]` the last place that each query reads, its own; -1 at padding."""
        own = torch.arange(sight.first, sight.keys, device=sight.valid.device)
        return torch.where(sight.real, own, -1)

    @staticmethod
    def real(kept: KeptLayer, sight: Sight) -> Tensor:
        """`[batch, groups, kept]` bool: which kept keys are those of real tokens."""
        assert kept.places is not None
        valid = sight.valid[:, None].expand(-1, kept.places.shape[1], -1)
        return valid.gather(-1, kept.places.clamp(min=0)) & (kept.places >= 0)

    def over(self, kept: KeptLayer, sight: Causal) -> bool:
        """Whether some row may hold more than it is to keep. Limits change with the prompt only: they are read to the
        host once per forward of several tokens."""
        policy, new = self.policy, sight.real.sum(-1)
        if sight.queries > 1 or "prompt" not in kept.rows:
            before = sight.valid[:, : sight.first].sum(-1)
            told = kept.rows.get("prompt", before)
            kept.rows["prompt"] = told + torch.where((before == 0) | (new > 1), new, 0)
        if sight.queries > 1 or kept.bounds is None or kept.bounds[0] != policy:
            ends = self.once("bounds", lambda: torch.stack(policy.limits(kept.rows["prompt"]).aminmax()).tolist())
            kept.bounds = (policy, *ends)
        return kept.kept > kept.bounds[1] or self.attachment.taped

    def shrink(self, layer: int, kept: KeptLayer, sight: Causal, real: Tensor, mass: Tensor | None) -> None:
        """Let the policy choose what stays in a layer, and free the rest."""
        assert kept.bounds is not None and kept.held is not None
        keys, values, places = kept.held
        view = KeptView(
            valid=sight.real,
            layers=self.adapter.depth,
            layer=layer,
            keys=keys,
            values=values,
            places=places,
            real=real,
            mass=mass,
            total=kept.beside.get("mass"),
            prompt=kept.rows["prompt"],
            due=sight.real.sum(-1) >= (self.policy.watched or 1),
            queries=sight.queries,
            most=kept.bounds[2],
        )
        decision = self.attachment.decide(f"{SITE}.{layer}", view)
        assert isinstance(decision, Select)
        kept.evict(decision.index[:, :, 0])
