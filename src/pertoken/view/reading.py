"""The report's part on what was read: the text with each token as strong as it was read often, and pictures of it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from pertoken.view.heat import TONES, Heat, by_layer, by_step
from pertoken.view.reads import KEPT, Reads
from pertoken.view.spans import marked, printable

MOST_TOKENS, MOST_COLUMNS, MOST_LINES = 4000, 192, 96
NO_TEXT = "·"


def section(found: Sequence[Reads]) -> dict[str, Any]:
    """What the page shows of these rows."""
    return {"figures": figures(found), "filled": found[0].verb, "passages": [passage(row) for row in found]}


def figures(found: Sequence[Reads]) -> list[tuple[str, str]]:
    """Numbers over all rows, with their names."""
    steps = sum(row.steps for row in found)
    keys, before = sum(float(row.keys.sum()) for row in found), sum(int(row.before.sum()) for row in found)
    told = [("steps", f"{max(row.steps for row in found):,}")]
    if not steps:
        return told
    verb = found[0].verb
    told += [(f"keys {verb} per step", f"{keys / steps:,.1f}"), ("of all keys", f"{100 * keys / before:.0f} %")]
    if verb == KEPT:
        told.append(("most keys kept", f"{max(float(row.keys.max()) for row in found if row.steps):,.1f}"))
    return told


def passage(row: Reads) -> dict[str, Any]:
    """A row: its tokens, those of the prompt apart, and its pictures."""
    picture, often = by_step(row, MOST_COLUMNS, MOST_LINES), row.often.tolist()
    reader = {int(column): step for step, column in enumerate(row.before.tolist(), 1)}
    firsts = {step: line.first for line in picture.lines for step in range(line.first, line.last + 1)}
    count = max(row.length, len(row.pieces))
    prompt = range(min(row.prompt, count))
    runs = [list(run) for _, run in groupby(prompt, lambda place: _tone(often, place))] if count > MOST_TOKENS else ()
    given = [_run(row, run, often) for run in runs] or [_token(row, place, often) for place in prompt]
    made = []
    for place in range(len(prompt), count):
        step = reader.get(place)
        made.append((firsts[step] if step else 0, _token(row, place, often, step)))
    return {
        "number": row.number,
        "given": given,
        "steps": [(step, [token for _, token in run]) for step, run in groupby(made, lambda one: one[0])],
        "text": bool(row.pieces),
        "verb": row.verb,
        "length": row.length,
        "prompt": row.prompt,
        "heats": [heat for heat in (_by_step(row, picture), _by_layer(row)) if heat],
        "most": max((line.before for line in picture.lines), default=0),
        "lines": picture.lines,
        "last": row.steps,
    }


def _by_step(row: Reads, picture: Heat) -> dict[str, Any] | None:
    if not picture.lines:
        return None
    lines = picture.lines[0]
    each = "a step" if lines.first == lines.last else f"{lines.last} steps"
    return {"name": "Token by step", "each": each, "heat": picture, "foot": f"steps from 1 at the top to {row.steps}"}


def _by_layer(row: Reads) -> dict[str, Any] | None:
    if not row.steps or len(row.layers) < 2:
        return None
    foot = f"layers from {row.layers[0]} at the top to {row.layers[-1]}, over all steps"
    return {"name": "Token by layer", "each": "a layer", "heat": by_layer(row, MOST_COLUMNS), "foot": foot}


def _tone(often: Sequence[float], place: int) -> float:
    """How strong a token is: the root of how often, in steps."""
    return round(often[place] ** 0.5 * 4 * TONES) / (4 * TONES) if place < len(often) else 0.0


def _token(row: Reads, place: int, often: Sequence[float], step: int | None = None) -> dict[str, Any]:
    piece = row.pieces[place] if place < len(row.pieces) else NO_TEXT
    return {
        "text": printable(piece),
        "line_end": "\n" in piece,
        "title": title(row, place, step),
        "tone": _tone(often, place),
    }


def _run(row: Reads, places: Sequence[int], often: Sequence[float]) -> dict[str, Any]:
    """Adjacent tokens of a tone as one."""
    first, last = places[0], places[-1]
    if first == last:
        return _token(row, first, often)
    text = "".join(row.pieces[first : last + 1]) or NO_TEXT * len(places)
    most = 100 * max(often[first : last + 1], default=0.0)
    told = f"tokens {first}–{last}: {row.verb} at most {most:.1f} %"
    return {"text": printable(text), "line_end": False, "title": told, "tone": _tone(often, first)}


def title(row: Reads, place: int, step: int | None = None) -> str:
    """What became of a token, for a tooltip; step: its own, at which it read."""
    name = f"token {place}"
    if place < len(row.pieces):
        name += f", {marked(row.pieces[place]) or '·'}"
    if place >= row.length or not int(row.could[place]):
        told = ["nothing came after it that could read it"]
    else:
        count = int(row.could[place])
        told = [f"{row.verb} {100 * float(row.often[place]):.0f} % over {count} step{'s' if count > 1 else ''}"]
        layers = row.by_layer[:, place]
        if len(row.layers) > 1 and float(layers.max()) > float(layers.min()):
            best = int(layers.argmax())
            told.append(f"most in layer {row.layers[best]}, {100 * float(layers[best]):.0f} %")
    prompt = float(row.by_prompt[place]) if place < row.length else float("nan")
    if prompt == prompt:
        told.append(f"by later tokens of the prompt {100 * prompt:.0f} %")
    if step:
        told.append(
            f"at its own step {float(row.keys[step - 1]):,.1f} of {int(row.before[step - 1]):,} keys {row.verb}"
        )
    return f"{name}: {'; '.join(told)}"
