"""Origin: every position flips by itself, whatever the model thinks of it: the sampler masked diffusion started from.

Source: Dream 7B, arXiv 2508.15487 (`origin`). With times t_0 = 1 > t_1 > ... > t_S = 1e-3, a masked position is
committed at step i with probability 1 - t_{i+1} / t_i, at the last step with certainty.

A position is still masked after step i with probability t_{i+1}: so one number u ~ U(0, 1) per position, drawn from
`seed` beforehand, gives the same law, the position being committed at the first step with u >= t_{i+1}. Steps at which
nothing flips are left out: they would cost a forward and change nothing. A control: the number of commits per step is
random, the order too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pertoken.core.card import Paper, method
from pertoken.denoise.canvas import Canvas
from pertoken.denoise.pace import times
from pertoken.denoise.rules import CommitRule, Guess

if TYPE_CHECKING:
    from pertoken.denoise.settings import Settings


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
class Origin(CommitRule):
    """Independent flips at times fixed by `seed`; `steps` per block, None: as the call's."""

    seed: int = 0
    steps: int | None = None

    def fitted(self, settings: Settings) -> Origin:
        return self if self.steps is not None else replace(self, steps=settings.steps_per_block)

    def flips(self, canvas: Canvas) -> Tensor:
        """`[column]` step at which each position flips, the same for every row; 0 on the prompt."""
        assert self.steps is not None
        length = canvas.width - canvas.start
        drawn = torch.rand(length, generator=torch.Generator().manual_seed(self.seed), dtype=torch.float64)
        later = (drawn[:, None] < times(self.steps)[1:-1]).sum(-1)
        return torch.nn.functional.pad(later.to(canvas.ids.device), (canvas.start, 0))

    def choose(self, guess: Guess, canvas: Canvas) -> Tensor:
        return earliest(self.flips(canvas)[canvas.block_columns], guess.masked)

    def upcoming(self, canvas: Canvas, quota: Tensor) -> Tensor:
        return earliest(self.flips(canvas).expand(canvas.rows, -1), canvas.masked & canvas.in_block)


def earliest(step: Tensor, masked: Tensor) -> Tensor:
    """bool `[row, place]`: the masked places of each row's least step."""
    step = step.masked_fill(~masked, torch.iinfo(step.dtype).max)
    return masked & (step == step.amin(-1, keepdim=True))
