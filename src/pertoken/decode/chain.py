"""A fixed chain of guesses from a draft model: ordinary speculative decoding (Leviathan et al., arXiv 2211.17192)."""

from __future__ import annotations

from dataclasses import dataclass

from pertoken.core.card import Paper, method
from pertoken.decode.drafter import ModelDrafter
from pertoken.decode.growth import Growth, Shape
from pertoken.decode.request import Request
from pertoken.decode.tree_decoder import TreeDecoder
from pertoken.models.context import Context


@dataclass(frozen=True)
class Line(Shape):
    """One child per node."""

    size: int

    def priority(self, reach: float, chance: float, depth: int, rank: int) -> float | None:
        return 1.0 if rank == 0 else None


@method(
    question="decode",
    shape="decoder",
    exactness="lossless",
    paper=Paper("Fast Inference from Transformers via Speculative Decoding", "2211.17192"),
    reads={"logits"},
    writes={"guesses"},
    needs={"draft"},
    baseline=True,
)
@dataclass(frozen=True)
class Chain(TreeDecoder):
    """A fixed number of draft tokens in one line."""

    size: int = 5
    temperature: float = 0.6

    def shape(self) -> Shape:
        return Line(self.size)

    def growth(self, shape: Shape, request: Request, target: Context, drafter: ModelDrafter | None) -> Growth:
        return Growth(shape, drafter, temperature=self.temperature, sample=request.sampling)
