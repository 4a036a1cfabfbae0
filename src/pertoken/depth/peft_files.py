"""Low-rank weights in PEFT's file format, to and from: PEFT's adapters serve here, and the zoo's there.

Only files are read and written (`adapter_config.json` and `adapter_model.safetensors`); PEFT itself is not needed.
Plain LoRA on linear modules of the layers is understood, what else an adapter may hold is refused by name. PEFT's files
do not say which weights they were trained beside: only shapes can be checked.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pertoken.core.errors import BadRequest
from pertoken.depth.lora import Lora, linears, sizes
from pertoken.models.adapter import adapter_for
from pertoken.models.signature import signature

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ROOT = "base_model.model."
REFUSED = (
    "use_dora",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "lora_bias",
    "layer_replication",
)


def prefix(model: Any) -> str:
    """The name of a model's layers, as PEFT writes it."""
    layers = adapter_for(model).layers
    return ROOT + next(name for name, module in model.named_modules() if module is layers) + "."


def save_peft(lora: Lora, model: Any, directory: str | Path) -> None:
    """Write an adapter (bf16) that `peft.PeftModel.from_pretrained(model, directory)` reads."""
    lora.check(model)
    begin, weights = prefix(model), {}
    for name, down, up in zip(lora.shapes, lora.down, lora.up, strict=True):
        weights[f"{begin}{name}.lora_A.weight"] = down.detach().to(torch.bfloat16).contiguous()
        weights[f"{begin}{name}.lora_B.weight"] = up.detach().to(torch.bfloat16).contiguous()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": getattr(model, "name_or_path", "") or None,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": not all(isinstance(module, nn.Linear) for module in linears(model).values()),
        "target_modules": sorted({name.split(".", 1)[1] for name in lora.shapes}),
        "inference_mode": True,
    }
    Path(directory).mkdir(parents=True, exist_ok=True)
    (Path(directory) / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    save_file(weights, str(Path(directory) / WEIGHTS))


def load_peft(directory: str | Path, model: Any) -> Lora:
    """Low-rank weights for `model` from an adapter of PEFT; raises `BadRequest` for what does not fit or is no plain
    LoRA."""
    place = Path(directory)
    if not (place / CONFIG).is_file() or not (place / WEIGHTS).is_file():
        raise BadRequest(
            f"{directory} has no {CONFIG} and {WEIGHTS}; give a directory written by PEFT's save_pretrained"
        )
    config, weights, begin = json.loads((place / CONFIG).read_text()), load_file(str(place / WEIGHTS)), prefix(model)
    beyond = [name for name in REFUSED if config.get(name)] + ([] if config.get("bias", "none") == "none" else ["bias"])
    if config.get("peft_type") != "LORA" or beyond:
        raise BadRequest(
            f"{directory} is an adapter of type {config.get('peft_type')} with {', '.join(beyond) or 'nothing else'}; "
            "only plain LoRA without these is understood"
        )
    modules, shapes, pairs = linears(model), {}, []
    for key in sorted(weights):
        name, part = key.removeprefix(begin).split(".lora_")[0], key.rsplit(".lora_", 1)[-1]
        if not key.startswith(begin) or part not in ("A.weight", "B.weight") or name not in modules:
            raise BadRequest(f"{directory} holds {key!r}, which is no low-rank weight of the layers of this model")
        if part == "A.weight":
            down, up = weights[key], weights[f"{begin}{name}.lora_B.weight"]
            wanted = (config["r"], sizes(modules[name])[0]), (sizes(modules[name])[1], config["r"])
            if (tuple(down.shape), tuple(up.shape)) != wanted:
                raise BadRequest(
                    f"{directory}: {name} has weights {list(down.shape)} and {list(up.shape)}, this model needs "
                    f"{list(wanted[0])} and {list(wanted[1])}; give the model that the adapter was trained for"
                )
            shapes[name] = sizes(modules[name])
            pairs.append((down, up))
    found = Lora(shapes, config["r"], float(config["lora_alpha"]), {"model": signature(model)})
    with torch.no_grad():
        for (down, up), mine, other in zip(pairs, found.down, found.up, strict=True):
            mine.copy_(down)
            other.copy_(up)
    return found.eval()
