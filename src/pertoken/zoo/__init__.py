"""Small trained models that ship with the package, and the recipes that train them."""

from __future__ import annotations

from pathlib import Path

WEIGHTS = Path(__file__).with_name("weights")


def model_path(name: str) -> Path:
    """Directory of a zoo model in Hugging Face format, ready for `from_pretrained`."""
    path = WEIGHTS / name
    if not (path / "config.json").exists():
        from pertoken.zoo.recipe import FILTERS, RECIPES
        from pertoken.zoo.scenes_models import SCENE_RECIPES
        from pertoken.zoo.tunings import TUNINGS

        if name in RECIPES | FILTERS | TUNINGS | SCENE_RECIPES:
            where = f"runs/{name}/model" if name in RECIPES | SCENE_RECIPES else f"runs/{name}"
            raise ValueError(
                f"zoo model {name!r} has no weights here (some that only benchmarks read are in a checkout alone); "
                f"train it with `pertoken zoo train {name} --out runs` and give the directory {where} instead of "
                f"zoo:{name}"
            )
        known = sorted(p.parent.name for p in WEIGHTS.glob("*/config.json"))
        raise ValueError(f"zoo model {name!r} is unknown; choose one of {', '.join(known) or '(none installed)'}")
    return path
