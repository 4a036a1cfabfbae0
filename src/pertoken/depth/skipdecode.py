"""SkipDecode: the later a token is generated, the fewer layers it runs, the top layers always; the batch stays whole.

Source: Del Corro et al., "SkipDecode: Autoregressive Skip Decoding with Batching and Caching for Efficient LLM
Inference", arXiv 2307.02628; bounds and warm-up as published, the rounding is ours (the paper's is not printed).

With L layers, bounds most >= least, a reference length T and w warm-up layers, the token of generation step t runs

    N(t) = round(most - (most - least) * min(t, T) / T)       layers: 0 .. w-1 and L - (N(t) - w) .. L-1

so that lower layers are passed over and a later token runs a subset of what an earlier one ran. t counts generated
tokens; the prompt runs all layers. With anchor="sequence", t is the place in the row less `prompt`. The budget is the
mean of N over the reference length: most + least = 2 * budget; `span` says how far the bounds lie from it, `bounds`
gives them outright.

Keys: a layer holds none for a token that passed over it ("none"). A query at step t in layer l finds the keys of all
earlier tokens of its row there, because they ran it too; nothing is recomputed or filled in.

Differs from the paper: t is each row's own step, also where a decoder lets rows go on at different speeds, so that a
row is in a batch what it is alone; in plain batched generation this is the paper's one count per column.

Train with it attached (`attach(model, SkipDecode(...), training=True)`): the ordinary loss then runs the schedule, as
in the paper. It loses on a model that was not: the jump over the lower layers is out of its distribution.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from pertoken.core.attach import Attachment
from pertoken.core.card import Paper, method
from pertoken.core.decision import Depth
from pertoken.core.errors import BadRequest
from pertoken.core.policy import View
from pertoken.depth.layers import LayerPolicy
from pertoken.models.kind import kind_of

ANCHORS = ("generation", "sequence")


@lru_cache(maxsize=64)
def layers_by_step(most: int, least: int, reference: int, warmup: int, layers: int) -> Tensor:
    """`[step, layer]` bool for steps 0..reference; later steps are as the last."""
    step = torch.arange(reference + 1, dtype=torch.double)
    count = (most - (most - least) * step / max(reference, 1)).round().clamp(least, most)[:, None]
    layer = torch.arange(layers)
    return (layer < warmup) | (layer >= layers - (count - warmup))


@method(
    question="depth",
    shape="policy",
    exactness="approximate",
    paper=Paper(
        "SkipDecode: Autoregressive Skip Decoding with Batching and Caching for Efficient LLM Inference", "2307.02628"
    ),
    reads={"positions"},
    writes={"layers"},
    baselines=("full", "random_layers", "skip_layers"),
)
@dataclass(frozen=True)
class SkipDecode(LayerPolicy):
    """Later tokens run fewer layers: the first `warmup` and the top ones; `budget` is the mean over `reference` steps.

    budget: layers, or share of the depth (1 / the speed-up aimed at); reference: steps after which the fewest layers
    are run; span: the bounds are (1 + span) and (1 - span) times the budget, as far as there are layers; bounds: (most,
    least) instead of budget and span; anchor: "generation" or "sequence" (see the module); prompt: for the latter,
    places that run all layers before the schedule begins.
    """

    reference: int = 128
    warmup: int = 1
    span: float = 0.5
    bounds: tuple[int, int] | None = None
    anchor: str = "generation"
    prompt: int = 0
    reads: ClassVar[frozenset[str]] = frozenset({"positions"})
    small: ClassVar[dict[str, Any]] = {"span": 0.0, "anchor": "sequence"}

    def __post_init__(self) -> None:
        if self.anchor not in ANCHORS:
            raise BadRequest(f"anchor={self.anchor!r} is unknown; choose {' or '.join(map(repr, ANCHORS))}")
        if self.prompt < 0 or (self.prompt and self.anchor != "sequence"):
            raise BadRequest(
                f'prompt={self.prompt} must be at least 0, and is for anchor="sequence"; with "generation" the prompt '
                "is known"
            )
        if self.reference < 1 or self.warmup < 1 or not 0 <= self.span <= 1:
            raise BadRequest(
                f"reference={self.reference} and warmup={self.warmup} must be at least 1 (the first layer always runs) "
                f"and span={self.span} in [0, 1]"
            )
        if self.bounds is not None and self.bounds[0] < self.bounds[1]:
            raise BadRequest(
                f"bounds={self.bounds} would let later tokens run more layers than earlier ones, whose keys would be "
                "missing there; give (most, least) with most >= least"
            )

    def limits(self, layers: int) -> tuple[int, int]:
        """(most, least) for a model of so many layers; raises `BadRequest` for a budget that no depth can meet."""
        if self.budget.is_full:
            return layers, layers
        if self.bounds is None:
            mean = self.budget.count(layers)
            least = max(round((1 - self.span) * mean), self.warmup, 2 * mean - layers)
            most = 2 * mean - least
        else:
            most, least = self.bounds
        if not self.warmup <= least <= most <= layers:
            asked = f"bounds={self.bounds}" if self.bounds is not None else f"a budget of {self.budget}"
            raise BadRequest(
                f"{asked} cannot be met: {most} down to {least} layers of {layers}, of which {self.warmup} warm-up "
                f"layer(s) always run; give a mean between {self.warmup} and {layers}"
            )
        return most, least

    def install(self, model: Any, attachment: Attachment) -> None:
        self.limits(model.config.num_hidden_layers)
        if kind_of(model) != "causal" and self.anchor == "generation":
            raise BadRequest(
                "SkipDecode counts generated tokens, and this model fills in a canvas in any order; give "
                'anchor="sequence", or a causal model'
            )
        super().install(model, attachment)

    def decide(self, view: View) -> Depth:
        most, least = self.limits(view.layers)
        table = layers_by_step(most, least, self.reference, self.warmup, view.layers).to(view.valid.device)
        step = view.valid.cumsum(-1) - 1 if view.positions is None else view.positions
        if least == view.layers:
            return Depth(valid=view.valid, layers=table[0].expand(*view.valid.shape, -1))
        if self.anchor == "generation" and view.prompt is not None:  # unknown where a stack only times its steps
            step = step - view.prompt[:, None]
        elif self.anchor == "sequence":
            step = step - self.prompt
        layers = table[step.clamp(0, self.reference)]
        return Depth(valid=view.valid, layers=layers | (step < 0)[..., None])
