"""Prompt lookup: guess that an n-gram goes on as it did before in the same text (Saxena 2023). No draft model."""

from __future__ import annotations

from dataclasses import dataclass

from pertoken.core.card import Paper, method
from pertoken.decode.chain import Line
from pertoken.decode.drafter import ModelDrafter
from pertoken.decode.growth import Growth, Shape
from pertoken.decode.request import Request
from pertoken.decode.tree_decoder import TreeDecoder, ngram_indices
from pertoken.models.context import Context


@method(
    question="decode",
    shape="decoder",
    exactness="lossless",
    paper=Paper("Prompt Lookup Decoding (Saxena, 2023)"),
    reads={"tokens"},
    writes={"guesses"},
    baseline=True,
)
@dataclass(frozen=True)
class PromptLookup(TreeDecoder):
    """A chain of `size` guesses copied from the last place where the current n-gram occurred in the row."""

    size: int = 10
    shortest: int = 1
    longest: int = 3

    def shape(self) -> Shape:
        return Line(self.size)

    def growth(self, shape: Shape, request: Request, target: Context, drafter: ModelDrafter | None) -> Growth:
        ngrams = ngram_indices(request, self.shortest, self.longest)
        return Growth(shape, None, temperature=1.0, sample=request.sampling, ngrams=ngrams)
