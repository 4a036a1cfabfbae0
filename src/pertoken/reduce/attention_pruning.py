"""Attention pruning: the patches that the class token attends to least leave.

The common way of pruning a ViT (EViT, arXiv 2202.07800, and its kin). After the attention of a layer, a patch's score
is the attention weight that the class token gives it, as a mean over heads; of an encoder without a class token, the
mean weight that all tokens give it. The lowest leave. Schedule and budget as in `scheduled`; EViT's fused token, a mean
of those that left, is not kept.

It loses on dense prediction, and wherever what is asked for is not what the class token looks at.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from pertoken.core.card import Paper, method
from pertoken.core.decision import Assign
from pertoken.core.policy import View
from pertoken.reduce.reduction import TokenView, stay
from pertoken.reduce.scheduled import Scheduled


@method(
    question="reduce",
    shape="policy",
    exactness="approximate",
    paper=Paper(
        "Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations", "2202.07800"
    ),
    reads={"queries", "keys"},
    writes={"image tokens"},
    needs={"image"},
    baselines=("full", "random_pruning"),
    baseline=True,
)
@dataclass(frozen=True)
class AttentionPruning(Scheduled):
    """Drop the patches that get the least attention, as many in every image."""

    returns: ClassVar[str] = "kept"

    def decide(self, view: View) -> Assign:
        assert isinstance(view, TokenView)
        count = self.taken(view.index, view.tokens, view.patches, view.layers)
        scores = view.received.masked_fill(~view.valid, torch.inf)
        scores[:, : view.prefix] = torch.inf
        keep = torch.ones_like(view.valid)
        keep.scatter_(1, scores.sort(dim=-1, stable=True).indices[:, :count], False)
        return stay(view, keep)
