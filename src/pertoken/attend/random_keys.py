"""Random keys: the control for any choice of keys at equal budget."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pertoken.attend.key_view import KeyView
from pertoken.attend.selection import Selection
from pertoken.core.card import Paper, method


@method(
    question="attend",
    shape="policy",
    exactness="approximate",
    paper=Paper("Random keys (control)"),
    writes={"keys read"},
    baselines=("full",),
    baseline=True,
)
@dataclass(frozen=True)
class RandomKeys(Selection):
    """Read the first, the last and a random set of the keys between, the same for all heads of a layer.

    A key keeps its luck from run to run: it is drawn by layer, and by its place in the row.
    """

    seed: int = 0

    def score(self, view: KeyView) -> Tensor:
        return torch.frac(torch.sin(view.kept.rank.double() * (12.9898 + view.layer) + self.seed) * 43758.5453)[:, None]
