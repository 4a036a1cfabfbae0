"""A tree of random shape at equal size: the control that a dynamic shape must beat."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from pertoken.core.card import Paper, method
from pertoken.decode.drafter import ModelDrafter
from pertoken.decode.growth import Growth, Shape
from pertoken.decode.request import Request
from pertoken.decode.tree_decoder import TreeDecoder
from pertoken.models.context import Context


@dataclass(frozen=True)
class Scattered(Shape):
    """Every place is as good as any other."""

    size: int
    rng: random.Random = field(compare=False)

    def priority(self, reach: float, chance: float, depth: int, rank: int) -> float:
        return self.rng.random()

    def together(self, priority: float) -> float:
        return 0.5 * priority


@method(
    question="decode",
    shape="decoder",
    exactness="lossless",
    paper=Paper("Random tree shape (control)"),
    reads={"logits"},
    writes={"guesses"},
    needs={"draft"},
    baseline=True,
)
@dataclass(frozen=True)
class RandomTree(TreeDecoder):
    """The draft's tokens at places taken at random, `size` nodes in all."""

    size: int = 16
    temperature: float = 0.6
    seed: int = 0

    def shape(self) -> Shape:
        return Scattered(self.size, random.Random(self.seed))

    def growth(self, shape: Shape, request: Request, target: Context, drafter: ModelDrafter | None) -> Growth:
        return Growth(shape, drafter, temperature=self.temperature, sample=request.sampling)
