"""Zoo models that do not ship with the package: trained when first asked for, and kept in the user's cache."""

from __future__ import annotations

from pathlib import Path

from pertoken.zoo import WEIGHTS
from pertoken.zoo.star_graphs import cache_directory
from pertoken.zoo.train import Run


def trained(name: str, directory: Path | None = None) -> Path:
    """Directory of a zoo model in Hugging Face format: the packaged one, or the one in `directory` (default: the user's
    cache), where it is trained if it is not there. What was begun goes on; raises `ValueError` for an unknown name, and
    where another recipe's run stands in the way."""
    if (WEIGHTS / name / "config.json").exists():
        return WEIGHTS / name
    place = (directory or cache_directory() / "zoo") / name
    run = Run(name, place, compile_model=False)
    run.resume()
    if run.step < run.recipe.steps or not (place / "model" / "config.json").exists():
        run.train()
        run.export()
    return place / "model"
