"""What a model is made of, taken before and after a change to prove that it was taken back."""

from __future__ import annotations

import hashlib
import json
import sys
from typing import Any

import torch
from torch import nn

_HOOKS = tuple(
    name for name in vars(nn.Module()) if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called"))
)


def fingerprint(model: nn.Module, deep: bool = False) -> dict[str, str]:
    """What could have been changed, by name: classes, attributes, hooks, config, attention table, weights.

    Weights are identified by storage, version and shape; with `deep` by their bytes (slow for a large model).
    """
    prints = {}
    for name, module in model.named_modules():
        own = {k: id(v) for k, v in vars(module).items() if k not in _HOOKS and not k.startswith("_")}
        hooks = {k: [(key, id(hook)) for key, hook in vars(module).get(k, {}).items() if _counts(hook)] for k in _HOOKS}
        prints[f"module {name or '(model)'}"] = repr((type(module), id(type(module).forward), own, hooks))
    for name, tensor in model.state_dict(keep_vars=True).items():
        where = (tensor.data_ptr(), tensor._version, tuple(tensor.shape), tensor.dtype, tensor.device)
        data = tensor.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes() if deep else b""
        prints[f"weight {name}"] = repr(where) + (hashlib.sha256(data).hexdigest() if deep else "")
    config = getattr(model, "config", None)
    if config is not None:
        prints["config"] = json.dumps(config.to_dict(), sort_keys=True, default=str)
        prints["config attributes"] = repr(sorted((k, repr(v)) for k, v in vars(config).items()))
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        prints["generation config"] = json.dumps(generation.to_dict(), sort_keys=True, default=str)
    tables = sys.modules.get("transformers.modeling_utils")
    if tables is not None:
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

        for name, table in (("", tables.ALL_ATTENTION_FUNCTIONS), (" mask", ALL_MASK_ATTENTION_FUNCTIONS)):
            prints[f"attention{name} table"] = repr(sorted((k, id(table[k])) for k in table.valid_keys()))
    return prints


def _counts(hook: Any) -> bool:
    """Whether a hook is a change: transformers leaves its own on a model whose hidden states are first asked for."""
    return getattr(hook, "__module__", None) != "transformers.utils.output_capturing"


def changed(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """Names whose fingerprint differs, appeared or vanished."""
    return sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))
