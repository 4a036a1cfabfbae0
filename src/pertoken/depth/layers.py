"""Run or pass over whole layers, as a `Depth` decision says for each token before the forward begins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from pertoken.core.attach import Attachment
from pertoken.core.budget import Budget
from pertoken.core.decision import Depth
from pertoken.core.policy import Policy, View
from pertoken.depth.ragged import NONE, RaggedLayer, Runs
from pertoken.models.adapter import adapter_for

SITE = "depth.layers"


@dataclass(frozen=True)
class LayerPolicy(Policy):
    """Base of policies that choose layers. `decide` returns a `Depth`; a layer that no token runs is not called.

    Where the tokens of one forward differ, those that run a layer are moved together, and the others keep their input
    (see `ragged`). The first layer always runs: transformers reads the length of the context from its cache. keys: what
    a layer holds for a token that passed over it, "none" or "carried". uniform: every token of every forward runs the
    same layers, so that where nothing is recorded or replayed they are decided once, and only those passed over are
    touched.
    """

    budget: Budget = Budget(fraction=0.5)
    reads: ClassVar[frozenset[str]] = frozenset()
    writes: ClassVar[frozenset[str]] = frozenset({"layers"})
    uniform: ClassVar[bool] = False
    keys: ClassVar[str] = NONE

    def install(self, model: Any, attachment: Attachment) -> None:
        adapter = adapter_for(model)
        depth = adapter.depth

        if self.uniform and not attachment.taped:
            one = torch.ones(1, 1, dtype=torch.bool, device=adapter.device)
            decision = attachment.decide(SITE, View(valid=one, layers=depth))
            assert isinstance(decision, Depth)
            for index, runs in enumerate(decision.layers[0, 0].tolist()):
                if not runs:
                    layer = adapter.layers[index]
                    attachment.wrap(layer, in_place_of(RaggedLayer(adapter, index, layer.forward, self.keys)))
            return

        def observe(view: View) -> None:
            decision = attachment.decide(SITE, view)
            assert isinstance(decision, Depth)
            attachment.state[SITE] = (runs_of(decision), view)

        def around_layer(index: int, forward: Any) -> Any:
            layer = RaggedLayer(adapter, index, forward, self.keys)

            def run(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                if not attachment.enabled or SITE not in attachment.state:
                    return forward(hidden, *args, **kwargs)
                runs, view = attachment.state[SITE]
                return layer(runs[index], view, hidden, args, kwargs)

            return run

        attachment.on_forward(observe)
        attachment.announce(adapter.base, depth)
        for index, layer in enumerate(adapter.layers):
            attachment.set_attribute(layer, "forward", around_layer(index, layer.forward))


def runs_of(decision: Depth) -> list[Runs]:
    """For each layer whether all real tokens run it, none does, or which ones do."""
    layers = decision.layers
    if layers.stride()[:2] == (0, 0) and layers.numel():  # expanded: the same layers for every token
        return layers[0, 0].tolist()
    real = layers & decision.valid[..., None]
    count = int(decision.valid.sum())
    some = zip(real.sum((0, 1)).tolist(), real.unbind(-1), strict=True)
    return [True if number == count else number > 0 and which for number, which in some]


def in_place_of(layer: RaggedLayer) -> Callable[..., Any]:
    """What is wrapped around a layer that no token runs."""
    return lambda forward, *args, **kwargs: layer.passed_over(*args, **kwargs)


def same_layers(view: View, kept: list[int]) -> Depth:
    """Every token runs the same layers."""
    layers = torch.tensor([index in kept for index in range(view.layers)], device=view.valid.device)
    return Depth(valid=view.valid, layers=layers.expand(*view.valid.shape, -1))
