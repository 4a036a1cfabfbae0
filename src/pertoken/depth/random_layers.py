"""Random layers: the control for any choice of layers at equal budget."""

from __future__ import annotations

import random
from dataclasses import dataclass

from pertoken.core.card import Paper, method
from pertoken.core.decision import Depth
from pertoken.core.policy import View
from pertoken.depth.layers import LayerPolicy, same_layers


@method(
    question="depth",
    shape="policy",
    exactness="approximate",
    paper=Paper("Random layers (control)"),
    writes={"layers"},
    baselines=("full",),
    baseline=True,
)
@dataclass(frozen=True)
class RandomLayers(LayerPolicy):
    """Run the first layer and a random set of the others, the same for every token."""

    seed: int = 0

    def decide(self, view: View) -> Depth:
        count = max(self.budget.count(view.layers), 1)
        rest = random.Random(self.seed).sample(range(1, view.layers), count - 1)
        return same_layers(view, [0, *sorted(rest)])
