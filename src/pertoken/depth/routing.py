"""Ways of tokens through a grid: the mechanism of routing.

While a policy is attached to a `GridClassifier` it is asked at every node, in order, which tokens take the node's two
edges: through the transformer stage, and down to the next scale. It answers with a `Depth` of two layers, `TRANSFORM`
and `DOWN`. Tokens that take an edge are gathered, computed and put back (see `models.grid`); an edge that no token of
an image takes is not run for it.

A policy that reads the gates sees their log-odds. While the model trains, logistic noise is added to them (a two-way
Gumbel-Softmax of temperature `tau`), everything is computed, and what a token does is multiplied by its decision, 0 or
1, with the gradient of the gate's probability (straight-through). Other policies train as they run.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from pertoken.core.attach import Attachment
from pertoken.core.budget import Budget
from pertoken.core.decision import Depth
from pertoken.core.errors import BadRequest
from pertoken.core.policy import Policy, View
from pertoken.core.trace import Trace
from pertoken.models.edges import Map, Ways
from pertoken.models.grid import GridClassifier

SITE, GATES = "depth.routes", "gates"
EDGES = TRANSFORM, DOWN = "transform", "down"

Rates = tuple[tuple[int, int, float, float], ...]


@dataclass(frozen=True)
class RouteView(View):
    """The tokens at a node. valid `[image, token]`: which are there; has: which edges the node has; signals: by edge,
    the log-odds `[image, token]` of its gate, for a policy that reads gates."""

    row: int = 0
    column: int = 0
    has: tuple[str, ...] = EDGES


@dataclass(frozen=True)
class Routing(Policy):
    """Base of the policies that route tokens through a grid. See the module.

    budget: as a share; of what, each policy says. The full budget sends every token through every edge. tau:
    temperature of the noise while a policy that reads gates trains; noise: how much of it there is, 0 for none, in
    which case it trains with the decisions that it makes afterwards.
    """

    budget: Budget = Budget(fraction=1.0)
    tau: float = field(default=1.0, kw_only=True)
    noise: float = field(default=1.0, kw_only=True)
    reads: ClassVar[frozenset[str]] = frozenset()
    writes: ClassVar[frozenset[str]] = frozenset({"routes"})
    small: ClassVar[dict[str, Any]] = {"budget": Budget(fraction=0.5)}

    def __post_init__(self) -> None:
        if wrong := set(self.budget.units()) - {"fraction"}:
            raise BadRequest(
                f"{type(self).__name__} spends shares of a grid: budget {self.budget} means nothing to it (unit "
                f"{wrong.pop()}); give Budget(fraction=...)"
            )
        if self.tau <= 0:
            raise BadRequest(f"tau={self.tau} must be above 0; give a temperature such as 1.0")
        if self.noise < 0:
            raise BadRequest(f"noise={self.noise} must be 0 or above; give 1.0 for a two-way Gumbel-Softmax")

    @abstractmethod
    def taken(self, view: RouteView, edge: str) -> Tensor:
        """`[image, token]` bool: which tokens take this edge; those that are not there do not count."""

    def fitted(self, model: GridClassifier) -> Routing:
        """The policy with what it needs to know of this model."""
        return self

    def decide(self, view: View) -> Depth:
        assert isinstance(view, RouteView)
        layers = [
            view.valid
            if self.budget.is_full and edge in view.has
            else self.taken(view, edge) & view.valid
            if edge in view.has
            else torch.zeros_like(view.valid)
            for edge in EDGES
        ]
        return Depth(valid=view.valid, layers=torch.stack(layers, -1))

    def install(self, model: Any, attachment: Attachment) -> None:
        if not isinstance(model, GridClassifier):
            raise BadRequest(
                f"{type(self).__name__} routes tokens through a grid of stages, got {type(model).__name__}; give a "
                "GridClassifier (pertoken.models.grid) such as zoo:scenes-grid-routed; grid_of() makes one of a PVTv2"
            )
        if self.budget.is_full and not attachment.taped:
            return
        attachment.policy = self.fitted(model)
        attachment.set_attribute(model, "choose", Routes(self, model, attachment).choose)


class Routes:
    """A routing policy at work on one model."""

    def __init__(self, policy: Routing, model: GridClassifier, attachment: Attachment):
        self.policy, self.model, self.attachment = policy, model, attachment

    def choose(self, row: int, column: int, here: Map) -> Ways | None:
        if not self.attachment.enabled:
            return None
        has = EDGES if self.model.config.goes_down(row, column) else (TRANSFORM,)
        signals = self.odds(row, column, here) if GATES in self.policy.reads else {}
        view = RouteView(here.live, self.model.config.columns, signals, row=row, column=column, has=has)
        decision = self.attachment.decide(f"{SITE}.{row}.{column}", view)
        assert isinstance(decision, Depth)
        if decision.layers.shape != (*here.live.shape, len(EDGES)):
            raise BadRequest(
                f"the decision at row {row}, column {column} is about tokens {list(decision.layers.shape)} and there "
                f"are {list(here.live.shape)} here; replay with the model and the images that were recorded"
            )
        layers = decision.layers & here.live[..., None]
        made = {edge: layers[..., place] for place, edge in enumerate(EDGES)}
        if self.model.training and signals:
            made = {edge: straight_through(hard, signals.get(edge), here) for edge, hard in made.items()}
        return Ways(**made)

    def odds(self, row: int, column: int, here: Map) -> dict[str, Tensor]:
        """Log-odds of a node's gates, by edge; with noise while the model trains."""
        found, normed = {}, F.layer_norm(here.hidden, here.hidden.shape[-1:])
        for edge, gate in self.model.gates[f"{row}_{column}"].items():  # type: ignore[operator]
            logits = gate(normed)
            found[edge] = (logits[..., 0] - logits[..., 1]).float()
            if self.model.training:
                chance = torch.rand_like(found[edge]).clamp(1e-6, 1 - 1e-6)
                found[edge] = (found[edge] + self.policy.noise * chance.logit()) / self.policy.tau
        return found


def straight_through(hard: Tensor, odds: Tensor | None, here: Map) -> Tensor:
    """`hard` `[image, token]` bool as 0 and 1 with the gradient of the gate's probability."""
    made = hard.to(here.hidden.dtype)
    if odds is None:
        return made
    soft = odds.sigmoid().to(made.dtype) * here.live
    return made + (soft - soft.detach())  # in this order exactly 0 or 1, so that a maximum has all open ones as equals


def surest(score: Tensor, valid: Tensor, count: Tensor) -> Tensor:
    """`[image, token]` bool: the `count` `[image]` valid tokens of the highest scores, the first ones among equals."""
    rank = score.masked_fill(~valid, -torch.inf).argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return (rank < count[:, None]) & valid


def keep_rates(trace: Trace) -> Rates:
    """Row, column and the shares of a node's tokens that took its two edges, of a recording of one forward or more."""
    there: dict[tuple[int, int], list[Tensor]] = {}
    for step in trace.steps:
        if step.site.startswith(SITE):
            row, column = map(int, step.site.split(".")[-2:])
            decision: Any = step.decision
            taken = (decision.layers & decision.valid[..., None]).sum((0, 1))
            there.setdefault((row, column), []).append(torch.cat([decision.valid.sum()[None], taken]))
    found = []
    for (row, column), counts in there.items():
        tokens, through, down = torch.stack(counts).sum(0).tolist()
        found.append((row, column, through / max(tokens, 1), down / max(tokens, 1)))
    return tuple(found)
