"""Static routing: the same edges of a grid for all tokens of all images, as many as the budget pays. The baseline for
DiT routing.

Edges are opened in a fixed order, if they fit and a token can be where they begin: first the diagonal, which is the
PVTv2 that the grid is made of, then the others from left to right and top to bottom. At half the budget it is half a
grid.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pertoken.core.budget import Budget
from pertoken.core.card import Paper, method
from pertoken.depth.routing import RouteView, Routing
from pertoken.models.grid import GridClassifier, GridConfig, costs

Edge = tuple[int, int, str]


@method(
    question="depth",
    shape="policy",
    exactness="approximate",
    paper=Paper("Static part of a grid (control)"),
    writes={"routes"},
    needs={"image", "grid"},
    baselines=("full", "random_routing"),
    baseline=True,
)
@dataclass(frozen=True)
class StaticRouting(Routing):
    """Send all tokens through the first edges; `budget`: of the whole grid's operations. edges: given ones instead, as
    (row, column, "transform" or "down")."""

    budget: Budget = Budget(fraction=0.5)
    edges: tuple[Edge, ...] | None = field(default=None, kw_only=True)

    def fitted(self, model: GridClassifier) -> StaticRouting:
        return self if self.edges is not None else replace(self, edges=affordable(model.config, self.budget))

    def taken(self, view: RouteView, edge: str) -> Tensor:
        opened = self.edges is not None and (view.row, view.column, edge) in self.edges
        return view.valid if opened else torch.zeros_like(view.valid)


def affordable(config: GridConfig, budget: Budget) -> tuple[Edge, ...]:
    """The edges that a share of the whole grid's operations pays, in the order of the module."""
    table = costs(config.base_config, *config.image_size)
    order = dict.fromkeys((*config.diagonal(), *config.edges()))
    left = (1.0 if budget.fraction is None else budget.fraction) * table.of(order) * (1 + 1e-9)
    opened, since = [], {0: 0}  # since: the column from which on a row has tokens
    for row, column, kind in order:
        cost = table.edge(row, kind)
        if cost <= left and column >= since.get(row, config.columns):
            opened.append((row, column, kind))
            left -= cost
            if kind == "down":
                since[row + 1] = min(column, since.get(row + 1, column))
    return tuple(opened)
