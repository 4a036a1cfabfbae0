"""Fixed modules: every token runs the big feed-forward block in the same layers. The baseline of routers.

With L layers and k = budget.count(L), the layers are `route`, or else the first, the last and evenly spaced ones
between. Duo-LLM's "fixed" is the route of k big blocks with the least mean loss on a text (`oracle.best_fixed`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pertoken.core.budget import Budget
from pertoken.core.card import Paper, method
from pertoken.core.errors import BadRequest
from pertoken.core.policy import View
from pertoken.depth.duo import BIG, SKIP, SMALL
from pertoken.depth.modules import ModulePolicy
from pertoken.depth.skip_layers import spaced


def spread(view: View, budget: Budget) -> Tensor:
    """`[batch, token, layer]`: `budget` big blocks, evenly spaced, small ones between."""
    count = budget.count(view.layers)
    big = spaced(count, view.layers) if count else []
    route = torch.tensor([BIG if layer in big else SMALL for layer in range(view.layers)], device=view.valid.device)
    return route.expand(*view.valid.shape, -1)


@method(
    question="depth",
    shape="policy",
    exactness="approximate",
    paper=Paper("Big feed-forward blocks in fixed layers"),
    writes={"layers"},
    baselines=("full", "random_modules"),
    baseline=True,
)
@dataclass(frozen=True)
class FixedModules(ModulePolicy):
    """The big block in `budget` evenly spaced layers, or where `route` has 0; small (1) or none (2) in the others."""

    route: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.route is not None and not set(self.route) <= {BIG, SMALL, SKIP}:
            raise BadRequest(f"route={self.route} must be of {BIG} (big), {SMALL} (small) and {SKIP} (none)")

    def choose(self, view: View) -> Tensor:
        if self.route is None:
            return spread(view, self.budget)
        if len(self.route) != view.layers:
            raise BadRequest(f"route={self.route} has {len(self.route)} entries; the model has {view.layers} layers")
        return torch.tensor(self.route, device=view.valid.device).expand(*view.valid.shape, -1)
