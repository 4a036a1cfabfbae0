"""What a zoo model's layers are besides those of a Llama: a mechanism that is attached while it is trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

from pertoken.attend.dma import DMA
from pertoken.attend.dynamic_mask import DynamicMask
from pertoken.core.attach import attach
from pertoken.core.budget import Budget

DENSE, MASK, WINDOW = "dense", "dynamic_mask", "window"
LAYERS = (DENSE, MASK, WINDOW)


def made(config: LlamaConfig, layers: str) -> LlamaForCausalLM:
    """An untrained model; with `layers` "dynamic_mask" it holds a `DynamicMask` of that name, trained with it."""
    if layers not in LAYERS:
        raise ValueError(f"layers={layers!r} is unknown; choose one of {', '.join(LAYERS)}")
    model = LlamaForCausalLM(config)
    if layers == MASK:
        model.add_module(MASK, DynamicMask.for_model(model, noise=0.02))
    return model


def mask_of(model: LlamaForCausalLM) -> DynamicMask | None:
    """The dynamic mask that a model holds, if it does."""
    found = dict(model.named_children()).get(MASK)
    return found if isinstance(found, DynamicMask) else None


@contextmanager
def at_work(model: LlamaForCausalLM, layers: str, budget: int) -> Iterator[None]:
    """Within, the model runs as it will be used: with its dynamic mask, or a window of the last keys, at `budget`."""
    if layers == DENSE:
        yield
    else:  # without a mask of its own DMA has an untrained one, which is a window
        with attach(model, DMA(Budget(tokens=budget), mask=mask_of(model)), training=True):
            yield


def save(model: LlamaForCausalLM, directory: Path) -> None:
    """Write what the Hugging Face format of a Llama has no place for."""
    if (mask := mask_of(model)) is not None:
        mask.save(directory / f"{MASK}.safetensors")
