"""DiT: every image token chooses for itself, at every node of a grid, whether it is transformed and whether it goes on
to the next scale.

Source: "DiT: Efficient Vision Transformers with Dynamic Token Routing", arXiv 2308.03409, not to be confused with
Diffusion Transformers. No code was ever released and its equations are not to be had as text: what the abstract, the
figures and an explanation in words say is followed, and the rest, marked (r), is a reconstruction.

At node (i, j) with tokens F `[image, token, width]` (`models.grid` has the grid and the update):

    pi_e = softmax(LN(F) W_e + b_e)  [image, token, 2]    for the edges e: transform, down
    g_e = 1 where a Gumbel-Softmax sample of pi_e (temperature tau) is its first entry, else 0; straight-through
    C_space = sum over nodes of  sum(g_transform) c_token + max(g_transform) c_once + outputs(g_down) c_output
    L = L_task + weight * (C_space / C_base - mu)^2       (r)

C_base is the cost of the PVTv2 on the grid's diagonal, mu the wanted ratio; costs are multiply-adds of the edges.
outputs(g) is the number of places of the next row in whose receptive field a token goes down: a patch embedding costs
what it makes. c_once is what a stage costs an image before its first token: keys, values and the map of the depth-wise
convolution. The weights of the gates are moving averages, 0.9 old and 0.1 new (r, the paper gives no number), and begin
with all gates open (log-odds 3). Without training there is no noise: a gate is open where its log-odds exceed `cutoff`,
0 for the gates' own choice. Another cutoff is another cost without training again (`cutoff_for`).

It differs from the paper where that is not known: tau = 1, the norm before the gates, weight and mu, one gate for each
edge and token, heads that read all rows. An edge down is masked after its norm, so that a token that does not go down
is 0 to its neighbours and not the norm's bias. While gates learn, g multiplies each thing that a block
adds to a token, not the stage's result as a whole: the same values, another gradient (to a closed gate, without the
token's own features in the block's convolution). Biases of gates are moving averages like their weights. No edge goes
down behind the last stages.

It loses where a map is small: gathering and putting back cost as much as a few tokens of 24 or 32 numbers do, so fewer
operations are not yet less time there. Keys of a stage are those of all tokens, so the first token of an image is the
dearest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pertoken.core.attach import attach
from pertoken.core.card import Paper, method
from pertoken.core.errors import BadRequest
from pertoken.depth.routing import GATES, RouteView, Routing, surest
from pertoken.models.grid import GridClassifier

FAR = 30.0  # log-odds beyond which no gate is


@method(
    question="depth",
    shape="policy",
    exactness="approximate",
    paper=Paper("Efficient Vision Transformers with Dynamic Token Routing (DiT)", "2308.03409"),
    reads={"gates"},
    writes={"routes"},
    needs={"image", "grid"},
    baselines=("full", "static_routing", "random_routing"),
)
@dataclass(frozen=True)
class DiTRouting(Routing):
    """Each token takes the edges of a grid that its gates open; `budget`: the most tokens of a node, as a share, that
    take an edge, those of the highest log-odds first."""

    cutoff: float = 0.0
    reads: ClassVar[frozenset[str]] = frozenset({GATES})

    def taken(self, view: RouteView, edge: str) -> Tensor:
        odds = view.signals[edge]
        allowed = self.budget.fraction if self.budget.fraction is not None else 1.0
        if allowed == 1.0:
            return odds > self.cutoff
        most = (view.valid.sum(-1) * allowed).add(1e-6).floor()
        return surest(odds, view.valid, most) & (odds > self.cutoff)


def budget_loss(spent: Tensor, mu: float, weight: float = 1.0) -> Tensor:
    """The paper's second loss. spent `[image]`: of the model's output, in costs of the diagonal."""
    return weight * (spent.mean() - mu) ** 2


def cutoff_for(model: GridClassifier, images: Sequence[Tensor], mu: float, steps: int = 12) -> float:
    """The cutoff at which `model` spends `mu` costs of its diagonal on an image on average, from batches of images
    `[image, channel, height, width]`; found by halving the range in which it lies."""
    if not images:
        raise BadRequest("cutoff_for needs batches of images, at least one")
    if not 0 < mu < model.whole:
        raise BadRequest(
            f"mu={mu} is outside (0, {model.whole:.2f}), what the whole grid costs; give a share of the diagonal's cost"
        )
    low, high = -FAR, FAR
    for _ in range(steps):
        middle = (low + high) / 2
        with torch.inference_mode(), attach(model, DiTRouting(cutoff=middle)):
            spent = float(torch.cat([model(batch).spent for batch in images]).mean())
        low, high = (middle, high) if spent > mu else (low, middle)
    return (low + high) / 2
