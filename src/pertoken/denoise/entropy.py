"""Entropy: commit where the model's distribution is narrowest.

Source: Dream 7B, arXiv 2508.15487 (`entropy`). Rank of a place: sum p log p over the vocabulary, in nats, after
temperature, top-k and top-p. It looks at the whole distribution, not at the token that will be committed: above
temperature 0 a place may be certain and its sample still be the unlikely one.
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
    paper=Paper("Dream 7B: Diffusion Large Language Models", "2508.15487"),
    reads={"logits"},
    writes={"commit"},
    needs={"diffusion"},
    baselines=("random_commit",),
    baseline=True,
    dial=Dial("steps", (1 / 16, 1 / 8, 1 / 4, 1 / 2)),
)
@dataclass(frozen=True)
class Entropy(Ranked):
    """Lowest entropy first, as many as the pace says."""

    def rank(self, guess: Guess) -> Tensor:
        return -guess.entropy
