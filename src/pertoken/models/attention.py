"""A model's own attention functions, and how another is put in their place."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from pertoken.models.adapter import Adapter


def own_attention(module: Any, name: str) -> Callable[..., Any]:
    """The attention function that `module` runs under the implementation `name`."""
    if name == "eager":
        return vars(sys.modules[type(module).__module__])["eager_attention_forward"]
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS[name]


def attention_configs(adapter: Adapter) -> list[Any]:
    """Every configuration that a module of the model reads its implementation from."""
    return list({id(c): c for m in adapter.base.modules() if (c := getattr(m, "config", None)) is not None}.values())
