"""Zoo models that do not ship with the package: trained when first asked for, and kept in the user's cache."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from pertoken.zoo import WEIGHTS
from pertoken.zoo.recipe import RECIPES
from pertoken.zoo.star_graphs import cache_directory
from pertoken.zoo.train import Run, completed


def kept_in() -> Path:
    """Where models are kept, and where `pertoken zoo train NAME --out` puts them to the same effect."""
    return cache_directory() / "zoo"


def found(name: str, directory: Path | None = None) -> Path | None:
    """Directory of a zoo model that needs no training: the packaged one, or one that was finished in `directory`
    (default: the user's cache); None if there is none. Raises `ValueError` for an unknown name."""
    if (WEIGHTS / name / "config.json").exists():
        return WEIGHTS / name
    if name not in RECIPES:
        raise ValueError(f"zoo model {name!r} is unknown; choose one of {', '.join(RECIPES)}")
    place, recipe = (directory or kept_in()) / name, RECIPES[name]
    if not ((place / "model" / "config.json").exists() and (place / "state.json").exists()):
        return None
    about = json.loads((place / "state.json").read_text())
    same = completed(about["recipe"]) == json.loads(json.dumps(asdict(recipe)))
    return place / "model" if same and about["step"] >= recipe.steps else None


def trained(name: str, directory: Path | None = None) -> Path:
    """Directory of a zoo model in Hugging Face format, as `found`, or trained now. What was begun goes on; raises
    `ValueError` where another recipe's run stands in the way."""
    if (path := found(name, directory)) is not None:
        return path
    run = Run(name, (directory or kept_in()) / name, compile_model=False)
    run.resume()
    if run.step < run.recipe.steps:
        run.train()
    return run.export()
