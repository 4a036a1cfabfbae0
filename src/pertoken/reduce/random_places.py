"""Random places: of the model's own tokens of a clip some stay, by lot. The control for policies that compress clips.

The lot depends on the seed alone: the same places leave every clip of a length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pertoken.core.card import Paper, method
from pertoken.core.decision import Keep
from pertoken.core.policy import View
from pertoken.models.llava import Llava
from pertoken.reduce.clips import Clips, Offer


@method(
    question="reduce",
    shape="policy",
    exactness="approximate",
    paper=Paper("Random pruning of clips (control)"),
    writes={"video tokens"},
    needs={"video"},
    baselines=("full",),
    baseline=True,
)
@dataclass(frozen=True)
class RandomPlaces(Clips):
    """Keep random tokens of a clip, as many in every clip."""

    seed: int = 0

    def offer(self, llava: Llava, states: Tensor, most: int, whole: bool) -> Offer:
        return Offer.of(llava.projected(llava.pooled(states)))

    def decide(self, view: View) -> Keep:
        count = view.valid.shape[1]
        lot = torch.rand(count, generator=torch.Generator().manual_seed(self.seed))
        keep = torch.zeros_like(view.valid)
        keep[:, lot.argsort(stable=True)[: max(self.budget.count(count), 1)].to(keep.device)] = True
        return Keep(view.valid, keep & view.valid)
