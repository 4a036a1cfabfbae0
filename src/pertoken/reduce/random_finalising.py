"""Random finalising: patches leave by lot, with what the head of their stage says of them. The control for DToP.

As many leave at every stage but the last, until `budget` patches of each image are left. The lot depends on the seed
and the stage alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pertoken.core.budget import Budget
from pertoken.core.card import Paper, method
from pertoken.reduce.finalising import Finalising
from pertoken.reduce.reduction import TokenView


@method(
    question="reduce",
    shape="policy",
    exactness="approximate",
    paper=Paper("Random finalising (control)"),
    writes={"image tokens"},
    needs={"image", "heads"},
    baselines=("full",),
    baseline=True,
)
@dataclass(frozen=True)
class RandomFinalising(Finalising):
    """Finalise random patches, as many in every image."""

    budget: Budget = Budget(fraction=0.5)
    seed: int = 0
    small: ClassVar[dict[str, Any]] = {}

    def finalised(self, view: TokenView, most: Tensor) -> Tensor:
        stages = self.ends[:-1]
        count = most // (len(stages) - stages.index(view.index))
        generator = torch.Generator().manual_seed(self.seed * 1009 + view.index)
        lot = torch.rand(view.valid.shape[1], generator=generator).to(view.valid.device)
        lot[: view.prefix] = torch.inf
        rank = lot.masked_fill(~view.valid, torch.inf).argsort(dim=-1, stable=True).argsort(-1)
        return rank < count[:, None]
