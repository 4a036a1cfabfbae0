"""Recompute: every position at every step, which is what a masked-diffusion model does without a cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from pertoken.core.card import Paper, method
from pertoken.denoise.canvas import Canvas
from pertoken.denoise.rules import RefreshRule


@method(
    question="denoise",
    shape="decoder",
    exactness="lossless",
    paper=Paper(""),
    writes={"refresh"},
    needs={"diffusion"},
    baselines=("recompute", "prefix_cache", "dual_cache"),
    baseline=True,
)
@dataclass(frozen=True)
class Recompute(RefreshRule):
    """Compute every position at every step."""

    full: ClassVar[dict[str, Any]] = {}

    def plan(self, canvas: Canvas, upcoming: Tensor | None) -> Tensor:
        return canvas.valid
