"""What the claims about images share: scenes and the models trained on them, an encoder of a ViT-B's size, timing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pertoken.bench.claims import Bench
from pertoken.core.attach import attach
from pertoken.core.cost import count_flops
from pertoken.models.segmenter import PlainSegmenter, mean_iou
from pertoken.reduce.reduction import TOKENS, Reduction
from pertoken.zoo import model_path
from pertoken.zoo.scenes import SHAPES, batch, scene
from pertoken.zoo.scenes_models import HELD

BASE, TUNED = "scenes-segmenter", "scenes-segmenter-dtop"
CLASSES = 1 + len(SHAPES)


@dataclass(frozen=True)
class Held:
    """Scenes that no model was trained on: inputs and labels in batches, and the number of things in each."""

    batches: list[tuple[Tensor, Tensor]]
    things: list[int]


def held(bench: Bench) -> Held:
    """512 scenes, or 64 when quick."""

    def make() -> Held:
        count = 64 if bench.quick else 512
        batches = [batch(first, 32)[:2] for first in range(HELD, HELD + count, 32)]
        return Held(batches, [len(scene(seed).things) for seed in range(HELD, HELD + count)])

    return bench.shared("held scenes", make)


def others(bench: Bench) -> list[Tensor]:
    """Batches of further scenes, to calibrate on."""
    count = 4 if bench.quick else 16
    start = HELD + 10**6
    return bench.shared("other scenes", lambda: [batch(start + 32 * i, 32)[0] for i in range(count)])


def segmenter(bench: Bench, name: str = BASE) -> Any:
    """A zoo segmenter."""
    return bench.shared(("segmenter", name), lambda: PlainSegmenter.from_pretrained(model_path(name)).eval())


@dataclass(frozen=True)
class Seen:
    """What a segmenter made of the held-out scenes. counts: tokens of each image after the last layer; flops: of
    all."""

    miou: float
    counts: list[int]
    flops: int
    labels: Tensor


def seen(bench: Bench, model: Any, policy: Reduction | None = None) -> Seen:
    """With `policy` attached, or none."""
    labels, counts = [], []

    def work() -> None:
        with torch.inference_mode(), nullcontext() if policy is None else attach(model, policy) as attached:
            for pixels, _ in held(bench).batches:
                labels.append(model(pixels).logits.argmax(1))
                counts.extend(attached.state[TOKENS].counts if attached is not None else [])

    flops = count_flops(work)
    wanted = torch.cat([target for _, target in held(bench).batches])
    return Seen(100 * mean_iou(torch.cat(labels), wanted, CLASSES), counts, flops, torch.cat(labels))


def vit_base(bench: Bench, size: int, attention: str = "sdpa") -> tuple[Any, Tensor]:
    """A random ViT of a ViT-B's size for images of `size` pixels and a batch of 8 of them; when quick four of its
    twelve layers and a batch of 2."""
    from transformers import ViTConfig, ViTModel

    def make() -> tuple[Any, Tensor]:
        torch.manual_seed(bench.seed)
        config = ViTConfig(image_size=size, num_hidden_layers=4 if bench.quick else 12)
        model = ViTModel(config, add_pooling_layer=False).eval()
        model.set_attn_implementation(attention)
        return model, torch.randn(2 if bench.quick else 8, 3, size, size)

    return bench.shared(("vit base", size, attention), make)


def seconds(works: Mapping[str, Callable[[], object]], turns: int) -> dict[str, float]:
    """Median seconds of each piece of work; one warm-up, then all of them in turn."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(turns + 1):
        for name, work in works.items():
            start = time.perf_counter()
            with torch.inference_mode():
                work()
            if turn:
                found[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in found.items()}


def at_length(model: Any, pixels: Tensor, lengths: list[int]) -> Callable[[], object]:
    """The dense encoder run on the first `lengths[l]` tokens in layer l: what so many tokens cost by themselves."""

    def work() -> None:
        hidden = model.embeddings(pixels)
        for layer, count in zip(model.layers, lengths, strict=True):
            hidden = layer(hidden[:, :count].contiguous())
        model.layernorm(hidden)

    return work
