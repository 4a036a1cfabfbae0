"""Import every method, so that the registry in `core.card` knows them all."""

from __future__ import annotations

import pkgutil
from functools import cache
from importlib import import_module
from importlib.util import find_spec

from pertoken.core.card import QUESTIONS


@cache
def load_methods() -> None:
    """Import every module of the nine folders, once. A folder that does not exist yet is passed over."""
    for folder in QUESTIONS:
        name = f"pertoken.{folder}"
        spec = find_spec(name)
        if spec is None or spec.submodule_search_locations is None:
            continue
        for module in pkgutil.iter_modules(spec.submodule_search_locations, f"{name}."):
            import_module(module.name)
