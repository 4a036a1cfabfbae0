"""Prefix cache: what lies before the block is computed once per block: Fast-dLLM's first cache.

Source: Wu et al., arXiv 2505.22618. The first step of a block computes everything; its later steps compute the block
and what follows it.
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
class PrefixCache(RefreshRule):
    """Keep what lies before the block for as long as the block lasts."""

    full: ClassVar[dict[str, Any]] = {"block": 1}

    def plan(self, canvas: Canvas, upcoming: Tensor | None) -> Tensor:
        first = canvas.start + canvas.block * canvas.size
        return (canvas.block_step == 0)[:, None] | (canvas.columns >= first[:, None])
