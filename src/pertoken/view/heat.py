"""Where things go in the picture of what was read: columns are tokens, lines are steps or layers, both binned where
there are many. Units are one column and one line."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from pertoken.view.grid import binned, joined
from pertoken.view.reads import Reads

TONES = 8


@dataclass(frozen=True)
class HeatLine:
    """Steps (from 1) `first` to `last`, or a layer. keys: read per step on average; before: those that there were."""

    first: int
    last: int
    keys: float
    before: float
    title: str


@dataclass(frozen=True)
class Heat:
    """tones `[line, column]` in [0, 1], the root of the share read, so that what is rarely read is seen; there: columns
    that each line had; border: where the prompt ends, None where all is prompt; per: tokens to a column."""

    tones: Tensor
    there: list[float]
    lines: list[HeatLine]
    border: float | None
    per: int

    @property
    def width(self) -> int:
        return self.tones.shape[1]

    @property
    def paths(self) -> list[tuple[float, str]]:
        """Each tone with the path of its cells, joined."""
        found: dict[float, list[str]] = defaultdict(list)
        for box in joined(self.tones, None, 0.0, TONES):
            found[box.share].append(f"M{box.x:g} {box.y}h{box.width}v{box.height}h-{box.width}z")
        return [(share, "".join(found[share])) for share in sorted(found)]

    @property
    def ground(self) -> str:
        """The path around the columns that there were."""
        steps = "".join(f"H{end:g}V{line}" for line, end in enumerate(self.there, 1))
        return f"M0 0{steps}H0z"


def by_step(row: Reads, most_columns: int, most_lines: int) -> Heat:
    """Steps from top to bottom."""
    tall = -(-row.steps // most_lines) or 1
    could = torch.arange(row.length) < row.before[:, None]
    lines = [_line(row, first, min(first + tall - 1, row.steps)) for first in range(1, row.steps + 1, tall)]
    ends = [int(row.before[line.last - 1]) for line in lines]
    return _heat(row, row.share, could, tall, most_columns, lines, ends)


def by_layer(row: Reads, most_columns: int) -> Heat:
    """Layers from top to bottom, over all steps."""
    could = (row.could > 0).expand(len(row.layers), -1)
    there, lines = int(could[0].sum()), []
    for layer, share in zip(row.layers, row.by_layer, strict=True):
        keys = float((share * row.could).sum()) / max(row.steps, 1)
        before = float(row.could.sum()) / max(row.steps, 1)
        told = f"layer {layer}: {keys:,.1f} of {before:,.1f} keys {row.verb} per step"
        lines.append(HeatLine(layer, layer, keys, before, told))
    return _heat(row, row.by_layer, could, 1, most_columns, lines, [there] * len(lines))


def _heat(
    row: Reads, share: Tensor, could: Tensor, tall: int, most: int, lines: list[HeatLine], ends: list[int]
) -> Heat:
    per = -(-row.length // most) or 1
    tones = binned(share, tall, per) / binned(could.float(), tall, per).clamp(min=1e-9)
    border = None if row.prompt >= row.length else row.prompt / per
    return Heat(tones.clamp(0, 1).sqrt(), [-(-end // per) for end in ends], lines, border, per)


def _line(row: Reads, first: int, last: int) -> HeatLine:
    keys = float(row.keys[first - 1 : last].mean())
    before = float(row.before[first - 1 : last].float().mean())
    name = f"step {first}" if first == last else f"steps {first}–{last}"
    return HeatLine(first, last, keys, before, f"{name} of {row.steps}: {keys:,.1f} of {before:,.0f} keys {row.verb}")
