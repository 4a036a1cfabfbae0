"""Small feed-forward blocks and routers beside a zoo model, in Duo-LLM's two stages (arXiv 2410.10846).

First the blocks: for each token and layer one of the options is drawn at random, ordinary next-token cross-entropy; the
big blocks learn too, a low-rank change. In the control they learnt before, alone (`after`), and are frozen. Then the
routers alone: a soft mix of all options, whose temperature falls, and a penalty on the share of big ones (see
`depth.duo_llm`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pertoken.core.attach import attach
from pertoken.depth.duo import BIG, OPTIONS, SHARES, SMALL, Duo
from pertoken.depth.lora import Lora
from pertoken.depth.modules import GivenModules
from pertoken.models.adapter import adapter_for
from pertoken.models.signature import signature
from pertoken.zoo.tuning import Task, Tuning

DRIFT = 0.02  # of the mean share of big blocks from the budget, above which the penalty is tenfold
KEPT = 0.9  # of the table of margins at each step


@dataclass(frozen=True)
class Routing(Tuning):
    """inner: of the small blocks; rank: of the big ones' change, 0 for none; after: low-rank weights of the zoo that
    the model has before; options: what tokens choose from; share: the budget of the routers; alpha: weight of its
    penalty; tau: sharpness of the mix, at first and at last."""

    steps: int = 480
    first: int = 360
    batch: int = 4
    length: int = 193
    lr: float = 1e-3
    inner: int = 44
    rank: int = 4
    after: str | None = None
    options: tuple[str, ...] = OPTIONS[:2]
    share: float = 0.5
    alpha: float = 1.0
    tau: tuple[float, float] = (1.0, 10.0)

    def task(self, model: Any, tokenizer: Any) -> Task:
        return RoutingTask(self, model)


class RoutingTask(Task):
    """Both stages; the model's own weights stay as they are."""

    def __init__(self, recipe: Routing, model: Any):
        self.recipe, self.model, self.adapter = recipe, model, adapter_for(model)
        self.shipped = signature(model)
        if recipe.after is not None:
            Lora.load(f"zoo:{recipe.after}").merge(model)
        self.duo = self.module = Duo.for_model(model, recipe.inner, recipe.options, recipe.rank)

    def loss(self, ids: Tensor, step: int) -> Tensor:
        blocks = step < self.recipe.first
        for name, weight in self.duo.named_parameters():
            weight.requires_grad_(blocks == (name != "routers"))
        return self.drawn(ids, step) if blocks else self.mixed(ids, step)

    def drawn(self, ids: Tensor, step: int) -> Tensor:
        """Each token and layer has one of the options at random."""
        generator = torch.Generator().manual_seed(self.recipe.seed + step)
        shape = (*ids[:, :-1].shape, self.adapter.depth)
        route = torch.randint(len(self.recipe.options), shape, generator=generator)
        with attach(self.model, GivenModules(modules=self.duo, route=route), training=True):
            return self.cross_entropy(ids)

    def mixed(self, ids: Tensor, step: int) -> Tensor:
        """Cross-entropy with all options mixed, and the penalty."""
        low, high = self.recipe.tau
        tau = low + (high - low) * (step - self.recipe.first) / max(self.recipe.steps - self.recipe.first - 1, 1)
        shares, margins = [], []
        whole = torch.full((1, 1, self.adapter.depth), BIG)
        with attach(self.model, GivenModules(modules=self.duo, route=whole), training=True) as attachment:
            for layer in range(self.adapter.depth):

                def mix(forward: Callable[[Tensor], Tensor], x: Tensor, layer: int = layer) -> Tensor:
                    logits = self.duo.logits(layer, x)
                    chances = (tau * logits).softmax(-1)
                    shares.append(chances[..., BIG].mean())
                    margins.append(self.duo.margin(logits.detach()).flatten())
                    return chances[..., :1] * forward(x) + chances[..., SMALL, None] * self.duo.small[layer](x)

                attachment.wrap(self.adapter.feed_forward(layer), mix)
            loss = self.cross_entropy(ids)
        self.note(torch.cat(margins), first=step == self.recipe.first)
        drift = torch.stack(shares).mean() - self.recipe.share
        alpha = self.recipe.alpha * (10 if abs(float(drift.detach())) > DRIFT else 1)
        return loss + alpha * drift.square()

    def cross_entropy(self, ids: Tensor) -> Tensor:
        logits = self.model(ids[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())

    @torch.no_grad()
    def note(self, margins: Tensor, first: bool) -> None:
        """Keep a running table of margins by the share above them."""
        found = margins.quantile(1 - torch.arange(SHARES + 1) / SHARES)
        self.duo.margins.copy_(found if first else KEPT * self.duo.margins + (1 - KEPT) * found)

    def save(self, directory: Path, about: dict[str, Any]) -> None:
        self.duo.about |= {"model": self.shipped, "recipe": about}
        self.duo.save(directory)
