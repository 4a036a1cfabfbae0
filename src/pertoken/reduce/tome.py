"""ToMe: at every layer the r most alike pairs of tokens become one.

Source: "Token Merging: Your ViT But Faster" (arXiv 2210.09461, ICLR 2023). Between attention and the feed-forward block
of each layer, tokens are matched by the keys of that attention (see `matching`); the r proposals with the highest
scores are accepted, at most half of the patches. A merged token is the mean of its members weighted by their sizes, and
attention adds log(size) to the scores of a key (proportional attention), which equals attending to so many copies.

budget: patches left after the last layer, spread over the layers; r: the paper's dial, tokens merged per layer.
inflect: the paper's linear schedules, -1 for most at the first layer.

Differs from the paper: masks under SDPA instead of a softmax by hand; the encoder returns the whole grid, so that heads
that pool count a merged token by its size.

It loses where every token matters alike (text, fine texture), and saves little wall clock on small models, whose layers
cost little more for 200 tokens than for 100.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pertoken.core.card import Paper, method
from pertoken.core.decision import Assign
from pertoken.core.policy import View
from pertoken.reduce.matching import best, merged, most, proposals
from pertoken.reduce.reduction import TokenView
from pertoken.reduce.scheduled import Scheduled


@method(
    question="reduce",
    shape="policy",
    exactness="approximate",
    paper=Paper("Token Merging: Your ViT But Faster", "2210.09461"),
    reads={"keys"},
    writes={"image tokens"},
    needs={"image"},
    baselines=("random_pruning", "attention_pruning"),
)
@dataclass(frozen=True)
class ToMe(Scheduled):
    """Merge the most alike tokens, as many in every image."""

    def decide(self, view: View) -> Assign:
        assert isinstance(view, TokenView)
        scores, partner = proposals(view)
        taken = self.taken(view.index, view.tokens, view.patches, view.layers)
        count = torch.minimum(most(view), torch.full_like(most(view), taken))
        return merged(view, best(scores, count), partner)
