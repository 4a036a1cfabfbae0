"""Confidence sampling: which positions to commit is drawn, the confident ones more often: Dream's sampler.

Source: Ye et al., "Dream 7B: Diffusion Large Language Models", arXiv 2508.15487, `alg="maskgit_plus"` with `alg_temp`.
With confidence c_i and temperature t, the `quota` positions of a step are drawn without replacement from
softmax(c / t) over the undecided ones; at t = 0 they are the most confident ones, which is `Schedule`.

Drawn as the highest of c_i / t + Gumbel noise, which is the same law. The numbers are those of torch's generator, one
per place of the whole batch: with a seed a run repeats, but a row is not what it would be in another batch. What
differs: c is the loop's confidence, without the temperature at which tokens are sampled.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pertoken.core.card import Paper, method
from pertoken.core.errors import BadRequest
from pertoken.denoise.canvas import Canvas
from pertoken.denoise.rules import CommitRule, Guess, top


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
)
@dataclass(frozen=True)
class ConfidenceSampling(CommitRule):
    """Even number of commits per step, drawn by confidence; temperature 0: the most confident."""

    temperature: float = 0.2

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise BadRequest(f"temperature={self.temperature} is negative; give 0 for the most confident, or more")

    def choose(self, guess: Guess, canvas: Canvas) -> Tensor:
        ranked = guess.ranked
        if self.temperature > 0:
            noise = -torch.rand_like(guess.confidence).clamp_(min=1e-300).log_().neg_().log_()
            ranked = ranked / self.temperature + noise
        return top(ranked, guess.quota)
