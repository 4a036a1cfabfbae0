"""Fixed interval: compute everything every so many steps, else what is asked for and what was just decided.

The control of adaptive refreshes: Elastic-Cache's sliding window with a clock in place of its test, as in the
comparison of arXiv 2510.14973.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pertoken.core.card import Dial, Paper, method
from pertoken.core.errors import BadRequest
from pertoken.denoise.canvas import Canvas
from pertoken.denoise.ends import EndOfText
from pertoken.denoise.rules import RefreshRule
from pertoken.denoise.threshold import Threshold


@method(
    question="denoise",
    shape="decoder",
    exactness="approximate",
    paper=Paper("Attention Is All You Need for KV Cache in Diffusion LLMs", "2510.14973"),
    writes={"refresh"},
    needs={"diffusion"},
    baselines=("recompute", "dual_cache"),
    baseline=True,
    dial=Dial("interval", (64, 32, 16, 8, 4, 2)),
)
@dataclass(frozen=True)
class FixedInterval(RefreshRule):
    """Compute everything at every `interval`-th step (inf: at the first alone), a sliding window otherwise.

    window: undecided positions of the sliding block, None for the loop's own blocks.
    """

    interval: float = 20
    window: int | None = 16
    full: ClassVar[dict[str, Any]] = {"interval": 1}
    beside: ClassVar[dict[str, Any]] = {"commit": Threshold(0.9), "canvas": EndOfText()}

    def __post_init__(self) -> None:
        if not self.interval >= 1:
            raise BadRequest(f"interval={self.interval} is too short; give 1 to recompute always, or more")

    @property
    def sliding(self) -> int | None:
        return self.window

    def plan(self, canvas: Canvas, upcoming: Tensor | None) -> Tensor:
        due = torch.remainder(canvas.step, self.interval) < 1
        return due[:, None] | canvas.decided_last | (canvas.masked & canvas.in_block)
