"""The folder's mechanism so far: run or pass over whole layers, as a `Depth` decision says for each token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from pertoken.core.attach import Attachment
from pertoken.core.budget import Budget
from pertoken.core.decision import Depth
from pertoken.core.policy import Policy, View
from pertoken.models.adapter import adapter_for

SITE = "depth.layers"


@dataclass(frozen=True)
class LayerPolicy(Policy):
    """Base of policies that choose layers. `decide` returns a `Depth`; a layer that no token runs is not called.

    Where the tokens of one forward differ, the layer runs and the others keep their input. The first layer always runs:
    transformers reads the length of the context from its cache. uniform: every token of every forward runs the same
    layers, so that where nothing is recorded or replayed they are decided once, and only those passed over are touched.
    """

    budget: Budget = Budget(fraction=0.5)
    reads: ClassVar[frozenset[str]] = frozenset()
    writes: ClassVar[frozenset[str]] = frozenset({"layers"})
    uniform: ClassVar[bool] = False

    def install(self, model: Any, attachment: Attachment) -> None:
        adapter = adapter_for(model)
        depth = adapter.depth

        if self.uniform and not attachment.taped:
            one = torch.ones(1, 1, dtype=torch.bool, device=adapter.device)
            decision = attachment.decide(SITE, View(valid=one, layers=depth))
            assert isinstance(decision, Depth)
            for layer, runs in zip(adapter.layers, decision.layers[0, 0].tolist(), strict=True):
                if not runs:
                    attachment.wrap(layer, passed_over)
            return

        def observe(view: View) -> None:
            decision = attachment.decide(SITE, view)
            assert isinstance(decision, Depth)
            layers = decision.layers
            if layers.stride()[:2] == (0, 0) and layers.numel():  # expanded: the same layers for every token
                runs, count = layers[0, 0].tolist(), 1
            else:
                real = layers[view.valid]
                runs, count = real.sum(0).tolist(), len(real)
            state = attachment.state
            state["idle"] = {index for index, some in enumerate(runs) if not some} if count else set()
            state["mixed"] = {index for index, some in enumerate(runs) if 0 < some < count}
            state["layers"] = layers

        nothing: set[int] = set()

        def around_layer(index: int, forward: Any) -> Any:
            def run(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                state = attachment.state
                if not attachment.enabled:
                    return forward(hidden, *args, **kwargs)
                if index in state.get("idle", nothing):
                    return hidden
                out = forward(hidden, *args, **kwargs)
                if index in state.get("mixed", nothing):
                    out = torch.where(state["layers"][..., index, None], out, hidden)
                return out

            return run

        attachment.on_forward(observe)
        attachment.announce(adapter.base, depth)
        for index, layer in enumerate(adapter.layers):
            attachment.set_attribute(layer, "forward", around_layer(index, layer.forward))


def passed_over(forward: Any, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """In place of a layer that no token runs."""
    return hidden


def same_layers(view: View, kept: list[int]) -> Depth:
    """Every token runs the same layers."""
    layers = torch.tensor([index in kept for index in range(view.layers)], device=view.valid.device)
    return Depth(valid=view.valid, layers=layers.expand(*view.valid.shape, -1))
