"""DyMU: tokens that are alike enough become one, so that an image keeps as many as there is to see in it.

Source: "DyMU: Dynamic Merging and Virtual Unmerging for Efficient VLMs" (arXiv 2504.17040). Two parts:
- Dynamic merging in the image encoder: at layer l every proposal of the bipartite matching (`matching`) whose
  similarity m(a) is above tau_l is accepted, at most half of the patches. tau is calibrated (`thresholds`) so that
  images keep the wanted number on average. Merged tokens are means weighted by size, and attention is proportional, as
  in ToMe.
- Virtual unmerging in the language model of a LLaVA (`language`): a merged token stands at all the positions of its
  members within attention, and only there.

budget: mean number, or share, of the patches left. Any between the calibrated ones may be asked for, at each request.
thresholds: from `calibrate`, or a file of them.

Differs from the paper's code: batches of any size and several images; the mean of thresholds in float64; a merged token
is divided by its size exactly; one cache entry per merged token instead of one per original position.

The paper's own tables say that at equal mean counts dynamic merging is no better than ToMe with virtual unmerging on
average; it is the unmerging that gains. What dynamics gives is a count that follows the image. It loses its calibration
with another model, resolution or kind of image.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from pertoken.core.budget import Budget
from pertoken.core.card import Paper, method
from pertoken.core.decision import Assign
from pertoken.core.errors import BadRequest
from pertoken.core.policy import View
from pertoken.models.vision import VisionAdapter
from pertoken.reduce.matching import best, merged, most, proposals
from pertoken.reduce.reduction import Reduction, TokenView
from pertoken.reduce.thresholds import Thresholds
from pertoken.reduce.tokens import Tokens


@method(
    question="reduce",
    shape="policy",
    exactness="approximate",
    paper=Paper("DyMU: Dynamic Merging and Virtual Unmerging for Efficient VLMs", "2504.17040"),
    reads={"keys"},
    writes={"image tokens"},
    needs={"image", "thresholds"},
    baselines=("tome", "random_pruning"),
)
@dataclass(frozen=True)
class DyMU(Reduction):
    """Merge tokens above a calibrated similarity: more where there is less to see."""

    budget: Budget = Budget(fraction=1 / 3)
    thresholds: Thresholds | str | Path | None = None
    taus: tuple[float, ...] = field(default=(), repr=False)

    def fitted(self, adapter: VisionAdapter, model: Any) -> DyMU:
        known = self.thresholds
        if known is None:
            raise BadRequest(
                "DyMU needs thresholds for this model; give thresholds=calibrate(model, images) from "
                "pertoken.reduce.thresholds, or the path of a file of them"
            )
        known = known if isinstance(known, Thresholds) else Thresholds.load(known)
        known.check(adapter)
        return replace(self, thresholds=known, taus=known.at(self.share(known.patches)))

    def share(self, patches: int) -> float:
        """Mean share of the patches left that the budget asks for."""
        if self.budget.fraction is not None:
            return self.budget.fraction
        return self.budget.count(patches) / patches

    def acts(self, index: int, tokens: Tokens, patches: int, layers: int) -> bool:
        assert isinstance(self.thresholds, Thresholds)
        self.thresholds.check_size(patches)
        return index < len(self.taus) and self.taus[index] < 1 and tokens.longest > tokens.prefix + 1

    def decide(self, view: View) -> Assign:
        assert isinstance(view, TokenView)
        scores, partner = proposals(view)
        tau = self.taus[view.index] if view.index < len(self.taus) else 1.0
        accepted = best(scores, most(view)) & (scores > (tau if tau < 1 else torch.inf))
        return merged(view, accepted, partner)
