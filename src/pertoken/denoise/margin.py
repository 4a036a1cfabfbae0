"""Margin: commit where the most probable token is far ahead of the second.

Source: Dream 7B, arXiv 2508.15487 (`topk_margin`); Kim et al., "Train for the Worst, Plan for the Best", arXiv
2502.06768. Rank of a place: p_(1) - p_(2), the two largest probabilities after temperature, top-k and top-p. It tells
a place with two equal candidates from one with many small ones, which the probability of the first alone does not.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pertoken.core.card import Dial, Paper, method
from pertoken.denoise.rules import Guess, Ranked


@method(
    question="denoise",
    shape="decoder",
    exactness="approximate",
    paper=Paper("Train for the Worst, Plan for the Best: Token Ordering in Masked Diffusions", "2502.06768"),
    reads={"logits"},
    writes={"commit"},
    needs={"diffusion"},
    baselines=("random_commit",),
    baseline=True,
    dial=Dial("steps", (1 / 16, 1 / 8, 1 / 4, 1 / 2)),
)
@dataclass(frozen=True)
class Margin(Ranked):
    """Largest lead of the first token over the second first, as many as the pace says."""

    def rank(self, guess: Guess) -> Tensor:
        first, second = guess.scores.double().softmax(-1).topk(2, -1).values.unbind(-1)
        return first - second
