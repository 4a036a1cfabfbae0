"""Where things go in the picture of a canvas: columns are tokens, lines are steps, both binned where there are many.

Units are one column and one line. Prompt and canvas stand side by side with a gap between; the work on a column is
drawn as upright boxes over the steps that computed it, and every commit as a mark of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from pertoken.view.fills import GIVEN, Fill
from pertoken.view.spans import marked

OPEN, DECIDED, PROMPT = "open", "decided", "prompt"
LEVELS = 4
GAP = 2.0
NAMED = 6


@dataclass(frozen=True)
class Box:
    """Equal work on adjacent columns and lines; share: of the tokens, steps and layers it stands for, in (0, 1]."""

    x: float
    y: int
    width: int
    height: int
    kind: str
    share: float


@dataclass(frozen=True)
class Mark:
    """The commits of one column on one line. tone: the step, from 0 for the first to 1 for the last; share: of the
    column's positions."""

    x: float
    tone: float
    share: float
    title: str


@dataclass(frozen=True)
class Line:
    """Steps `first` to `last` of a row."""

    first: int
    last: int
    title: str
    marks: list[Mark]


@dataclass(frozen=True)
class Grid:
    """One row's canvas. start: where the canvas begins, `per` tokens to a column of it; borders: between blocks."""

    width: float
    start: float
    per: int
    lines: list[Line]
    boxes: list[Box]
    borders: list[float]


def tone(step: int, steps: int) -> float:
    """The colour of a step: 0 for the first, 1 for the last."""
    return (step - 1) / max(steps - 1, 1)


def grid(fill: Fill, most_columns: int, most_lines: int) -> Grid:
    """The picture of a row with at most so many columns of canvas, and lines; a prompt gets a third of them at most."""
    per, tall = -(-fill.length // most_columns), -(-fill.steps // most_lines)
    own = -(-fill.length // per)
    wide = -(-fill.prompt // max(own // 3, 1)) or 1
    start = -(-fill.prompt // wide) + GAP if fill.prompt else 0.0
    prompt, canvas = fill.computed[:, : fill.prompt], fill.computed[:, fill.prompt :]
    decided = (torch.arange(1, fill.steps + 1)[:, None] > fill.committed) & (fill.committed > 0)
    boxes = [*joined(binned(prompt, tall, wide), None, 0.0)] if fill.prompt else []
    states = binned(decided.float(), tall, per) > 0.5
    if fill.given is not None:  # nothing is ever undecided
        boxes += joined(binned(canvas * fill.given, tall, per), None, start)
        canvas, states = canvas * ~fill.given, torch.ones_like(states)
    boxes += joined(binned(canvas, tall, per), states, start)
    return Grid(
        width=start + own,
        start=start,
        per=per,
        lines=[_line(fill, first, tall, per, start) for first in range(1, fill.steps + 1, tall)],
        boxes=boxes,
        borders=[start + border / per for border in fill.borders],
    )


def binned(values: Tensor, tall: int, wide: int) -> Tensor:
    """Means over bins of `tall` rows and `wide` columns; the last bins may be smaller."""
    pad = (0, -values.shape[1] % wide, 0, -values.shape[0] % tall)

    def summed(matrix: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(matrix, pad)
        return padded.unflatten(1, (-1, wide)).sum(-1).unflatten(0, (-1, tall)).sum(1)

    return summed(values) / summed(torch.ones_like(values))


def joined(work: Tensor, decided: Tensor | None, start: float, steps: int = LEVELS) -> list[Box]:
    """Upright runs of equal work and state, joined with equal neighbours. work, decided `[line, column]`; without
    `decided` it is given; steps: shares that are told apart."""
    levels = (work * steps).ceil().long().T.tolist()
    if decided is None:
        states = [[PROMPT] * len(column) for column in levels]
    else:
        states = [[DECIDED if is_so else OPEN for is_so in column] for column in decided.T.tolist()]
    boxes, beside = [], {}
    for x, column in enumerate(zip(levels, states, strict=True)):
        runs = {key: beside.get(key, x) for key in _runs(column)}
        boxes += [_box(key, first, x, start, steps) for key, first in beside.items() if key not in runs]
        beside = runs
    return boxes + [_box(key, first, len(levels), start, steps) for key, first in beside.items()]


Run = tuple[int, int, str, int]  # line, height, kind, level


def _runs(column: tuple[list[int], list[str]]) -> Iterator[Run]:
    y = 0
    for (level, kind), run in groupby(zip(*column, strict=True)):
        height = len(list(run))
        if level:
            yield y, height, kind, level
        y += height


def _box(run: Run, first: int, end: int, start: float, steps: int) -> Box:
    y, height, kind, level = run
    return Box(start + first, y, end - first, height, kind, level / steps)


def _line(fill: Fill, first: int, tall: int, per: int, start: float) -> Line:
    last = min(first + tall - 1, fill.steps)
    places = ((fill.committed >= first) & (fill.committed <= last)).nonzero().flatten().tolist()
    marks = []
    for x, group in groupby(places, key=lambda place: place // per):
        here = list(group)
        size = min(per, fill.length - x * per)
        marks.append(Mark(start + x, tone(first, fill.steps), len(here) / size, _names(fill, here)))
    name = f"step {first}" if first == last else f"steps {first}–{last}"
    computed, whole = fill.computed[first - 1 : last].sum(), fill.computed[first - 1 : last].numel()
    title = f"{name} of {fill.steps}: {len(places)} {fill.verb}, "
    if fill.given is None:
        return Line(first, last, f"{title}{computed:,.0f} of {whole:,} positions computed", marks)
    return Line(first, last, f"{title}{computed:,.0f} tokens read, P(stop) {fill.stop[last - 1]:.2f}", marks)


def _names(fill: Fill, places: list[int]) -> str:
    """What was committed, for a tooltip."""
    told = [f"{spelled(fill, place)} at step {int(fill.committed[place])}" for place in places[:NAMED]]
    where = f"position {places[0]}" if len(places) == 1 else f"positions {places[0]}–{places[-1]}"
    return f"{where}: {', '.join(told)}{', …' if len(places) > NAMED else ''}"


def spelled(fill: Fill, place: int) -> str:
    """The text of a canvas position, with its whitespace visible."""
    if place < len(fill.pieces):
        return marked(fill.pieces[place]) or "·"
    if fill.given is not None and fill.given[place]:
        return GIVEN
    return "behind the end of text" if fill.pieces else f"⟨{fill.tokens[place]}⟩"
