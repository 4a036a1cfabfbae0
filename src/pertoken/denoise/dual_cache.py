"""Dual cache: within a block only the block is computed: Fast-dLLM's second cache.

Source: Wu et al., arXiv 2505.22618. The first step of a block computes everything; its later steps compute the block's
positions, decided or not, and write their keys and values over the old ones. What a sliding block decides leaves it and
is computed once more.
"""

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
    exactness="approximate",
    paper=Paper(
        "Fast-dLLM: Training-free Acceleration of Diffusion LLM by Enabling KV Cache and Parallel Decoding",
        "2505.22618",
    ),
    writes={"refresh"},
    needs={"diffusion"},
    baselines=("recompute", "prefix_cache", "dual_cache"),
    baseline=True,
)
@dataclass(frozen=True)
class DualCache(RefreshRule):
    """Compute only the block for as long as it lasts."""

    full: ClassVar[dict[str, Any]] = {"block": 1}

    def plan(self, canvas: Canvas, upcoming: Tensor | None) -> Tensor:
        return (canvas.block_step == 0)[:, None] | canvas.in_block | canvas.decided_last
