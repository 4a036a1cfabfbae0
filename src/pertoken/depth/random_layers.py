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
    """Run the first layer and a random set of the others, the same for every token; prompt: whether the tokens of a
    prompt pass over layers too, else they run all of them."""

    seed: int = 0
    prompt: bool = True

    def decide(self, view: View) -> Depth:
        count = max(self.budget.count(view.layers), 1)
        rest = random.Random(self.seed).sample(range(1, view.layers), count - 1)
        found = same_layers(view, [0, *sorted(rest)])
        if self.prompt or view.prompt is None or view.positions is None:
            return found
        given = view.positions < view.prompt[:, None]
        return Depth(valid=view.valid, layers=found.layers | given[..., None])
