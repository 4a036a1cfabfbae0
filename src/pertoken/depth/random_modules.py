"""Random modules: each token runs the big feed-forward block in random layers. The control of routers.

Of L layers a token at place p runs the big block in the k = budget.count(L) layers with the largest of L numbers that
are drawn from the seed, p and the layer; so a row is in a batch what it is alone, and every token has the same number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pertoken.core.card import Paper, method
from pertoken.core.policy import View
from pertoken.depth.duo import BIG, SMALL
from pertoken.depth.modules import ModulePolicy
from pertoken.depth.random_exit import uniform


@method(
    question="depth",
    shape="policy",
    exactness="approximate",
    paper=Paper("Big feed-forward blocks in random layers (control)"),
    writes={"layers"},
    baselines=("full",),
    baseline=True,
)
@dataclass(frozen=True)
class RandomModules(ModulePolicy):
    """The big block in `budget` random layers, drawn anew for each place."""

    seed: int = 0

    def choose(self, view: View) -> Tensor:
        places = view.valid.cumsum(-1) - 1 if view.positions is None else view.positions
        drawn = torch.stack([uniform(places, self.seed * 997 + layer) for layer in range(view.layers)], -1)
        order = drawn.argsort(dim=-1, descending=True).argsort(dim=-1)
        return torch.where(order < self.budget.count(view.layers), BIG, SMALL)
