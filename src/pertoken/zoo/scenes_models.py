"""Train small models on scenes and clips, by `pertoken zoo train NAME --out DIRECTORY`.

A run goes on from its directory, as those of the text models do. The segmenter is trained as DToP's paper says: all
heads first, with nothing finalised, then a shorter fine-tuning with DToP attached at the recipe's threshold. Models
that answer are those of `seeing` and `watching`; their matrices are trained by Muon, as are those of the grids of
`grids`. Classifiers, among them the grids, learn from any `Pictures` with classes.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

from pertoken.core.attach import attach
from pertoken.core.errors import BadRequest
from pertoken.core.policy import Policy
from pertoken.models.segmenter import PlainSegmenter, SegmenterConfig, mean_iou
from pertoken.reduce.dtop import DToP
from pertoken.zoo import grids, seeing, watching, words
from pertoken.zoo.pictures import Pictures, Scenes
from pertoken.zoo.scene_recipe import ANSWERS, CLASSIFIES, DESCRIBES, HELD, ROUTES, SEGMENTS, WATCHES, SceneRecipe
from pertoken.zoo.scenes import SHAPES, batch

GRID: dict[str, Any] = {"width": 20, "lr": 2e-3}
SHORT: dict[str, Any] = {"batch": 16, "lr": 3e-3, "warmup": 20, "save_every": 40}
SCENE_RECIPES = {
    "scenes-segmenter": SceneRecipe(SEGMENTS, 600),
    "scenes-segmenter-dtop": SceneRecipe(SEGMENTS, 150, start="scenes-segmenter", threshold=0.95, lr=5e-4),
    "scenes-classifier": SceneRecipe(CLASSIFIES, 600),
    "scenes-pvt": SceneRecipe(ROUTES, 2000, routes="diagonal", width=20, lr=3e-3),
    "scenes-grid": SceneRecipe(ROUTES, 600, start="scenes-pvt", **GRID),
    "scenes-grid-routed": SceneRecipe(ROUTES, 900, start="scenes-grid", routes="dit", **GRID),
    "scenes-grid-static": SceneRecipe(ROUTES, 900, start="scenes-grid", routes="static", mu=0.94, **GRID),
    "scenes-grid-random": SceneRecipe(ROUTES, 300, start="scenes-grid-routed", routes="random", mu=0.85, **GRID),
    "scenes-answerer-base": SceneRecipe(ANSWERS, 1200, until=700, start="scenes-segmenter", lr=3e-3),
    "scenes-answerer": SceneRecipe(ANSWERS, 40, start="scenes-answerer-base", lr=1e-3, warmup=5, seed=30_000_000),
    "clips-describer": SceneRecipe(DESCRIBES, 160, start="scenes-answerer", **SHORT),
    "clips-langdc": SceneRecipe(WATCHES, 240, start="scenes-answerer+clips-describer", **SHORT),
}
LABELS = (SEGMENTS, CLASSIFIES, ROUTES)  # tasks without language
CLASSES = (CLASSIFIES, ROUTES)  # tasks of whole pictures
AWAY = ("embed", "gates")  # in names of matrices that Muon leaves to AdamW


def made(recipe: SceneRecipe, classes: tuple[str, ...] = Scenes.classes) -> Any:
    """An untrained model of a recipe. classes: names, of a classifier's."""
    torch.manual_seed(recipe.seed)
    if recipe.task == ROUTES:
        return grids.made(recipe, classes)
    config = ViTConfig(
        hidden_size=recipe.width,
        intermediate_size=4 * recipe.width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        image_size=recipe.size,
        patch_size=recipe.patch,
    )
    if recipe.task == ANSWERS:
        return seeing.made(recipe, config)
    if recipe.task not in LABELS:
        return watching.Both(recipe, config)
    if recipe.task == SEGMENTS:
        return PlainSegmenter(SegmenterConfig(config, recipe.ends, 1 + len(SHAPES), head="linear"))
    config.id2label = dict(enumerate(classes))
    return ViTForImageClassification(config)


def begun(model: Any, recipe: SceneRecipe, paths: list[str]) -> Any:
    """The model, with what those at `paths` have learnt."""
    if recipe.task in LABELS:
        given = {"num_labels": model.config.num_labels} if recipe.task in CLASSES else {}
        model = type(model).from_pretrained(paths[0], dtype=torch.float32, ignore_mismatched_sizes=True, **given)
        if recipe.task == ROUTES and recipe.routes is None:
            grids.spread(model)
        return model
    if recipe.task == ANSWERS:
        seeing.begun(model, paths[0])
    else:
        watching.begun(model, paths)
    return model


def loss_of(model: Any, recipe: SceneRecipe, first: int, pictures: Pictures) -> torch.Tensor:
    """Loss of the batch of scenes from seed `first` on; of classifiers, of pictures."""
    if recipe.task == ANSWERS:
        return seeing.loss(model, recipe, first)
    if recipe.task not in LABELS:
        return watching.loss(model, recipe, first)
    if recipe.task == SEGMENTS:
        pixels, labels, _ = batch(first, recipe.batch, recipe.size)
        return model(pixels, labels=labels).loss
    pixels, classes = pictures.batch(first, recipe.batch, recipe.size)
    if recipe.task == ROUTES:
        return grids.loss(model, recipe, pixels, classes, (first - recipe.seed) // recipe.batch)
    return F.cross_entropy(model(pixels).logits, classes)


@torch.no_grad()
def quality(model: Any, recipe: SceneRecipe, count: int = 256, pictures: Pictures | None = None) -> Any:
    """Mean intersection over union, or share of right answers, on `count` scenes or pictures that are never trained on;
    with whatever is attached to the model. Of models with language, figures by name."""
    model.eval()
    if recipe.task == ANSWERS:
        return seeing.quality(model, recipe, count)
    if recipe.task not in LABELS:
        return watching.quality(model, recipe, count)
    pictures, found, wanted = pictures or Scenes(), [], []
    end = HELD + (pictures.held(count) if recipe.task in CLASSES else count)
    for first in range(HELD, end, recipe.batch):
        number = min(recipe.batch, end - first)
        if recipe.task in CLASSES:
            pixels, target = pictures.batch(first, number, recipe.size)
        else:
            pixels, target, _ = batch(first, number, recipe.size)
        found.append(model(pixels).logits.argmax(1))
        wanted.append(target)
    if recipe.task == SEGMENTS:
        return mean_iou(torch.cat(found), torch.cat(wanted), 1 + len(SHAPES))
    return float((torch.cat(found) == torch.cat(wanted)).float().mean())


def rate(step: int, recipe: SceneRecipe) -> float:
    """Factor on the learning rate: linear warm-up, then a cosine to 0."""
    return min((step + 1) / recipe.warmup, 0.5 * (1 + math.cos(math.pi * step / recipe.steps)))


class SceneRun:
    """One training run in `directory`; the model that it starts from is looked for beside it. pictures: what a
    classifier learns from, scenes if not given."""

    def __init__(self, name: str, directory: Path, recipe: SceneRecipe, pictures: Pictures | None = None):
        if pictures is not None and recipe.task not in CLASSES:
            raise BadRequest(
                f"{name} learns more of its scenes than a class each, so it takes no other pictures; train one of "
                + ", ".join(known for known, one in SCENE_RECIPES.items() if one.task in CLASSES)
            )
        self.name, self.directory, self.recipe = name, directory, recipe
        self.pictures = pictures or Scenes()
        self.model: Any = made(recipe, self.pictures.classes)
        if recipe.start is not None:
            self.model = begun(self.model, recipe, self._starts())
        if recipe.task in CLASSES:
            self.model.config.id2label = dict(enumerate(self.pictures.classes))
        self.optimizers = self._optimizers()
        self.step, self.seconds, self.curve = 0, 0.0, []

    def _starts(self) -> list[str]:
        from pertoken.zoo import model_path

        assert self.recipe.start is not None
        names = self.recipe.start.split("+")
        own = [self.directory.parent / name / "model" for name in names]
        return [str(path if path.exists() else model_path(name)) for path, name in zip(own, names, strict=True)]

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        recipe = self.recipe
        own = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        by_muon = set()
        if recipe.task not in (SEGMENTS, CLASSIFIES):
            by_muon = {id(p) for name, p in own if p.ndim == 2 and not any(word in name for word in AWAY)}
        decayed = [p for _, p in own if p.ndim > 1 and id(p) not in by_muon]
        rest = [p for _, p in own if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        made: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.99), fused=True)]
        if by_muon:
            matrices = [p for _, p in own if id(p) in by_muon]
            made.append(torch.optim.Muon(matrices, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"))
        return made

    def policy(self) -> Policy | None:
        """What is attached while training."""
        recipe = self.recipe
        if recipe.task == ROUTES:
            return grids.router(recipe, self.model, self.pictures.batch(0, 64, recipe.size)[0])
        return DToP(threshold=recipe.threshold, keep=recipe.keep) if recipe.threshold < 1 else None

    def resume(self) -> bool:
        """Go on from what the directory holds; whether it held something."""
        path = self.directory / "state.pt"
        if not path.exists():
            return False
        kept = torch.load(path, weights_only=True)
        if kept["recipe"] != json.dumps(asdict(self.recipe)) or kept["pictures"] != self.pictures.name:
            raise ValueError(
                f"{path} is of another recipe or other pictures; give another --out, or delete it to begin again"
            )
        self.model.load_state_dict(kept["model"])
        for optimizer, state in zip(self.optimizers, kept["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.step, self.seconds, self.curve = kept["step"], kept["seconds"], kept["curve"]
        return True

    def save(self) -> None:
        """Write the run's state in one move."""
        self.directory.mkdir(parents=True, exist_ok=True)
        state = {
            "recipe": json.dumps(asdict(self.recipe)),
            "pictures": self.pictures.name,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
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
        stop = min(until or recipe.steps, recipe.until or recipe.steps)
        policy: Any = self.policy()
        phases = grids.phases(recipe, policy, stop) if recipe.task == ROUTES else [(stop, policy)]
        self.model.train()
        try:
            for end, policy in phases:
                with attach(self.model, policy, training=True) if policy is not None else nullcontext():
                    while self.step < end:
                        mean = self._learn(mean)
                        self.seconds = time.perf_counter() - started
                        if self.step % recipe.save_every == 0 or self.step == stop:
                            self.curve.append({"step": self.step, "seconds": self.seconds, "loss": mean})
                            self.save()
                            status(
                                f"{self.name} step {self.step}/{recipe.steps}: loss {mean:.4f}, {self.seconds:.0f} s"
                            )
        finally:
            self.save()

    def _learn(self, mean: float) -> float:
        """One step; returns the moving average of the loss, which was `mean`."""
        recipe = self.recipe
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = recipe.lr * rate(self.step, recipe)
        loss = loss_of(self.model, recipe, recipe.seed + self.step * recipe.batch, self.pictures)
        self.model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        now = float(loss.detach())
        return now if math.isnan(mean) else 0.95 * mean + 0.05 * now

    def export(self) -> Path:
        """Write the model in Hugging Face format with its held-out figure; returns the directory."""
        path = self.directory / "model"
        self.model.eval()
        if self.recipe.task == SEGMENTS:
            self.model.save_pretrained(path)
        else:
            kept = {name: weight.clone() for name, weight in self.model.state_dict().items()}
            self.model.to(torch.bfloat16).save_pretrained(path)
            self.model.to(torch.float32).load_state_dict(kept)
        if self.recipe.task not in LABELS:
            words.save(path)
        held_out = quality(self.model, self.recipe, pictures=self.pictures)
        figure = {"held_out": held_out, "steps": self.step, "seconds": round(self.seconds)}
        if self.recipe.routes is not None and (policy := self.policy()) is not None:
            with attach(self.model, policy):
                figure["held_out_routed"] = quality(self.model, self.recipe, pictures=self.pictures)
        (path / "training.json").write_text(json.dumps(figure, indent=1) + "\n", encoding="utf-8")
        return path
