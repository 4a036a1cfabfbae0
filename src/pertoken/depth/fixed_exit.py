"""Fixed exit: every generated token leaves after the same number of layers. The baseline of exits that look.

It loses on a model whose middle layers were not trained to be read by its head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pertoken.core.budget import Budget
from pertoken.core.card import Paper, method
from pertoken.depth.exits import ExitPolicy, ExitView


@method(
    question="depth",
    shape="policy",
    exactness="approximate",
    paper=Paper("Early exit at a fixed layer"),
    reads={"states"},
    writes={"layers"},
    baselines=("full",),
    baseline=True,
)
@dataclass(frozen=True)
class FixedExit(ExitPolicy):
    """Tokens leave after `budget` layers, for the model's own head."""

    budget: Budget = Budget(fraction=0.5)

    def asks(self, ran: int, layers: int) -> bool:
        return False

    def after(self, view: ExitView) -> Tensor:
        assert view.left is not None
        return torch.zeros_like(view.left)
