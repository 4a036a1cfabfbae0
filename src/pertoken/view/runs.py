"""The figures of a comparison as table cells, for the terminal and HTML alike. A missing figure is a dash."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

HEADS = ("method", "tokens/s", "speed-up", "model steps", "tokens/step", "GFLOPs", "peak MB", "identical")
MISSING = "-"


@dataclass(frozen=True)
class Cells:
    """One run as text, in the order of `HEADS`. same: whether its output is the reference's, None if unknown."""

    values: tuple[str, ...]
    same: bool | None


def cells(run: Mapping[str, Any]) -> Cells:
    """The row of one run."""
    steps, tokens = run.get("steps"), run.get("tokens")
    per_step = tokens / steps if steps and tokens is not None else None
    same = run.get("identical")
    values = (
        label(run),
        _fixed(run.get("tokens_per_second"), 1),
        _fixed(run.get("speedup"), 2, "×"),
        _fixed(steps, 0),
        _fixed(per_step, 2),
        _fixed(run.get("flops"), 2, scale=1e9),
        _fixed(run.get("peak_bytes"), 0, scale=1e6),
        _likeness(same, run.get("agreement")),
    )
    return Cells(values, same)


def _likeness(same: bool | None, agreement: float | None) -> str:
    """Whether outputs are equal, and if not, the share of positions that are."""
    if same or same is None:
        return MISSING if same is None else "yes"
    return "no" if agreement is None else f"no, {100 * agreement:.0f} %"


def label(run: Mapping[str, Any]) -> str:
    return str(run.get("label") or run.get("name") or MISSING)


def baseline(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The run that the others' speed-ups are relative to: the one whose own is 1, else the first."""
    return next((run for run in runs if run.get("speedup") == 1.0), runs[0])


def _fixed(value: float | None, digits: int, unit: str = "", scale: float = 1.0) -> str:
    return MISSING if value is None else f"{value / scale:,.{digits}f}{unit}"
