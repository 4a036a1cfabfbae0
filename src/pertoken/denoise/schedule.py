"""Schedule: the same number of positions at every step, the most confident first: LLaDA's sampler.

Source: Nie et al., arXiv 2502.09992, "low-confidence remasking": a block of m positions and S steps gets m // S
commits per step, one more at the first m % S. With one step per position it is the reference that the other rules are
compared with.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pertoken.core.card import Paper, method
from pertoken.denoise.canvas import Canvas
from pertoken.denoise.rules import CommitRule, Guess, top


@method(
    question="denoise",
    shape="decoder",
    exactness="approximate",
    paper=Paper("Large Language Diffusion Models", "2502.09992"),
    reads={"logits"},
    writes={"commit"},
    needs={"diffusion"},
    baselines=("random_commit",),
    baseline=True,
)
@dataclass(frozen=True)
class Schedule(CommitRule):
    """Even number of commits per step, most confident first; the steps are `Denoise.steps`."""

    def choose(self, guess: Guess, canvas: Canvas) -> Tensor:
        return top(guess.ranked, guess.quota)
