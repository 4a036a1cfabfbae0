"""Entropy bound: commit positions while the information they leave open stays small.

Source: Ben-Hamu et al., "Accelerated Sampling from Masked Diffusion Models via Entropy Bounded Unmasking", arXiv
2505.24857; the rule of transformers' and diffusers' own samplers. Positions in order of entropy; the largest prefix
whose sum of entropies minus the largest of them is at most gamma; the first always.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pertoken.core.card import Dial, Paper, method
from pertoken.denoise.canvas import Canvas
from pertoken.denoise.rules import CommitRule, Guess, top


@method(
    question="denoise",
    shape="decoder",
    exactness="approximate",
    paper=Paper("Accelerated Sampling from Masked Diffusion Models via Entropy Bounded Unmasking", "2505.24857"),
    reads={"logits"},
    writes={"commit"},
    needs={"diffusion"},
    baselines=("random_commit",),
    baseline=True,
    dial=Dial("gamma", (3.0, 1.0, 0.3, 0.1, 0.03, 0.01)),
)
@dataclass(frozen=True)
class EntropyBound(CommitRule):
    """Commit the lowest entropies while their sum without the largest is at most `gamma` nats."""

    gamma: float = 0.1

    def choose(self, guess: Guess, canvas: Canvas) -> Tensor:
        entropy = guess.entropy.masked_fill(~guess.masked, torch.inf)
        ordered = entropy.sort(dim=-1, stable=True).values
        finite = ordered < torch.inf
        ordered = ordered.masked_fill(~finite, 0)
        good = finite & (ordered.cumsum(-1) - ordered.cummax(-1).values <= self.gamma)
        return top(-entropy, good.long().cumprod(-1).sum(-1).clamp(min=1))
