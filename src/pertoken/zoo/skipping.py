"""Low-rank weights with which a zoo model runs SkipDecode's schedule: the ordinary loss, the schedule in force."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pertoken.core.attach import attach
from pertoken.core.budget import Budget
from pertoken.core.policy import Policy
from pertoken.depth.layers import LayerPolicy
from pertoken.depth.lora import Lora
from pertoken.depth.random_layers import RandomLayers
from pertoken.depth.skipdecode import SkipDecode
from pertoken.zoo.tuning import Task, Tuning


@dataclass(frozen=True)
class Skipping(Tuning):
    """rank and alpha of the low-rank weights; share: mean share of the layers; prompt: places that run all of them, of
    which only those after are scored; schedule: "skipdecode", or for the controls "random", the same random layers at
    every place, and "full", all layers."""

    rank: int = 8
    alpha: float = 16.0
    share: float = 0.5
    prompt: int = 64
    schedule: str = "skipdecode"

    def policy(self) -> LayerPolicy:
        """The layers that are run in training."""
        budget = Budget(fraction=self.share)
        if self.schedule == "random":
            return RandomLayers(budget, seed=0)
        if self.schedule == "full":
            return RandomLayers(Budget.full())
        return SkipDecode(budget, reference=self.length - self.prompt, anchor="sequence", prompt=self.prompt)

    def task(self, model: Any, tokenizer: Any) -> Task:
        return SkippingTask(self, model)


class SkippingTask(Task):
    """Next-token loss of the places after the prompt, with the schedule attached."""

    def __init__(self, recipe: Skipping, model: Any):
        self.recipe, self.model = recipe, model
        self.lora = self.module = Lora.for_model(model, recipe.rank, recipe.alpha)

    def loss(self, ids: Tensor, step: int) -> Tensor:
        with attach(self.model, self.recipe.policy(), training=True) as attachment:
            self.lora.install(self.model, attachment)
            logits = self.model(ids[:, :-1], use_cache=False).logits[:, self.recipe.prompt - 1 :]
        return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, self.recipe.prompt :].flatten())

    def save(self, directory: Path, about: dict[str, Any]) -> None:
        self.lora.about |= {"recipe": about}
        self.lora.save(directory)


@torch.inference_mode()
def nats(model: Any, policy: Policy | None, rows: Tensor, prompt: int) -> Tensor:
    """Loss `[row, place]` of the places after the prompt, with the policy attached; rows `[row, token]`."""
    found = []
    for ids in rows.split(4):
        if policy is None:
            logits = model(ids[:, :-1], use_cache=False).logits
        else:
            with attach(model, policy):
                logits = model(ids[:, :-1], use_cache=False).logits
        losses = F.cross_entropy(logits.transpose(1, 2).float(), ids[:, 1:], reduction="none")
        found.append(losses[:, prompt - 1 :])
    return torch.cat(found)
