"""DMA: a trained score of each key's value says which keys are worth reading, and is added to their attention scores
(trainable dynamic mask attention, arXiv 2508.02124).

With v_j the values of key j in all key heads, one vector of (kv_heads * dim), and for each key head g a row of W and a
number A_g, per layer:

    z[g, j]     = A_g * softplus(W_g . v_j)                     fp32
    delta[g, j] = z[g, j]                    form="softplus" (the authors' code)
                = exp(min(z[g, j], clamp))   form="exp" (the paper, there without the bound)

A query reads, at key head g, itself and of the keys before it the `budget` with the largest z, the later one where they
are even; besides these the first `sinks` and the last `recent`, if any. Attention is softmax(scale * q . k + delta)
over them. The choice itself has no gradient: W and A learn through the added delta of the keys that are read, and q, k
and v as in any masked softmax (v through its delta as well).

All queries of a head rank keys alike, so what a run of queries reads is contained in the best of its first query and
the run itself: `choose` gives that, and `weigh` which of it each query reads, exactly. Nothing of the size [query, key]
is built, forward or backward, and the result does not depend on `run`: a prefill is what token by token gives.

Differs from the paper and its code:
- Causal in every mode. The code makes one choice over the whole sequence where it is given no 4-D mask, so that later
  keys take the places of earlier ones; here a query's choice is among what it sees, and padding takes no place.
- Keys are ranked by z to 12 bits after the point of its mantissa, as one token often stands several times and rounding
  must not choose among them. Ties go to the later key, and a token always reads itself (besides `budget`, as everywhere
  here: the paper's w is budget + 1). With A = 0 all keys are even, and an untrained DMA is a window of the last keys.
- exp is bounded, as it overflows in half precision; keys are ranked before the bound. Scores are fp32 in any precision.
- Where everything fits the budget delta is still added, as it was in training, unless A = 0. `Budget.full()` is the
  model as it was, without delta; `Budget(fraction=1.0)` reads everything with delta.
- z is kept from step to step of a decoding; the code computes it again from all values. No tiles are skipped: chosen
  keys are gathered.

At A = 0, as in transformers' Doge, the model is unchanged as long as everything fits, but W gets no gradient in the
first step; `noise` gives A a start. It loses where queries need different keys of the same head (associative recall
with more pairs than the budget), as the ranking does not depend on the query. Memory is not saved: all keys stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pertoken.attend.dynamic_mask import DynamicMask, KeyScorer, full_layers
from pertoken.attend.history import Mark
from pertoken.attend.key_view import KeyView
from pertoken.attend.selection import KeyPolicy
from pertoken.attend.sight import Causal
from pertoken.core.budget import Budget
from pertoken.core.card import Paper, method
from pertoken.core.errors import BadRequest
from pertoken.models.adapter import Adapter

RANKED = 2**24  # ranks held at once; more runs than fit choose in turn
EVEN = 2**11  # in units of the last place of fp32: z that differ by less are even


@dataclass(frozen=True)
class Ranks:
    """z `[batch, group, key]`; order `[batch, group, key]` int64, larger for the better key, never even."""

    z: Tensor
    order: Tensor

    @classmethod
    def of(cls, z: Tensor) -> Ranks:
        bits = (z.detach() + 0.0).contiguous().view(torch.int32).long()  # + 0.0: there are two zeros
        bits = (bits + (EVEN >> 1)) & -EVEN
        bits = bits ^ ((bits >> 63) & 0x7FFFFFFF)  # negative numbers count downwards
        return cls(z, (bits << 32) | torch.arange(z.shape[-1], device=z.device))


@dataclass(frozen=True)
class Known:
    """z `[batch, group, key]` of the first `end` columns; mark: of when they were worked out."""

    z: Tensor
    end: int
    mark: Mark

    def serves(self, view: KeyView, groups: int, end: int) -> bool:
        """Whether every row is still the one that it was, and longer."""
        if self.z.shape[:2] != (len(view.keys), groups) or end <= self.end:
            return False
        return bool(self.mark.holds(view).all())


@method(
    question="attend",
    shape="policy",
    exactness="approximate",
    paper=Paper("Trainable Dynamic Mask Sparse Attention", "2508.02124"),
    reads={"values"},
    writes={"keys read"},
    baselines=("full", "random_keys", "sink_window", "block_topk"),
)
@dataclass(frozen=True)
class DMA(KeyPolicy):
    """Read the keys whose values a trained score ranks highest, and add that score to theirs.

    mask: a `DynamicMask`, or where one was saved; None for an untrained one, made when it is attached.
    """

    sinks: int = 0
    recent: int = 0
    run: int = 128
    mask: DynamicMask | str | Path | None = None
    reads: ClassVar[frozenset[str]] = frozenset({"values"})
    each: ClassVar[bool] = True
    small: ClassVar[dict[str, Any]] = {"budget": Budget(fraction=0.5), "sinks": 1, "recent": 2, "run": 1}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compact:
            raise BadRequest(
                'DMA is trained with the positions of the text, and positions="compact" would give a query others in a '
                'prefill than in decoding; leave positions="original"'
            )

    @classmethod
    def for_model(
        cls, model: Any, *, form: str = "softplus", clamp: float = 4.0, noise: float = 0.02, seed: int = 0, **more: Any
    ) -> DMA:
        """To be trained on this model: with a new `DynamicMask` of these settings, and `more` of the policy's."""
        return cls(mask=DynamicMask.for_model(model, form=form, clamp=clamp, noise=noise, seed=seed), **more)

    def parameters(self) -> Iterator[nn.Parameter]:
        """What an optimizer trains inside `attach(model, policy)`; with the model's weights besides, inside
        `attach(model, policy, training=True)`. Use a small rate and no weight decay for A."""
        if not isinstance(self.mask, DynamicMask):
            raise BadRequest(
                "this DMA holds no parameters yet; make it with DMA.for_model(model), or use those of the attached "
                "policy: attached.policy.parameters()"
            )
        return self.mask.parameters()

    def fitted(self, adapter: Adapter) -> DMA:
        if self.mask is None:
            return replace(self, mask=DynamicMask.for_model(adapter.model))
        mask = self.mask if isinstance(self.mask, DynamicMask) else DynamicMask.load(self.mask).to(adapter.device)
        has = (mask.kv_heads, mask.dim, mask.layers)
        wants = (adapter.kv_heads, adapter.head_dim, full_layers(adapter))
        if has != wants:
            raise BadRequest(
                f"the dynamic mask was made for {has[0]} key heads of {has[1]} in layers {has[2]}, and "
                f"{type(adapter.model).__name__} has {wants[0]} of {wants[1]} in layers {wants[2]}; make one with "
                "DMA.for_model(model)"
            )
        return replace(self, mask=mask)

    def adds(self, layer: int) -> bool:
        assert isinstance(self.mask, DynamicMask)
        return not self.mask.scorer(layer).silent

    def ranks(self, view: KeyView) -> Ranks:
        """Of all keys of this layer; worked out once per view."""
        if "ranks" not in view.memo:
            assert isinstance(self.mask, DynamicMask)
            scorer, values = self.mask.scorer(view.layer), view.values
            if scorer.silent:
                z = torch.zeros(len(values), 1, values.shape[2], device=values.device)
            else:
                z = self.scored(view, scorer)
            view.memo["ranks"] = Ranks.of(z)
        return view.memo["ranks"]

    @staticmethod
    def scored(view: KeyView, scorer: KeyScorer) -> Tensor:
        """z of all keys; in decoding, of new ones only."""
        values, sight, known = view.values, view.runs.sight, view.state.pop("z", None)
        if torch.is_grad_enabled() or not isinstance(sight, Causal):
            return scorer(values)
        end = sight.first + sight.queries
        if known is not None and known.serves(view, values.shape[1], end):
            z = torch.cat([known.z[:, :, : known.end], scorer(values[:, :, known.end :])], -1)
        else:
            z = scorer(values)
        view.state["z"] = Known(z, end, Mark.now(view))
        return z

    def choose(self, view: KeyView, most: int, limits: Tensor) -> Tensor:
        order, candidates = self.ranks(view).order[:, :, None], view.kept.candidates[:, None]
        step = max(RANKED // (order.numel() or 1), 1)
        least = torch.iinfo(order.dtype).min
        return torch.cat(
            [torch.where(part, order, least).topk(most, -1).indices for part in candidates.split(step, 2)], 2
        )

    def weigh(self, view: KeyView, index: Tensor) -> tuple[Tensor | None, Tensor | None]:
        assert isinstance(self.mask, DynamicMask)
        ranks, silent = self.ranks(view), self.mask.scorer(view.layer).silent
        groups = ranks.z.shape[1]
        index = index.expand(-1, groups, -1, -1)
        flat = index.clamp(min=0).flatten(2)
        bias = None
        if not silent:
            bias = self.mask.delta(ranks.z).gather(-1, flat).view(index.shape)[:, :, :, None]
        if view.runs.length == 1 or self.budget.is_full:
            return None, bias
        order = ranks.order.gather(-1, flat).view(index.shape).masked_fill(index < 0, torch.iinfo(torch.long).min)
        best = order.argsort(-1, descending=True)
        ranked = index.gather(-1, best)
        runs = view.runs
        seen = runs.sight.reads(runs.slots, ranked)  # [batch, group, run, query, chosen], the best first
        place = view.kept.rank[:, None].expand(-1, groups, -1, -1).gather(-1, ranked.clamp(min=0))[:, :, :, None].int()
        own = (place * seen).amax(-1, keepdim=True)
        near = max(self.recent, 1)
        between = seen & (place > self.sinks) & (place <= own - near)
        taken = between.cumsum(-1, dtype=torch.int32)
        limit: Any = self.budget.tokens
        if self.budget.fraction is not None:
            among = (own - near - self.sinks).clamp(min=0)
            limit = torch.ceil(among * self.budget.fraction - 1e-6)
        read = seen & (~between | (taken <= limit))
        slots = torch.arange(best.shape[-1], device=best.device).expand_as(best)
        back = torch.empty_like(best).scatter_(-1, best, slots)
        return read.gather(-1, back[:, :, :, None].expand_as(read)), bias
