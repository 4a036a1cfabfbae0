"""`pertoken run NAME --input PICTURE`: methods that reduce or route image tokens beside the dense model on the user's
own pictures."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pertoken.core.attach import attach
from pertoken.core.budget import Budget
from pertoken.core.card import card
from pertoken.core.cost import count_flops, timed
from pertoken.core.errors import BadRequest
from pertoken.core.trace import Trace
from pertoken.methods import load_methods
from pertoken.models.grid import GridClassifier, map_sizes
from pertoken.models.images import ImageModel, pictures_in, read_frames
from pertoken.reduce.reduction import TOKENS
from pertoken.reduce.thresholds import Thresholds, calibrate
from pertoken.reduce.tokens import Tokens
from pertoken.view.ways import finest, stages

DENSE, THRESHOLDS, REPEATS = "dense", "thresholds.json", 3


@dataclass(frozen=True)
class Look:
    """One side's figures. seconds: median of a pass over the pictures; flops: of a pass; tokens: of each picture after
    the last layer; regions: of each picture, how many patches each merged token stands for, largest first; agreement:
    with the dense model, as `measure` says; of a grid, cost: of each picture, operations in those of the PVTv2 on its
    diagonal, and labels: the name of each picture's class."""

    name: str
    seconds: float
    flops: int
    speedup: float
    tokens: list[int]
    regions: list[list[int]]
    agreement: float
    measure: str
    cost: list[float] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)


@dataclass
class Looks:
    """The sides in order, and a picture of its regions for each side and picture."""

    model: str
    pictures: list[str]
    note: str = ""
    sides: list[Look] = field(default_factory=list)
    drawn: list[tuple[str, str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {"model": self.model, "pictures": self.pictures, "note": self.note} | {
            "runs": [asdict(side) for side in self.sides]
        }


def look(
    names: list[str],
    model_name: str,
    source: Path,
    dtype: str = "auto",
    device: str = "cpu",
    status: Callable[[str], None] = lambda text: None,
) -> Looks:
    """Encode the pictures at `source` (a file or a folder) densely and with every named method attached. An animation
    is one picture for each frame, drawn as a strip."""
    load_methods()
    for name in names:
        if "image" not in card(name).needs:
            raise BadRequest(
                f"{name} does not work on images; those that do have question 'reduce' in `pertoken methods`, or route "
                "tokens through a grid: dit_routing"
            )
    files = {path: read_frames(path) for path in pictures_in(source)}
    read = [frame for frames in files.values() for frame in frames]
    status(f"loading {model_name}")
    host = ImageModel(model_name, dtype, "cuda" if device == "auto" and torch.cuda.is_available() else "cpu")
    sized = [host.sized(picture) for picture in read]
    pixels = host.inputs(sized)
    found = Looks(model_name, [str(path) for path, frames in files.items() for _ in frames])
    dense: Tensor | None = None
    base = 0.0
    for name in [DENSE, *names]:
        status(f"running {name}")
        policy, note = (None, "") if name == DENSE else made(name, host, pixels)
        found.note = note or found.note
        out, tokens, seconds, flops = passed(host.model, policy, pixels)
        dense, base = (out, seconds) if dense is None else (dense, base)
        same, measure = agreement(out, dense)
        sizes, counts = regions_of(tokens, host)
        side, place = Look(name, seconds, flops, base / seconds, counts, sizes, same, measure), None
        if isinstance(host.model, GridClassifier):
            side, place = routed(side, host.model, policy, pixels)
            pairs = zip(side.cost, side.labels, strict=True)
            told = [f"{cost:.2f} of the diagonal's cost, {label}" for cost, label in pairs]
        elif tokens is not None:
            place = tokens.place[:, tokens.prefix :].cpu().numpy().reshape(len(read), *host.grid)
            told = [f"{count} of {np.prod(host.grid)} tokens left" for count in counts]
        found.sides.append(side)
        if place is not None:
            start = 0
            for path, frames in files.items():
                part = slice(start, start + len(frames))
                text = f"{path.name}: {'; '.join(told[part])}"
                found.drawn.append((name, text, drawing(sized[part], place[part])))
                start += len(frames)
    return found


def made(name: str, host: ImageModel, pixels: Tensor) -> tuple[Any, str]:
    """The policy of this name for this model, and what a reader should know about it."""
    build: Any = card(name).build
    if isinstance(host.model, GridClassifier) and "grid" in card(name).needs and "gates" not in card(name).reads:
        return build(
            Budget(fraction=1 / host.model.whole)
        ), f"baselines of routing take 1/{host.model.whole:.2f} of the grid"
    if "heads" in card(name).needs or "thresholds" not in card(name).needs:
        return build(), ""
    kept = host.path / THRESHOLDS
    if kept.is_file():
        return build(thresholds=Thresholds.load(kept)), f"thresholds of {kept.name} beside the model"
    share = build().budget.fraction
    own = calibrate(host.model, [pixels], fractions=(share,))
    return build(
        thresholds=own
    ), f"thresholds calibrated on these {len(pixels)} picture(s); there were none beside the model"


def passed(model: Any, policy: Any, pixels: Tensor) -> tuple[Tensor, Tokens | None, float, int]:
    """Output, tokens after the last layer, median seconds and operations of a pass."""
    spent, tokens = [], None
    with torch.inference_mode(), ExitStack() as stack:
        attached = None if policy is None else stack.enter_context(attach(model, policy))
        out = output(model(pixels))
        for _ in range(REPEATS):
            with timed(pixels.device) as cost:
                model(pixels)
            spent.append(cost.seconds)
        flops = count_flops(lambda: model(pixels))
        if attached is not None:
            tokens = attached.state.get(TOKENS)
    return out, tokens, statistics.median(spent), flops


def routed(side: Look, model: GridClassifier, policy: Any, pixels: Tensor) -> tuple[Look, np.ndarray | None]:
    """A side with what pictures cost in a grid and are taken for; and for a policy the finest token that takes a stage
    at each place, `[picture, rows, columns]`."""
    trace = Trace()
    with torch.inference_mode(), nullcontext() if policy is None else attach(model, policy, trace=trace):
        out = model(pixels)
    names: Any = model.config.id2label
    labels = [names[number] for number in out.logits.argmax(-1).tolist()]
    side = replace(side, cost=out.spent.tolist(), labels=labels)
    if policy is None:
        return side, None
    return side, finest(stages(trace), map_sizes(model.config.base_config, *pixels.shape[-2:])).numpy()


def output(found: Any) -> Tensor:
    """What a model says: its logits, a pooled vector, or a mean over tokens."""
    for name in ("logits", "pooler_output"):
        if getattr(found, name, None) is not None:
            return getattr(found, name)
    return found.last_hidden_state.mean(1)


def agreement(out: Tensor, dense: Tensor) -> tuple[float, str]:
    """How alike two outputs are: shares of equal labels, or a cosine."""
    if out.ndim == 4:
        return float((out.argmax(1) == dense.argmax(1)).float().mean()), "share of pixels labelled alike"
    if out.ndim == 2:
        return float(torch.cosine_similarity(out.float(), dense.float()).mean()), "cosine of outputs"
    raise BadRequest(
        f"outputs of shape {list(out.shape)} are not compared; give an encoder, a classifier or a segmenter"
    )


def regions_of(tokens: Tokens | None, host: ImageModel) -> tuple[list[list[int]], list[int]]:
    """Sizes of the merged regions of each picture, and its tokens."""
    if tokens is None:
        return [], []
    sizes = tokens.padded_sizes[:, tokens.prefix :].int()
    merged = [sorted((int(s) for s in row if s > 1), reverse=True) for row in sizes]
    return merged, [count - tokens.prefix for count in tokens.counts]


def drawing(sized: list[np.ndarray], place: np.ndarray) -> Any:
    """The regions of a picture, or of the frames of a strip. place `[frame, rows, columns]`."""
    from pertoken.view.regions import halves, regions
    from pertoken.view.strip import strip

    if len(sized) == 1:
        return regions(sized[0], place[0])
    return strip(list(zip(*(halves(*pair, width=160) for pair in zip(sized, place, strict=True)), strict=True)))
