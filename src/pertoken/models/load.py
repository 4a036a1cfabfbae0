"""Load a model and its tokenizer by zoo name, path or hub id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pertoken.core.errors import BadRequest

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "auto": "auto"}
CLASSES = {"diffusion_gemma": "DiffusionGemmaForBlockDiffusion"}  # what AutoModelForCausalLM does not know


def resolve(name: str) -> str:
    """What `from_pretrained` takes: `zoo:NAME` becomes the packaged directory; anything else is a path or hub id."""
    if name.startswith("zoo:"):
        from pertoken.zoo import model_path

        return str(model_path(name.removeprefix("zoo:")))
    return name


def _device(device: str | torch.device) -> torch.device:
    try:
        wanted = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device {str(device)!r} is not to be had here; choose cpu, or auto for what there is"
        ) from error
    return wanted


def load(name: str, dtype: str | torch.dtype = "auto", device: str | torch.device = "cpu") -> tuple[Any, Any]:
    """Model (in evaluation mode) and tokenizer. Raises `ValueError` naming what was looked for if there is none.

    dtype: "fp32", "bf16", "fp16", "auto" (as stored), or a torch dtype; device: "auto" is the GPU where there is one.
    """
    import transformers
    from transformers import AutoTokenizer, PretrainedConfig

    from pertoken.models import checkpoints

    if isinstance(dtype, str) and dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
    where_to = _device(device)
    wanted = DTYPES[dtype] if isinstance(dtype, str) else dtype
    path = resolve(name)
    local = Path(path).is_dir()
    model: Any
    try:
        about, _ = PretrainedConfig.get_config_dict(path, local_files_only=local)
        reader = checkpoints.reader_for(about, name)
        if reader is None:
            cls = getattr(transformers, CLASSES.get(about.get("model_type", ""), "AutoModelForCausalLM"))
            model = cls.from_pretrained(path, dtype=wanted, local_files_only=local)
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=local, padding_side="left")
        else:
            model = checkpoints.read(reader, path, about, wanted, local)
            tokenizer = reader.tokenizer(path, model.config, local)
    except BadRequest:
        raise
    except (OSError, ValueError) as error:
        where = "this directory has no usable model" if local else "no such directory, and the hub did not give it"
        raise ValueError(
            f"cannot load model {name!r}: {where}. Give a directory written by save_pretrained, a hub id, or zoo:NAME "
            f"(see `pertoken zoo list`). Cause: {str(error).splitlines()[0]}"
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval().to(where_to), tokenizer
