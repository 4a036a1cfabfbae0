"""What was read, for the terminal: the text with each token as strong as it was read often, and tokens by step."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from rich.console import Group, RenderableType
from rich.text import Text

from pertoken.view.heat import Heat, by_step
from pertoken.view.reading import NO_TEXT, figures
from pertoken.view.reads import Reads
from pertoken.view.spans import printable

RAMP = ("#3a2a20", "#6b3a1c", "#a34d16", "#d9661a", "#ff9a4d")  # read never to always
TOKENS, AROUND = 400, 8
LINES, COLUMNS, ROWS = 24, 48, 4
SHADES = " ░▒▓█"


def summary(found: Sequence[Reads]) -> str:
    """The figures in a line."""
    return ", ".join(f"{value} {name}" for name, value in figures(found))


def texts(found: Sequence[Reads]) -> list[Text]:
    """The tokens of every row, the stronger the more often they were read; of a long text what was read most."""
    parts = []
    for row in found[:ROWS]:
        text, often = Text(f"row {row.number}\n" if len(found) > 1 else "", "bold dim"), row.often.tolist()
        count, last = max(row.length, len(row.pieces)), -1
        for place in _telling(row, count):
            if place > last + 1:
                text.append(f" … {place - last - 1} tokens … ", "not bold dim italic")
            piece = row.pieces[place] if place < len(row.pieces) else NO_TEXT
            share = often[place] if place < row.length else 0.0
            text.append(
                printable(piece), f"not bold not dim {_style(share)}{'' if place < row.prompt else ' underline'}"
            )
            last = place
        parts.append(text.append("\n"))
    if len(found) > ROWS:
        parts.append(Text(f"and {len(found) - ROWS} more rows", "dim"))
    return parts


def _telling(row: Reads, count: int) -> list[int]:
    """The places that are shown: all of a short text; else those around what was read most, and the end."""
    if count <= TOKENS:
        return list(range(count))
    shown = set(range(max(count - 10 * AROUND, 0), count))
    for place in row.often.argsort(descending=True, stable=True).tolist():
        if len(shown) >= TOKENS:
            break
        if place not in shown:
            shown |= set(range(max(place - AROUND, 0), min(place + AROUND + 1, count)))
    return sorted(shown)


def _style(share: float) -> str:
    if share <= 0:
        return ""
    level = min(int(share**0.5 * len(RAMP)), len(RAMP) - 1)
    return f"{'white' if level < 3 else 'black'} on {RAMP[level]}"


def ramp(verb: str) -> Text:
    """The colours and what they mean."""
    line = Text(f"{verb} never ", "dim")
    for colour in RAMP:
        line.append("   ", f"on {colour}")
    return line.append(" always", "dim")


def grids(found: Sequence[Reads]) -> RenderableType:
    """The tokens of every row by step."""
    parts: list[RenderableType] = []
    for row in found[:ROWS]:
        name = f"row {row.number}, " if len(found) > 1 else ""
        made = row.length - row.prompt
        parts.append(Text(f"{name}{row.prompt} tokens of the prompt | {made} generated, from left to right", "dim"))
        parts.append(_grid(by_step(row, COLUMNS, LINES)))
    if len(found) > ROWS:
        parts.append(Text(f"and {len(found) - ROWS} more rows", "dim"))
    return Group(*parts, Text(f"█ always {found[0].verb}   ░ rarely; right: keys {found[0].verb} of all", "dim"))


def _grid(picture: Heat) -> Text:
    """A line per step: its number, the tokens, and how many keys were read."""
    names = [str(line.first) if line.first == line.last else f"{line.first}–{line.last}" for line in picture.lines]
    most, lines = max(map(len, names), default=0), []
    for name, line, tones in zip(names, picture.lines, picture.tones.tolist(), strict=True):
        cells = Text("".join(SHADES[ceil(tone * (len(SHADES) - 1))] for tone in tones), RAMP[-1])
        if picture.border is not None:
            cells = Text.assemble(cells[: round(picture.border)], ("│", "dim"), cells[round(picture.border) :])
        lines.append(
            Text.assemble((f"{name:>{most}} ", "dim"), cells, (f" {line.keys:,.1f} of {line.before:,.0f}", "dim"))
        )
    return Text("\n").join(lines)
