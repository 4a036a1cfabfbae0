"""Train the filters of Learn2PD for a zoo model, from records of its own decodes of training prompts."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pertoken.denoise.learn2pd import Filter, Records, calibrated, records, train_filter
from pertoken.models.load import load
from pertoken.zoo import corpus
from pertoken.zoo.functions import functions
from pertoken.zoo.recipe import FilterRecipe
from pertoken.zoo.unit_tests import unit_tests

HELD = 5  # every fifth batch is kept from training


def filter_name(block: int, layers: int) -> str:
    """File of a filter; the paper's has two layers."""
    return f"filter-{block}.safetensors" if layers == 2 else f"filter-{block}-{layers}.safetensors"


def training_prompts(recipe: FilterRecipe, tokenizer: Any) -> list[list[str]]:
    """Batches of prompts, each of one kind and of like lengths: functions of training files, and unit tests."""
    rng, wanted = random.Random(recipe.seed), recipe.batch * recipe.batches
    texts = list(corpus.split_texts("train").values())
    rng.shuffle(texts)
    kinds: list[list[str]] = [[], [prompt for prompt, _ in unit_tests(wanted, recipe.seed)]]
    for text in texts:
        if len(kinds[0]) >= wanted:
            break
        found = [prompt for prompt, _ in functions([text])]
        kinds[0] += [prompt for prompt in rng.sample(found, min(len(found), 2)) if _fits(recipe, tokenizer, prompt)]
    batches = []
    for prompts in kinds:
        prompts = sorted(prompts[:wanted], key=len)
        batches += [prompts[i : i + recipe.batch] for i in range(0, len(prompts), recipe.batch)]
    rng.shuffle(batches)
    return batches


def _fits(recipe: FilterRecipe, tokenizer: Any, prompt: str) -> bool:
    return len(tokenizer(prompt, add_special_tokens=False)["input_ids"]) < recipe.longest_prompt


def collect(recipe: FilterRecipe, model: Any, tokenizer: Any, status: Callable[[str], None]) -> tuple[Records, Records]:
    """Records for training, and those of every fifth batch."""
    batches, kept = training_prompts(recipe, tokenizer), []
    for number, prompts in enumerate(batches, 1):
        status(f"records of batch {number}/{len(batches)}")
        inputs = tokenizer(prompts, return_tensors="pt", padding=True)
        kept.append(records(model, [dict(inputs)], recipe.length, recipe.block))
    held, seen = kept[::HELD], [one for number, one in enumerate(kept) if number % HELD]
    return _joined(seen), _joined(held)


def _joined(parts: list[Records]) -> Records:
    confidence, right, undecided = (torch.cat(column) for column in zip(*parts, strict=True))
    return confidence, right, undecided


def train_filters(
    name: str, directory: Path, recipe: FilterRecipe, steps: int | None = None, status: Callable[[str], None] = print
) -> list[Path]:
    """Train the recipe's filters into `directory`, with a `config.json` that tells what they are; returns the files.

    steps: stop after so many. The model is the one trained beside this run, or else the packaged one.
    """
    own = directory.parent / recipe.model / "model"
    model, tokenizer = load(str(own) if own.exists() else f"zoo:{recipe.model}", "bf16")
    seen, held = collect(recipe, model, tokenizer, status)
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for layers in recipe.layers:

        def progress(step: int, loss: float, layers: int = layers) -> None:
            if step % 4000 == 0:
                status(f"{name}, {layers} layers, step {step}: held-out loss {loss:.4f}")

        net = train_filter(
            model,
            [],
            recipe.length,
            recipe.block,
            layers=layers,
            steps=min(steps or recipe.steps, recipe.steps),
            lr=recipe.lr,
            seed=recipe.seed,
            found=seen,
            progress=progress,
        )
        net.about |= judged(net, held, recipe.rates)
        paths.append(directory / filter_name(recipe.block, layers))
        net.save(paths[-1])
    about = {"model_type": "learn2pd_filter", "records": len(seen[0]), "held": len(held[0]), **asdict(recipe)}
    (directory / "config.json").write_text(json.dumps(about, indent=1) + "\n")
    return paths


def judged(net: Filter, held: Records, rates: tuple[float, ...]) -> dict[str, Any]:
    """tau for each rate of wrong commits on these records, and the share of undecided right places committed at it."""
    confidence, right, undecided = held
    with torch.no_grad():
        chance: Tensor = net(confidence).sigmoid()
    taus = {str(rate): calibrated(net, held, rate) for rate in rates}
    open_ = undecided & right
    recall = {rate: float(((chance > tau) & open_).sum() / open_.sum().clamp(min=1)) for rate, tau in taus.items()}
    return {"tau": taus, "recall": recall}
