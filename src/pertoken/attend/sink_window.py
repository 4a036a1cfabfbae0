"""Attention sinks and a window: the first and the last keys, and none between (StreamingLLM, arXiv 2309.17453).

With `positions="compact"`, as in the paper, keys are turned by their places among those that are read, so that a model
streams beyond the length it was trained on. The keys stay in the cache; `budget` adds more of the latest ones.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pertoken.attend.key_view import KeyView
from pertoken.attend.selection import Selection
from pertoken.core.budget import Budget
from pertoken.core.card import Paper, method


@method(
    question="attend",
    shape="policy",
    exactness="approximate",
    paper=Paper("Efficient Streaming Language Models with Attention Sinks", "2309.17453"),
    writes={"keys read"},
    baselines=("full", "random_keys"),
    baseline=True,
)
@dataclass(frozen=True)
class SinkWindow(Selection):
    """Read the first `sinks` and the last `recent` keys, and `budget` more of the latest."""

    budget: Budget = Budget(tokens=0)
    sinks: int = 4
    recent: int = 1020

    def score(self, view: KeyView) -> Tensor:
        return view.kept.rank[:, None].float()
