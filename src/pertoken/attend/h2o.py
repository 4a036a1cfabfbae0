"""H2O, heavy-hitter oracle: keep the latest keys and those that got the most attention since they were stored.

Source: Zhang and others, "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models",
arXiv 2306.14048. After each forward, for each key head by itself, with A the attention weights `[query, key]` over
the keys that were kept at that time:

    F(k) = sum over queries q so far of A[q, k]
    keep the latest r = floor(recent * budget) keys, and of the others the budget - r with the largest F

Units: F is attention mass, 1 per query and head. `budget` is in keys per head, or a share of the prompt (the paper: a
fifth, half of it recent).

Differs from the paper: a prompt is read by full attention and evicted from when it has been read, as its authors' code
does and as their algorithm does not, which evicts after every token of it (feed a prompt token by token to get that);
heads that share keys add up their mass, as grouped attention did not exist in its models; the share is of the prompt
of each row.

It loses where a key matters late: F favours old keys, which had more queries to collect from, and forgets for good. Its
prompt cannot run on fused kernels, which do not tell their weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pertoken.attend.eviction import Eviction, KeptView
from pertoken.core.budget import Budget
from pertoken.core.card import Paper, method
from pertoken.core.errors import BadRequest


@method(
    question="attend",
    shape="policy",
    exactness="approximate",
    paper=Paper("H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models", "2306.14048"),
    reads={"queries", "keys"},
    writes={"keys read"},
    baselines=("full", "sink_window"),
    baseline=True,
)
@dataclass(frozen=True)
class H2O(Eviction):
    """Keep the heavy hitters and the latest keys; `recent` is the share of the latest."""

    budget: Budget = Budget(fraction=0.2)
    recent: float = 0.5
    small: ClassVar[dict[str, Any]] = {"budget": Budget(fraction=0.5)}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.recent <= 1:
            raise BadRequest(f"recent={self.recent} is outside [0, 1]; give the latest keys' share of it")

    @property
    def watched(self) -> None:
        return None

    def latest(self, limits: Tensor) -> Tensor:
        return torch.floor(limits.double() * self.recent + 1e-9).long()

    def score(self, view: KeptView) -> Tensor:
        assert view.total is not None
        return view.total
