"""Random pruning: tokens leave by lot. The control for every policy that chooses which patches are worth their cost.

The lot depends on the seed and the layer alone: the same places leave every image. Schedule and budget as in
`scheduled`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from pertoken.core.card import Paper, method
from pertoken.core.decision import Assign
from pertoken.core.policy import View
from pertoken.reduce.reduction import TokenView, stay
from pertoken.reduce.scheduled import Scheduled


@method(
    question="reduce",
    shape="policy",
    exactness="approximate",
    paper=Paper("Random pruning (control)"),
    writes={"image tokens"},
    needs={"image"},
    baselines=("full",),
    baseline=True,
)
@dataclass(frozen=True)
class RandomPruning(Scheduled):
    """Drop random patches, as many in every image."""

    returns: ClassVar[str] = "kept"
    seed: int = 0

    def decide(self, view: View) -> Assign:
        assert isinstance(view, TokenView)
        count = self.taken(view.index, view.tokens, view.patches, view.layers)
        generator = torch.Generator().manual_seed(self.seed * 1009 + view.index)
        lot = torch.rand(view.valid.shape[1], generator=generator).to(view.valid.device)
        lot[: view.prefix] = torch.inf
        keep = torch.ones_like(view.valid)
        keep[:, lot.argsort(stable=True)[:count]] = False
        return stay(view, keep)
