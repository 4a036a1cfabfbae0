"""Schedule: the same number of positions at every step, the most confident first: LLaDA's sampler.

Source: Nie et al., arXiv 2502.09992, "low-confidence remasking": a block of m positions and S steps gets m // S
commits per step, one more at the first m % S. With one step per position it is the reference that the other rules are
compared with. LLaDA ranks by the probability that the model itself gives to the token, Dream ("maskgit_plus") by the
one after temperature, top-k and top-p (`sharpened`); in greedy decoding they are the same.
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
    paper=Paper("Large Language Diffusion Models", "2502.09992"),
    reads={"logits"},
    writes={"commit"},
    needs={"diffusion"},
    baselines=("random_commit",),
    baseline=True,
    dial=Dial("steps", (1 / 16, 1 / 8, 1 / 4, 1 / 2)),
)
@dataclass(frozen=True)
class Schedule(Ranked):
    """Even number of commits per step, most confident first; the steps are `Denoise.steps`."""

    sharpened: bool = False

    def rank(self, guess: Guess) -> Tensor:
        return guess.sharpened if self.sharpened else guess.confidence
