"""The report: one HTML file that needs nothing else, with what every token cost and how the guesses grew."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from pertoken.core.trace import Trace
from pertoken.view.depths import Depths, depths
from pertoken.view.drawing import segments, telling, tree_picture
from pertoken.view.fills import Fill, fills, spent
from pertoken.view.grid import grid, spelled, tone
from pertoken.view.reading import NO_TEXT
from pertoken.view.reading import section as reading
from pertoken.view.reads import reads
from pertoken.view.runs import HEADS, baseline, cells, label
from pertoken.view.spans import (
    MEANING,
    UNKNOWN,
    Bar,
    Passage,
    Span,
    Totals,
    bars,
    passages,
    printable,
    totals,
    turns,
    vocabulary,
)

MOST_BARS = 400
MOST_COLUMNS, MOST_LINES, OPEN_ROWS = 256, 128, 3
FILLED = "filled"
PROMPT_LINES = 14
CHARTS = (("Tokens per second", "more is better", "tokens_per_second", 1.0, 1, ""),
          ("Floating-point operations", "fewer is better", "flops", 1e9, 2, " GFLOP"))  # fmt: skip


def write(traces: Sequence[Trace], path: str | Path) -> None:
    """Write the report of `traces`; the directory is made if it is missing."""
    text = render(traces)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text, encoding="utf-8")


def render(traces: Sequence[Trace]) -> str:
    """The report of `traces` as one HTML document. Raises `ValueError` if there is none."""
    if not traces:
        raise ValueError("there is no trace to draw; give at least one, recorded with `with decoder.record() as trace`")
    environment = Environment(
        loader=PackageLoader("pertoken.view", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    models = list(dict.fromkeys(str(trace.about["model"]) for trace in traces if trace.about.get("model")))
    return environment.get_template("report.html.j2").render(
        models=models,
        comparisons=_comparisons(traces),
        open_rows=OPEN_ROWS,
        sections=[_section(trace, number) for number, trace in enumerate(traces, 1)],
    )


def _comparisons(traces: Sequence[Trace]) -> list[dict[str, Any]]:
    """Every distinct set of runs once: the traces of one comparison all carry the same."""
    distinct: list[list[dict[str, Any]]] = []
    for trace in traces:
        runs = trace.about.get("runs")
        if runs and runs not in distinct:
            distinct.append(runs)
    return [{"heads": HEADS, "rows": [cells(run) for run in runs], "charts": _charts(runs)} for runs in distinct]


def _charts(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found, base = [], baseline(runs)
    for title, hint, key, scale, digits, unit in CHARTS:
        known = [run for run in runs if run.get(key)]
        most = max((run[key] for run in known), default=0)
        bars = [
            {
                "label": label(run),
                "share": run[key] / most,
                "value": f"{run[key] / scale:,.{digits}f}{unit}",
                "ratio": "" if run is base or not base.get(key) else f"{run[key] / base[key]:.2f}×",
                "base": run is base,
            }
            for run in known
        ]
        if bars:
            found.append({"title": title, "hint": f"{hint}; × is relative to {label(base)}", "bars": bars})
    return found


def _section(trace: Trace, number: int) -> dict[str, Any]:
    filled, read = fills(trace), reads(trace)
    about = {"id": f"trace-{number}", "name": str(trace.about.get("method") or f"trace {number}")}
    if read and not filled:
        return about | _EMPTY | reading(read)
    if ran := depths(trace):
        return about | _ran(ran)
    return about | (_filled(filled) if filled else _guessed(trace))


def _filled(found: Sequence[Fill]) -> dict[str, Any]:
    """A canvas that was filled in any order, or a text that tokens were inserted into: figures, the text by step, and a
    picture of every row."""
    told, inserted = spent(found), found[0].given is not None
    thing = "tokens inserted" if inserted else "positions"
    figures = [
        (thing, f"{told.committed:,}"),
        ("model steps", f"{told.steps:,}"),
        (f"{thing} per step of a row", f"{told.committed / told.row_steps:.2f}"),
    ]
    if not inserted:
        figures.append(("of all positions computed", f"{100 * told.computed / told.whole:.0f} %"))
    filled = "inserted" if inserted else "canvas"
    return _EMPTY | {"figures": figures, "filled": filled, "passages": [_fill(fill) for fill in found]}


def _ran(found: Sequence[Depths]) -> dict[str, Any]:
    """A text whose tokens ran some of the layers."""
    counts = [count for row in found for count in row.counts]
    figures = [("tokens", f"{sum(len(row.layers) for row in found):,}")]
    if counts:
        figures.append(("layers per token", f"{sum(counts) / len(counts):.2f} of {found[0].depth}"))
    return _EMPTY | {"figures": figures, "filled": "depth", "passages": [_row_of_depths(row) for row in found]}


def _row_of_depths(row: Depths) -> dict[str, Any]:
    tokens = []
    for place, own in enumerate(row.layers):
        piece = row.pieces[place] if place < len(row.pieces) else NO_TEXT
        token = {
            "text": printable(piece),
            "kind": UNKNOWN if own is None else FILLED,
            "line_end": "\n" in piece,
            "title": f"token {place + 1}: {row.told(place)}",
            "style": None if own is None else f"--t:{100 * len(own) / row.depth:.0f}%",
        }
        tokens.append((place + 1, [token]))
    return _prompted(row.number, row.prompt_pieces) | {"steps": tokens, "canvas": None}


def _fill(fill: Fill) -> dict[str, Any]:
    """A row: its text, each token in the colour of its step, and the picture of its canvas."""
    picture, again = grid(fill, MOST_COLUMNS, MOST_LINES), fill.again.tolist()
    firsts = {step: line.first for line in picture.lines for step in range(line.first, line.last + 1)}
    tokens = []
    for place, piece, step in fill.text:
        told = f"{fill.verb} at step {step} of {fill.steps}, computed {again[place]}× after it"
        left = (UNKNOWN, "cut off") if fill.given is None else ("prompt", "given")
        kind, told = (FILLED, told) if step else left
        token = {
            "text": printable(piece),
            "kind": kind,
            "line_end": "\n" in piece,
            "title": f"position {place}, {spelled(fill, place)}: {told}",
            "style": f"--t:{100 * tone(step, fill.steps):.0f}%" if step else None,
        }
        tokens.append((firsts.get(step, 0), token))
    steps = [(step, [token for _, token in run]) for step, run in groupby(tokens, lambda one: one[0])]
    canvas = {"steps": fill.steps, "length": fill.length, "prompt": fill.prompt, "verb": fill.verb, "grid": picture}
    return _prompted(fill.number, fill.prompt_pieces) | {"steps": steps, "canvas": canvas}


_EMPTY: dict[str, Any] = {
    "figures": [], "legend": [], "passages": [], "filled": "", "deepest": 0, "chart": None, "trees": [],
    "decisions": {},
}  # fmt: skip


def _guessed(trace: Trace) -> dict[str, Any]:
    """A text that grew from the left by guesses: figures, kinds of tokens, and pictures of steps."""
    found, sums = passages(trace), totals(trace)
    kinds = Counter(span.kind for passage in found for span in passage.spans)
    deepest = max((turn.exit or 0 for turn in turns(trace)), default=0)
    return _EMPTY | {
        "figures": _figures(sums),
        "legend": [(kind, MEANING[kind], kinds[kind], kinds[kind] / kinds.total()) for kind in MEANING if kinds[kind]],
        "passages": [_passage(passage, deepest) for passage in found],
        "deepest": deepest,
        "chart": _steps(bars(trace, MOST_BARS)) if sums.drafted else None,
        "trees": _trees(trace, found),
        "decisions": dict(Counter(f"{step.decision.kind} at {step.site}" for step in trace.steps)),
    }


def _figures(sums: Totals) -> list[tuple[str, str]]:
    if not sums.steps:
        return []
    figures = [
        ("tokens", f"{sums.tokens:,}"),
        ("model steps", f"{sums.steps:,}"),
        ("tokens per step", f"{sums.tokens / sums.steps:.2f}"),
    ]
    if sums.drafted:
        figures.append(("guesses accepted", f"{sums.accepted:,} of {sums.drafted:,}"))
    if sums.layers is not None:
        figures.append(("target layer passes per token", f"{sums.layers:.1f}"))
    return figures


def _passage(passage: Passage, deepest: int) -> dict[str, Any]:
    steps = [
        (step, [_token(span, deepest) for span in spans])
        for step, spans in groupby(passage.spans, lambda span: span.turn.step if span.turn else 0)
    ]
    return _prompted(passage.number, passage.prompt) | {"steps": steps, "canvas": None}


def _prompted(number: int, prompt: Sequence[str]) -> dict[str, Any]:
    """A row's number and its prompt, whose earlier lines are folded away."""
    lines = "".join(prompt).splitlines(keepends=True)
    return {
        "number": number,
        "before": printable("".join(lines[:-PROMPT_LINES])),
        "hidden": max(len(lines) - PROMPT_LINES, 0),
        "prompt": printable("".join(lines[-PROMPT_LINES:])),
    }


def _token(span: Span, deepest: int) -> dict[str, Any]:
    layer = span.turn.exit if span.turn and span.kind == "exit" else None
    return {
        "text": span.label,
        "kind": span.kind,
        "line_end": "\n" in span.label,
        "title": _title(span),
        "style": f"--depth:{0.4 + 0.6 * layer / deepest:.2f}" if layer else None,
    }


def _title(span: Span) -> str:
    if span.turn is None:
        return MEANING[UNKNOWN]
    turn = span.turn
    parts = [f"step {turn.step}, token {span.place} of {len(turn.committed)}: {MEANING[span.kind]}"]
    parts.append(f"{len(turn.path)} of {len(turn.tokens)} guesses accepted" if turn.tokens else "nothing was guessed")
    if turn.exit is not None:
        parts.append(f"drafted through layer {turn.exit}")
    return "; ".join(parts)


def _steps(found: Sequence[Bar]) -> dict[str, Any]:
    exits = [bar.exit for bar in found if bar.exit is not None]
    return {
        "most": max(bar.drafted for bar in found),
        "bars": [
            {"x": x, "first": bar.first, "exit": bar.exit, "parts": segments(bar), "title": _bar_title(bar)}
            for x, bar in enumerate(found)
        ],
        "last": found[-1].last,
        "exit": max(exits) if exits else None,
    }


def _bar_title(bar: Bar) -> str:
    title = f"step {bar.name}: {bar.accepted.total()} of {bar.drafted} guesses accepted, {bar.tokens} tokens"
    if bar.exit is not None:
        title += f"; exit layer {bar.exit:.3g}"
    return title if bar.length is None else f"{title}; draft length chosen: {bar.length:.3g}"


def _trees(trace: Trace, found: Sequence[Passage]) -> list[dict[str, Any]]:
    names, by_row = vocabulary(trace), {passage.number: passage for passage in found}
    many = len(found) > 1
    trees = []
    for turn in telling(turns(trace)):
        picture = tree_picture(turn, _before(by_row[turn.row], turn.step), names)
        where = f"Step {turn.step}, row {turn.row}" if many else f"Step {turn.step}"
        trees.append({"title": f"{where}: {len(turn.path)} of {len(turn.tokens)} guesses accepted", "picture": picture})
    return trees


def _before(passage: Passage, step: int) -> str:
    """The label of the last token before a step."""
    earlier: Mapping[bool, Any] = {span.turn is not None and span.turn.step < step: span for span in passage.spans}
    if True in earlier:
        return earlier[True].label
    return passage.prompt[-1] if passage.prompt else "prompt"
