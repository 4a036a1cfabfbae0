"""Train a small segmenter and a small classifier on scenes, by `pertoken zoo train NAME --out DIRECTORY`.

A run goes on from its directory, as those of the text models do. The segmenter is trained as DToP's paper says: all
heads first, with nothing finalised, then a shorter fine-tuning with DToP attached at the recipe's threshold.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

from pertoken.core.attach import attach
from pertoken.models.segmenter import PlainSegmenter, SegmenterConfig, mean_iou
from pertoken.reduce.dtop import DToP
from pertoken.zoo.scenes import COLOURS, SHAPES, batch

HELD = 10**9  # scenes of this seed and above are never trained on
SEGMENTS, CLASSIFIES = "segmenter", "classifier"


@dataclass(frozen=True)
class SceneRecipe:
    """task: "segmenter" or "classifier"; start: the model whose weights a run begins with; threshold: DToP's while
    training, 1 for without; ends: layers with a head. Scenes of `size` pixels in patches of `patch`."""

    task: str
    steps: int
    start: str | None = None
    threshold: float = 1.0
    keep: int = 5
    layers: int = 6
    width: int = 64
    heads: int = 4
    ends: tuple[int, ...] = (1, 3, 5)
    size: int = 48
    patch: int = 6
    batch: int = 32
    lr: float = 2e-3
    weight_decay: float = 0.05
    warmup: int = 50
    seed: int = 20261124
    save_every: int = 100


SCENE_RECIPES = {
    "scenes-segmenter": SceneRecipe(SEGMENTS, 600),
    "scenes-segmenter-dtop": SceneRecipe(SEGMENTS, 150, start="scenes-segmenter", threshold=0.95, lr=5e-4),
    "scenes-classifier": SceneRecipe(CLASSIFIES, 300),
}


def made(recipe: SceneRecipe) -> Any:
    """An untrained model of a recipe."""
    torch.manual_seed(recipe.seed)
    config = ViTConfig(
        hidden_size=recipe.width,
        intermediate_size=4 * recipe.width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        image_size=recipe.size,
        patch_size=recipe.patch,
    )
    if recipe.task == SEGMENTS:
        return PlainSegmenter(SegmenterConfig(config, recipe.ends, 1 + len(SHAPES), head="linear"))
    config.num_labels = len(SHAPES) * len(COLOURS)
    return ViTForImageClassification(config)


def kind(recipe: SceneRecipe) -> Any:
    return PlainSegmenter if recipe.task == SEGMENTS else ViTForImageClassification


def loss_of(model: Any, recipe: SceneRecipe, first: int) -> torch.Tensor:
    """Loss of the batch of scenes from seed `first` on."""
    pixels, labels, classes = batch(first, recipe.batch, recipe.size)
    if recipe.task == SEGMENTS:
        return model(pixels, labels=labels).loss
    return F.cross_entropy(model(pixels).logits, classes)


@torch.no_grad()
def quality(model: Any, recipe: SceneRecipe, count: int = 256) -> float:
    """Mean intersection over union, or share of right answers, on `count` scenes that are never trained on; with
    whatever is attached to the model."""
    model.eval()
    found, wanted = [], []
    for first in range(HELD, HELD + count, recipe.batch):
        pixels, labels, classes = batch(first, min(recipe.batch, HELD + count - first), recipe.size)
        found.append(model(pixels).logits.argmax(1))
        wanted.append(labels if recipe.task == SEGMENTS else classes)
    if recipe.task == SEGMENTS:
        return mean_iou(torch.cat(found), torch.cat(wanted), 1 + len(SHAPES))
    return float((torch.cat(found) == torch.cat(wanted)).float().mean())


def rate(step: int, recipe: SceneRecipe) -> float:
    """Factor on the learning rate: linear warm-up, then a cosine to 0."""
    return min((step + 1) / recipe.warmup, 0.5 * (1 + math.cos(math.pi * step / recipe.steps)))


class SceneRun:
    """One training run in `directory`; the model that it starts from is looked for beside it."""

    def __init__(self, name: str, directory: Path, recipe: SceneRecipe):
        self.name, self.directory, self.recipe = name, directory, recipe
        self.model: Any = made(recipe)
        if recipe.start is not None:
            self.model = kind(recipe).from_pretrained(self._start())
        self.optimizer = torch.optim.AdamW(self._groups(), lr=recipe.lr, betas=(0.9, 0.99), fused=True)
        self.step, self.seconds, self.curve = 0, 0.0, []

    def _start(self) -> str:
        from pertoken.zoo import model_path

        assert self.recipe.start is not None
        own = self.directory.parent / self.recipe.start / "model"
        return str(own if own.exists() else model_path(self.recipe.start))

    def _groups(self) -> list[dict[str, Any]]:
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        rest = [p for p in self.model.parameters() if p.ndim <= 1]
        return [{"params": matrices, "weight_decay": self.recipe.weight_decay}, {"params": rest, "weight_decay": 0.0}]

    def resume(self) -> bool:
        """Go on from what the directory holds; whether it held something."""
        path = self.directory / "state.pt"
        if not path.exists():
            return False
        kept = torch.load(path, weights_only=True)
        if kept["recipe"] != json.dumps(asdict(self.recipe)):
            raise ValueError(f"{path} is of another recipe; give another --out, or delete it to begin again")
        self.model.load_state_dict(kept["model"])
        self.optimizer.load_state_dict(kept["optimizer"])
        self.step, self.seconds, self.curve = kept["step"], kept["seconds"], kept["curve"]
        return True

    def save(self) -> None:
        """Write the run's state in one move."""
        self.directory.mkdir(parents=True, exist_ok=True)
        state = {
            "recipe": json.dumps(asdict(self.recipe)),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "curve": self.curve,
        }
        half = self.directory / "state.pt.tmp"
        torch.save(state, half)
        half.replace(self.directory / "state.pt")

    def train(self, until: int | None = None, status: Callable[[str], None] = print) -> None:
        """Up to step `until`, or to the end; saved every `save_every` steps and when it is stopped."""
        recipe, started, mean = self.recipe, time.perf_counter() - self.seconds, math.nan
        stop = min(until or recipe.steps, recipe.steps)
        self.model.train()
        policy = DToP(threshold=recipe.threshold, keep=recipe.keep)
        with attach(self.model, policy, training=True) if recipe.threshold < 1 else nullcontext():
            try:
                while self.step < stop:
                    for group in self.optimizer.param_groups:
                        group["lr"] = recipe.lr * rate(self.step, recipe)
                    loss = loss_of(self.model, recipe, recipe.seed + self.step * recipe.batch)
                    self.optimizer.zero_grad()
                    loss.backward()
                    nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                    self.optimizer.step()
                    self.step += 1
                    now = float(loss.detach())
                    mean = now if math.isnan(mean) else 0.95 * mean + 0.05 * now
                    self.seconds = time.perf_counter() - started
                    if self.step % recipe.save_every == 0 or self.step == stop:
                        self.curve.append({"step": self.step, "seconds": self.seconds, "loss": mean})
                        self.save()
                        status(f"{self.name} step {self.step}/{recipe.steps}: loss {mean:.4f}, {self.seconds:.0f} s")
            finally:
                self.save()

    def export(self) -> Path:
        """Write the model in Hugging Face format with its held-out figure; returns the directory."""
        path = self.directory / "model"
        self.model.eval().save_pretrained(path)
        figure = {"held_out": quality(self.model, self.recipe), "steps": self.step, "seconds": round(self.seconds)}
        (path / "training.json").write_text(json.dumps(figure, indent=1) + "\n", encoding="utf-8")
        return path
