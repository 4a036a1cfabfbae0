"""The charts of a study, from its rows: one per sweep, and quality against operations and against seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pertoken.core.chart import Chart, Line

Row = Mapping[str, Any]
TWIN, DIFFUSION = "autoregressive", "diffusion"
SWEEPS = {
    "steps": ("Quality against the number of steps", "steps as a share of the canvas", "share"),
    "remasking": ("Which positions to commit first", "steps as a share of the canvas", "share"),
    "canvas": ("Quality against the length of the canvas", "canvas, positions", "canvas"),
    "block": ("Quality against the length of a block", "block, positions", "block"),
    "temperature": ("One answer, and the best of several", "temperature", "temperature"),
}
COSTS = {
    "flops": ("Quality against operations", "floating-point operations per answer, logarithmic"),
    "seconds": ("Quality against time", "seconds per answer, batch of the study, logarithmic"),
}
MEASURES = {
    "passed": "answers that pass",
    "parses": "answers that are valid code",
    "likeness": "likeness to the original",
}
COLOURS = {DIFFUSION: ("#2f5fd0", "#8fb0f2"), TWIN: ("#4b5563", "#a3acb9")}  # one answer, the best of several


def charts(rows: Mapping[str, Sequence[Row]], note: str, measure: str = "passed") -> dict[str, Chart]:
    """By name; rows: those of `Study.rows`, by sweep. A sweep without a chart is passed over."""
    found = {name: sweep(name, some, note, measure) for name, some in rows.items() if name in SWEEPS}
    every = [row for some in rows.values() for row in some]
    return found | {name: cost(name, every, note, measure) for name in COSTS}


def sweep(name: str, rows: Sequence[Row], note: str, measure: str = "passed") -> Chart:
    """A measure against the sweep's knob; the twin, which has no such knob, as a level."""
    title, x, knob = SWEEPS[name]
    groups: dict[str, list[Row]] = {}
    for row in rows:
        plain = row["rule"].replace("_", " ") if name == "remasking" else DIFFUSION
        groups.setdefault(TWIN if row["autoregressive"] else plain, []).append(row)
    lines = []
    for label, some in groups.items():
        points = [(_knob(row, knob), row) for row in some]
        band = _band(points, measure)
        one, best = COLOURS.get(label, (None, None))
        lines.append(Line(label, [(at, row[measure]) for at, row in points], band, label == TWIN, one))
        several = [row for row in some if row["samples"] > 1 and f"{measure}@k" in row]
        if name == "temperature" and several:
            chance = [(row["temperature"], row[f"{measure}@k"]) for row in several]
            lines.append(Line(f"{label}, best of {several[0]['samples']}", chance, (), label == TWIN, best))
    if name == "remasking":  # five bands on each other would show nothing
        lines = [line if line.dashed else replace(line, band=()) for line in lines]
    values = sorted({_knob(row, knob) for row in rows if not row["autoregressive"]})
    ticks = [(value, _named(value, knob)) for value in values]
    y = MEASURES.get(measure, measure)
    return Chart(title, x, y, lines, note, knob != "temperature", ticks, percent=True, low=0.0)


def cost(name: str, rows: Sequence[Row], note: str, measure: str = "passed") -> Chart:
    """The best of a measure for at most a cost per answer, greedy decoders only."""
    title, x = COSTS[name]
    lines = []
    for label, twin in ((DIFFUSION, False), (TWIN, True)):
        some = [row for row in rows if row["autoregressive"] == twin and row["samples"] == 1]
        best = front([(row[name], row) for row in some], measure)
        points = [(at, row[measure]) for at, row in best]
        lines.append(Line(label, points, _band(best, measure), colour=COLOURS[label][0]))
    return Chart(title, x, MEASURES.get(measure, measure), lines, note, log=True, percent=True, low=0.0)


def front(found: Sequence[tuple[float, Row]], measure: str = "passed") -> list[tuple[float, Row]]:
    """Those that no cheaper one equals in quality, cheapest first."""
    best: list[tuple[float, Row]] = []
    for at, row in sorted(found, key=lambda one: (one[0], -one[1][measure])):
        if not best or row[measure] > best[-1][1][measure]:
            best.append((at, row))
    return best


def _band(points: Sequence[tuple[float, Row]], measure: str) -> list[tuple[float, float, float]]:
    return [(at, row[f"{measure}_low"], row[f"{measure}_high"]) for at, row in points]


def _knob(row: Row, knob: str) -> float:
    return float(row["block"] or row["canvas"]) if knob == "block" else float(row[knob])


def _named(value: float, knob: str) -> str:
    return f"1/{round(1 / value)}" if knob == "share" and value < 1 else f"{value:g}"
