"""Factor: commit as many positions as their joint uncertainty allows: Fast-dLLM's second rule.

Source: Wu et al., arXiv 2505.22618. With confidences c_1 >= c_2 >= ..., the longest prefix of n positions with c_k >=
1 - f / (k + 1) for every k up to n; the first always.
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
    paper=Paper(
        "Fast-dLLM: Training-free Acceleration of Diffusion LLM by Enabling KV Cache and Parallel Decoding",
        "2505.22618",
    ),
    reads={"logits"},
    writes={"commit"},
    needs={"diffusion"},
    baselines=("random_commit",),
    baseline=True,
    dial=Dial("factor", (1.5, 1.0, 0.75, 0.5, 0.25, 0.1)),
)
@dataclass(frozen=True)
class Factor(CommitRule):
    """Commit the longest prefix by confidence with c_k >= 1 - `factor` / (k + 1)."""

    factor: float = 1.0

    def choose(self, guess: Guess, canvas: Canvas) -> Tensor:
        ordered = guess.ranked.sort(dim=-1, descending=True, stable=True).values
        rank = torch.arange(1, ordered.shape[-1] + 1, device=ordered.device)
        good = (ordered >= 1 - self.factor / (rank + 1)).long().cumprod(-1).sum(-1)
        return top(guess.ranked, good.clamp(min=1))
