"""Train what is added to a zoo model, alone or with the model itself: resumable, from windows of the code corpus."""

from __future__ import annotations

import json
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pertoken.models.load import load
from pertoken.zoo import corpus, reasoning

SAVE_EVERY = 60.0  # seconds
CHARACTERS = 4  # more than a token has: text for all steps of a run


class Task(ABC):
    """Something to train beside a model. module: what learns; slower: part of it whose learning rate is `pace` times
    the others'."""

    module: nn.Module
    slower: nn.Module | None = None
    pace: float = 1.0

    @abstractmethod
    def loss(self, ids: Tensor, step: int) -> Tensor:
        """Loss on a batch of text, ids `[batch, token]`."""

    @abstractmethod
    def save(self, directory: Path, about: dict[str, Any]) -> None:
        """Write what was learnt in its final form, with the model in Hugging Face format if that learnt too."""

    def groups(self) -> list[dict[str, Any]]:
        """Parameters that learn, and `pace`, the share of the learning rate that they get."""
        slower = {id(weight) for weight in self.slower.parameters()} if self.slower is not None else set()
        weights = [weight for weight in self.module.parameters() if weight.requires_grad]
        rest = {"params": [weight for weight in weights if id(weight) not in slower], "pace": 1.0}
        late = {"params": [weight for weight in weights if id(weight) in slower], "pace": self.pace}
        return [group for group in (rest, late) if group["params"]]


@dataclass(frozen=True)
class Tuning(ABC):
    """How something is trained for the zoo model `model`: `steps` batches of `batch` windows of `length` tokens, AdamW
    with a linear warm-up of a twentieth and a linear decay to 2 %; the `first` steps are a stage of their own, and
    `second` is the peak learning rate of the other one, as a share of the first's. text: "code", windows of the corpus,
    or "reasoning", rows of `zoo.reasoning` with their answers marked."""

    model: str = "code-target"
    text: str = "code"
    steps: int = 400
    first: int = 0
    second: float = 1.0
    batch: int = 4
    length: int = 192
    lr: float = 2e-3
    weight_decay: float = 0.0
    seed: int = 20261128

    def rate(self, step: int) -> float:
        """Of the peak learning rate."""
        if step < self.first:
            return factor(step, self.first)
        return self.second * factor(step - self.first, self.steps - self.first)

    @abstractmethod
    def task(self, model: Any, tokenizer: Any) -> Task:
        """The task, on a model of its own that is in evaluation mode and takes no gradients."""


def factor(step: int, steps: int) -> float:
    """Of the peak learning rate, in one stage."""
    return min((step + 1) / max(steps / 20, 1), max((steps - step) / (0.95 * steps), 0.02))


def batches(recipe: Tuning, tokenizer: Any, first: int) -> Any:
    """Batches `[batch, length]`, of reasoning `[batch, 2, length]`, from step `first` on, in an order fixed by the
    seed."""
    if recipe.text == "reasoning":
        yield from reasoning.batches(recipe.batch, recipe.length, tokenizer.backend_tokenizer, recipe.seed, first)
    texts = list(corpus.split_texts("train").values())
    random.Random(recipe.seed).shuffle(texts)
    wanted, enough = CHARACTERS * recipe.steps * recipe.batch * recipe.length, []
    while texts and wanted > 0:
        enough.append(texts.pop())
        wanted -= len(enough[-1])
    stream = corpus.token_stream(tokenizer.backend_tokenizer, enough)
    step, epoch = 0, 0
    while True:
        rows = corpus.windows(stream, recipe.length - 1, epoch, recipe.seed)
        for start in range(0, len(rows) - recipe.batch + 1, recipe.batch):
            if step >= first:
                yield torch.from_numpy(rows[start : start + recipe.batch].astype(np.int64))
            step += 1
        epoch += 1


def tune(
    name: str, directory: Path, recipe: Tuning, steps: int | None = None, status: Callable[[str], None] = print
) -> Path:
    """Train the recipe's task into `directory` and return it; a run found there goes on. steps: stop after so many in
    all. The model is the one trained beside this run, or else the packaged one."""
    own = directory.parent / recipe.model / "model"
    model, tokenizer = load(str(own) if own.exists() else f"zoo:{recipe.model}", "fp32")
    model.requires_grad_(False)
    torch.manual_seed(recipe.seed)
    task = recipe.task(model, tokenizer)
    groups = task.groups()
    weights = [weight for group in groups for weight in group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, weight_decay=recipe.weight_decay)
    directory.mkdir(parents=True, exist_ok=True)
    state, last = directory / "state.pt", time.monotonic()
    first, curve, told = 0, [], json.dumps(asdict(recipe))
    if state.exists():
        kept = torch.load(state, weights_only=True)
        if json.loads(told) | json.loads(kept["recipe"]) != json.loads(told):  # it may lack settings that are newer
            raise ValueError(f"{state} is of another recipe; give another --out, or delete it to begin again")
        task.module.load_state_dict(kept["module"])
        optimizer.load_state_dict(kept["optimizer"])
        first, curve = kept["step"], kept["curve"]
    until = min(steps or recipe.steps, recipe.steps)

    def keep(step: int) -> None:
        kept = {"module": task.module.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "curve": curve}
        torch.save(kept | {"recipe": told}, state.with_suffix(".new"))
        state.with_suffix(".new").replace(state)

    step = first
    try:
        for step, ids in zip(range(first, until), batches(recipe, tokenizer, first), strict=False):
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * recipe.rate(step) * group["pace"]
            with torch.enable_grad():
                loss = task.loss(ids, step)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            curve.append(float(loss.detach()))
            if time.monotonic() - last > SAVE_EVERY:
                keep(step + 1)
                status(f"{name}: step {step + 1}/{recipe.steps}, loss {np.mean(curve[-20:]):.4f}")
                last = time.monotonic()
    finally:
        keep(len(curve))
    about = {**asdict(recipe), "trained_steps": len(curve), "loss": float(np.mean(curve[-20:]))}
    told = json.dumps({"model_type": type(recipe).__name__, **about}, indent=1) + "\n"
    (directory / "config.json").write_text(told)
    task.save(directory, about)  # a model writes a configuration of its own in its place
    return directory
