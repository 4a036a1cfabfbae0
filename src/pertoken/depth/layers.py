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
    transformers reads the length of the context from its cache.
    """

    budget: Budget = Budget(fraction=0.5)
    reads: ClassVar[frozenset[str]] = frozenset()
    writes: ClassVar[frozenset[str]] = frozenset({"layers"})

    def install(self, model: Any, attachment: Attachment) -> None:
        adapter = adapter_for(model)
        depth = adapter.depth

        def observe(view: View) -> None:
            decision = attachment.decide(SITE, view)
            assert isinstance(decision, Depth)
            runs = decision.layers[view.valid]
            attachment.state["some"], attachment.state["every"] = runs.any(0).tolist(), runs.all(0).tolist()
            attachment.state["layers"] = decision.layers

        def around_base(forward: Any, *args: Any, **kwargs: Any) -> Any:
            ids = kwargs.get("input_ids", args[0] if args else None)
            if ids is None:
                ids = kwargs["inputs_embeds"][..., 0]
            mask = kwargs.get("attention_mask")
            valid = torch.ones(ids.shape[:2], dtype=torch.bool, device=ids.device)
            if torch.is_tensor(mask) and mask.ndim == 2:
                valid = mask[:, -ids.shape[1] :].bool()
            attachment.begin(View(valid=valid, layers=depth))
            return forward(*args, **kwargs)

        def around_layer(index: int) -> Any:
            def run(forward: Any, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                state = attachment.state
                if not state or state["every"][index]:
                    return forward(hidden, *args, **kwargs)
                if not state["some"][index]:
                    return hidden
                out = forward(hidden, *args, **kwargs)
                return torch.where(state["layers"][..., index, None], out, hidden)

            return run

        attachment.on_forward(observe)
        attachment.wrap(adapter.base, around_base)
        for index, layer in enumerate(adapter.layers):
            attachment.wrap(layer, around_layer(index))


def same_layers(view: View, kept: list[int]) -> Depth:
    """Every token runs the same layers."""
    layers = torch.tensor([index in kept for index in range(view.layers)], device=view.valid.device)
    return Depth(valid=view.valid, layers=layers.expand(*view.valid.shape, -1))
