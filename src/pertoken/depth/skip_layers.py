"""Skip layers: every token runs the first, the last and evenly spaced layers between, as many as the budget allows.

The static self-speculative drafter of Zhang et al. (arXiv 2309.08168) without its search. On its own it is lossy; under
`lossless(...)` it drafts for the full model.
"""

from __future__ import annotations

from dataclasses import dataclass

from pertoken.core.card import Paper, method
from pertoken.core.decision import Depth
from pertoken.core.policy import View
from pertoken.depth.layers import LayerPolicy, same_layers


def spaced(count: int, total: int) -> list[int]:
    """`count` of `total` layers: 0 first, `total - 1` second, the rest spread evenly between."""
    if count <= 1:
        return [0]
    return sorted({round(i * (total - 1) / (count - 1)) for i in range(count)})


@method(
    question="depth",
    shape="policy",
    exactness="approximate",
    paper=Paper("Draft & Verify: Lossless LLM Acceleration via Self-Speculative Decoding", "2309.08168"),
    writes={"layers"},
    baselines=("full", "random_layers"),
    baseline=True,
)
@dataclass(frozen=True)
class SkipLayers(LayerPolicy):
    """Run evenly spaced layers only; `budget` in layers or as a share of the depth."""

    uniform = True

    def decide(self, view: View) -> Depth:
        return same_layers(view, spaced(max(self.budget.count(view.layers), 1), view.layers))
