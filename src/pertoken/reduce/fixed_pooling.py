"""Fixed pooling: every clip gets as many tokens, means over the cells of a grid on each frame. The baseline for
policies whose tokens follow the clip.

With a budget of n tokens for a clip of F frames, the grid has rows and columns that differ by at most a factor of two,
and as many cells as F times their number stays within n; at least one.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pertoken.core.card import Paper, method
from pertoken.core.decision import Keep
from pertoken.core.policy import View
from pertoken.models.llava import Llava
from pertoken.reduce.clips import Clips, Offer, pooled_to


@method(
    question="reduce",
    shape="policy",
    exactness="approximate",
    paper=Paper("Pooling of frames at a fixed ratio (baseline)"),
    writes={"video tokens"},
    needs={"video"},
    baselines=("full",),
    baseline=True,
)
@dataclass(frozen=True)
class FixedPooling(Clips):
    """Pool every frame to the same grid."""

    def offer(self, llava: Llava, states: Tensor, most: int, whole: bool) -> Offer:
        cells = max(most // states.shape[1], 1)
        return Offer.of(llava.projected(pooled_to(states, *grid(cells, round(states.shape[2] ** 0.5)))))

    def decide(self, view: View) -> Keep:
        return Keep(view.valid, view.valid.clone())


def grid(cells: int, side: int) -> tuple[int, int]:
    """Rows and columns, at most `side`, of the largest grid with at most `cells` cells; the squarest of them."""
    shapes = [(r, c) for r in range(1, side + 1) for c in range(r, min(2 * r, side) + 1) if r * c <= cells]
    return max(shapes, key=lambda shape: (shape[0] * shape[1], shape[0]))
