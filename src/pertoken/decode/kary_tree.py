"""A fixed k-ary tree of guesses from a draft model, filled level by level (SpecInfer, arXiv 2305.09781, with one
width)."""

from __future__ import annotations

from dataclasses import dataclass

from pertoken.core.card import Paper, method
from pertoken.core.errors import BadRequest
from pertoken.decode.drafter import ModelDrafter
from pertoken.decode.growth import Growth, Shape
from pertoken.decode.request import Request
from pertoken.decode.tree_decoder import TreeDecoder
from pertoken.models.context import Context


@dataclass(frozen=True)
class LevelOrder(Shape):
    """The first `branches` children of every node, shallow nodes first."""

    size: int
    branches: int

    def priority(self, reach: float, chance: float, depth: int, rank: int) -> float | None:
        return 1.0 / depth if rank < self.branches else None


@method(
    question="decode",
    shape="decoder",
    exactness="lossless",
    paper=Paper("SpecInfer: Accelerating LLM Serving with Tree-based Speculative Inference", "2305.09781"),
    reads={"logits"},
    writes={"guesses"},
    needs={"draft"},
    baseline=True,
)
@dataclass(frozen=True)
class KaryTree(TreeDecoder):
    """The same number of children under every node, `size` nodes in all."""

    size: int = 16
    branches: int = 2
    temperature: float = 0.6

    def shape(self) -> Shape:
        if self.branches < 1:
            raise BadRequest(f"branches={self.branches} gives no node a child; give at least 1")
        return LevelOrder(self.size, self.branches)

    def growth(self, shape: Shape, request: Request, target: Context, drafter: ModelDrafter | None) -> Growth:
        return Growth(shape, drafter, temperature=self.temperature, sample=request.sampling)
