"""Random routing: tokens take the edges of a grid by lot. The control for DiT routing.

Of the tokens at a node a share takes each edge: `budget` at every node, or a share of its own for each edge (`rates`,
see `keep_rates`). The lot depends on the seed, the node and the edge alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pertoken.core.budget import Budget
from pertoken.core.card import Paper, method
from pertoken.depth.routing import EDGES, Rates, RouteView, Routing, surest


@method(
    question="depth",
    shape="policy",
    exactness="approximate",
    paper=Paper("Random routing (control)"),
    writes={"routes"},
    needs={"image", "grid"},
    baselines=("full",),
    baseline=True,
)
@dataclass(frozen=True)
class RandomRouting(Routing):
    """Send random tokens through each edge, as many in every image; `budget`: the share of a node's tokens, on top of
    which `rates` may give one for each edge."""

    budget: Budget = Budget(fraction=0.5)
    rates: Rates | None = None
    seed: int = 0

    def taken(self, view: RouteView, edge: str) -> Tensor:
        share = self.budget.fraction if self.budget.fraction is not None else 1.0
        place = EDGES.index(edge)
        if self.rates is not None:
            own = {(row, column): shares for row, column, *shares in self.rates}
            share *= own.get((view.row, view.column), (0.0, 0.0))[place]
        generator = torch.Generator().manual_seed(((self.seed * 101 + view.row) * 101 + view.column) * 2 + place)
        lot = torch.rand(view.valid.shape[1], generator=generator).to(view.valid.device)
        return surest(lot.expand(view.valid.shape), view.valid, (view.valid.sum(-1) * share).round())
