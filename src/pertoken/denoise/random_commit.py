"""Random commits: the control that every commit rule must beat at an equal number of steps.

The order is drawn once per row and position from the seed, so that it is known before the forward (what
dKV-Cache-Greedy needs) and does not depend on the batch.
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
    paper=Paper(""),
    reads={"logits"},
    writes={"commit"},
    needs={"diffusion"},
    baselines=(),
    baseline=True,
    dial=Dial("steps", (1 / 16, 1 / 8, 1 / 4, 1 / 2)),
)
@dataclass(frozen=True)
class RandomCommit(CommitRule):
    """Even number of commits per step, in a random order fixed by `seed`."""

    seed: int = 0

    def order(self, canvas: Canvas) -> Tensor:
        """`[row, column]` a priority per position, the same for every row of the batch it is in."""
        length = canvas.width - canvas.start
        drawn = torch.rand(length, generator=torch.Generator().manual_seed(self.seed)).to(canvas.ids.device)
        return torch.nn.functional.pad(drawn, (canvas.start, 0)).expand(canvas.rows, -1)

    def choose(self, guess: Guess, canvas: Canvas) -> Tensor:
        ranked = self.order(canvas).gather(1, canvas.block_columns).masked_fill(~guess.masked, -torch.inf)
        return top(ranked, guess.quota)

    def upcoming(self, canvas: Canvas, quota: Tensor) -> Tensor:
        return top(self.order(canvas).masked_fill(~(canvas.masked & canvas.in_block), -torch.inf), quota)
