"""The controller of Stop & Exit for a zoo model: heads if it has any, then one classifier for all layers.

Heads are trained first, on next-token cross-entropy summed over layers, the model left alone. Then labels come from
teacher forcing: f is the first number of layers whose head has the true next token, and at l layers the label is stop
if there is none, exit if f <= l, else go on. The classifier's cross-entropy at l layers weighs l. (arXiv 2401.09964.)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pertoken.depth.controller import EXIT, GO_ON, STOP, Controller
from pertoken.models.adapter import adapter_for
from pertoken.models.signature import signature
from pertoken.zoo.tuning import Task, Tuning


def labels(right: Tensor, layers: tuple[int, ...]) -> Tensor:
    """`[layer, ...]` labels; right `[layer + 1, ...]` bool: whether the head after each of `layers` layers, and at last
    the model itself, has the true next token."""
    count = len(right)
    order = torch.arange(count).view(-1, *[1] * (right.ndim - 1))
    first = torch.where(right, order, count).amin(0)
    found = torch.where(first <= order[:-1], EXIT, GO_ON)
    return torch.where(first == count, STOP, found)


@dataclass(frozen=True)
class Stopping(Tuning):
    """layers: after how many the classifier is asked; own_heads: whether tokens that leave have heads of their own,
    which the first `head_steps` steps train."""

    steps: int = 300
    batch: int = 4
    length: int = 193
    lr: float = 1e-4  # states are not normed, and large
    layers: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11)
    own_heads: bool = False
    head_steps: int = 0

    def task(self, model: Any, tokenizer: Any) -> Task:
        return StoppingTask(self, model)


class StoppingTask(Task):
    """Both stages on the states of one pass of the frozen model."""

    def __init__(self, recipe: Stopping, model: Any):
        self.recipe, self.model, self.adapter = recipe, model, adapter_for(model)
        vocabulary = self.adapter.vocabulary if recipe.own_heads else None
        about = {"model": signature(model)}
        self.controller = self.module = Controller(model.config.hidden_size, recipe.layers, vocabulary, about)
        if recipe.own_heads:  # begin as the model's own head reads, without the norm before it
            with torch.no_grad():
                for head in self.controller.heads.values():
                    head.get_parameter("weight").copy_(model.lm_head.weight)

    @torch.no_grad()
    def states(self, ids: Tensor) -> tuple[list[Tensor], Tensor]:
        """Un-normed states after each of the layers, and the model's logits; ids `[batch, token]`."""
        out = self.model(ids, use_cache=False, output_hidden_states=True)
        return [out.hidden_states[ran] for ran in self.recipe.layers], out.logits

    def loss(self, ids: Tensor, step: int) -> Tensor:
        states, last = self.states(ids[:, :-1])
        truth = ids[:, 1:]
        if step < self.recipe.head_steps:
            pairs = zip(self.recipe.layers, states, strict=True)
            losses = [
                F.cross_entropy(self.controller.logits(self.model, ran, state).flatten(0, 1).float(), truth.flatten())
                for ran, state in pairs
            ]
            return torch.stack(losses).sum()
        wanted = labels(self.right(states, last, truth), self.recipe.layers)
        total, weight = torch.zeros(()), sum(self.recipe.layers)
        for ran, state, label in zip(self.recipe.layers, states, wanted, strict=True):
            total = total + ran * F.cross_entropy(self.controller(state).flatten(0, 1), label.flatten())
        return total / weight

    @torch.no_grad()
    def right(self, states: list[Tensor], last: Tensor, truth: Tensor) -> Tensor:
        """`[layer + 1, batch, token]`: which heads have the true next token, the model's own last."""
        pairs = zip(self.recipe.layers, states, strict=True)
        found = [self.controller.logits(self.model, ran, state).argmax(-1) == truth for ran, state in pairs]
        return torch.stack([*found, last.argmax(-1) == truth])

    def save(self, directory: Path, about: dict[str, Any]) -> None:
        self.controller.about |= {"recipe": about}
        self.controller.save(directory)
