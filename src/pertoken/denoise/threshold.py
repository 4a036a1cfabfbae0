"""Threshold: commit every position whose confidence reaches a bound: Fast-dLLM's parallel decoding.

Source: Wu et al., arXiv 2505.22618. The most confident position always goes, so above 1 it is one per step.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pertoken.core.card import Dial, Paper, method
from pertoken.denoise.canvas import Canvas
from pertoken.denoise.rules import CommitRule, Guess


@method(
    question="denoise",
    shape="decoder",
    exactness="approximate",
    paper=Paper(
        "Fast-dLLM: Training-free Acceleration of Diffusion LLM by Enabling KV Cache and Parallel Decoding",
        "2505.22618",
    ),
    reads={"logits"},
    writes={"commit"},
    needs={"diffusion"},
    baselines=("random_commit",),
    baseline=True,
    dial=Dial("tau", (0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)),
)
@dataclass(frozen=True)
class Threshold(CommitRule):
    """Commit what is at least `tau` probable."""

    tau: float = 0.9

    def choose(self, guess: Guess, canvas: Canvas) -> Tensor:
        return guess.ranked >= self.tau
