"""SnapKV: of a prompt, keep the keys around those that its last queries look at; keep all that is generated.

Source: Li and others, "SnapKV: LLM Knows What You are Looking for Before Generation", arXiv 2404.14469. Once, when a
prompt has been read, for each key head by itself, with A the attention weights `[query, key]` of its last `window`
queries:

    v(k) = sum over these queries q of A[q, k], for the keys before the window
    s(k) = the largest (or mean) v within (kernel - 1) / 2 keys on either side
    keep the window, and of the keys before it the budget - window with the largest s

`budget` is in keys per head, the window included. Pooling keeps what stands beside a key that is looked at, so that
names and numbers stay whole.

Differs from the paper: heads that share keys add up their weights and keep one set, where its code keeps one copy of
the keys per query head; a later prompt on the same cache (at least `window` tokens in one forward) evicts again, from
all that is there, while shorter forwards are taken for generated tokens; chunks of a prompt are prompts.

It loses where the question does not stand at the end of the prompt, and in a long generation, whose keys all stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from pertoken.attend.eviction import Eviction, KeptView
from pertoken.core.budget import Budget
from pertoken.core.card import Paper, method
from pertoken.core.errors import BadRequest

POOLS = ("max", "mean")


@method(
    question="attend",
    shape="policy",
    exactness="approximate",
    paper=Paper("SnapKV: LLM Knows What You are Looking for Before Generation", "2404.14469"),
    reads={"queries", "keys"},
    writes={"keys read"},
    baselines=("full", "sink_window"),
    baseline=True,
)
@dataclass(frozen=True)
class SnapKV(Eviction):
    """Keep what the last `window` queries of the prompt look at; `kernel` keys wide."""

    budget: Budget = Budget(tokens=1024)
    window: int = 32
    kernel: int = 7
    pool: str = "max"
    small: ClassVar[dict[str, Any]] = {"budget": Budget(fraction=0.5), "window": 2, "kernel": 3}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 2:
            raise BadRequest(f"window={self.window} is too small; give 2 queries or more, as one is a generated token")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise BadRequest(f"kernel={self.kernel} has no middle; give an odd number of keys, 1 for no pooling")
        if self.pool not in POOLS:
            raise BadRequest(f"pool={self.pool!r} is unknown; choose {' or '.join(map(repr, POOLS))}")

    @property
    def watched(self) -> int:
        return self.window

    def latest(self, limits: Tensor) -> Tensor:
        return torch.full_like(limits, self.window)

    def score(self, view: KeptView) -> Tensor:
        assert view.mass is not None
        rank = view.real.cumsum(-1)
        seen = view.mass.masked_fill(~view.real | (rank > rank[..., -1:] - self.window), 0)
        pool = F.max_pool1d if self.pool == "max" else F.avg_pool1d
        return pool(seen, self.kernel, stride=1, padding=self.kernel // 2)
