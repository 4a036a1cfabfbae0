"""Traces and comparisons for the terminal, as rich renderables. A model's text is never read as markup."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pertoken.core.trace import Trace
from pertoken.view.depths import Depths, depths
from pertoken.view.fills import Fill, fills, spent
from pertoken.view.grid import DECIDED, grid, tone
from pertoken.view.read_text import grids, ramp, summary, texts
from pertoken.view.reading import NO_TEXT
from pertoken.view.reads import reads
from pertoken.view.runs import HEADS, cells
from pertoken.view.spans import MEANING, Bar, Passage, Totals, bars, passages, printable, totals

STYLES = {
    "model": "black on #9ecae9 underline",
    "ngram": "black on #f5d38a italic",
    "exit": "black on #a3d9c0 underline italic",
    "grammar": "black on #d4b9da underline",
    "corrected": "bold #d55e00 underline",
    "plain": "",
    "unknown": "dim",
}
PROMPT_LINES, PROMPT_CHARACTERS = 8, 600
CHART_LINES, CHART_WIDTH = 32, 40
FILL_LINES, FILL_COLUMNS, FILL_ROWS = 24, 48, 4
RAMP = ("#8f9bf0", "#b79af0", "#de9ce0", "#f59fb8", "#fbb184", "#f7cf6b")  # first step to last
WORKED = {DECIDED: "▒"}
KEYS = {
    "committed": "█ committed   ░ computed while undecided   ▒ computed after its commit",
    "inserted": "█ inserted   ▒ read from then on   ░ given",
}


def text_view(trace: Trace) -> RenderableType:
    """The output of every row, each token styled by what it cost, below a dimmed end of its prompt."""
    if filled := fills(trace):
        return Group(_headline(trace, _filled_summary(filled)), *_fill_texts(filled), _ramp(filled[0].verb))
    if read := reads(trace):
        return Group(_headline(trace, summary(read)), *texts(read), ramp(read[0].verb))
    if ran := depths(trace):
        counts = [count for row in ran for count in row.counts]
        mean = f"{sum(counts) / max(len(counts), 1):.2f} of {ran[0].depth} layers per token"
        return Group(_headline(trace, mean), *_depth_texts(ran), _ramp("", "few layers", "all"))
    found = passages(trace)
    parts: list[RenderableType] = [_headline(trace, summarised(totals(trace))), *_row_texts(found)]
    if not found:
        parts.append(Text("The trace holds no text and no decoding steps.", "dim"))
    legend = _legend(Counter(span.kind for passage in found for span in passage.spans))
    return Group(*parts, legend)


def _headline(trace: Trace, summary: str) -> Text:
    names = [str(trace.about[key]) for key in ("method", "model") if trace.about.get(key)]
    line = Text(" on ".join(names) or "trace", "bold")
    return line.append(f"  {summary}", "not bold dim") if summary else line


def summarised(sums: Totals) -> str:
    """The totals as one line; empty for a trace without decoding steps."""
    if not sums.steps:
        return ""
    line = f"{sums.tokens} tokens in {sums.steps} model steps"
    if sums.drafted:
        line += f", {sums.accepted} of {sums.drafted} guesses accepted"
    return line


def _filled_summary(found: Sequence[Fill]) -> str:
    told = spent(found)
    if found[0].given is not None:
        return f"{told.committed} tokens inserted in {told.steps} model steps"
    share = 100 * told.computed / told.whole
    return f"{told.committed} positions in {told.steps} model steps, {share:.0f} % of all positions computed"


def _fill_texts(found: Sequence[Fill]) -> list[Text]:
    texts = []
    for fill in found:
        text = _beginning(fill.number, len(found), fill.prompt_pieces)
        for _, piece, step in fill.text:
            text.append(printable(piece), f"black on {_shade(tone(step, fill.steps))}" if step else "dim")
        texts.append(text.append("\n"))
    return texts


def _depth_texts(found: Sequence[Depths]) -> list[Text]:
    texts = []
    for row in found:
        text = _beginning(row.number, len(found), row.prompt_pieces)
        for place, own in enumerate(row.layers):
            piece = row.pieces[place] if place < len(row.pieces) else NO_TEXT
            text.append(printable(piece), "dim" if own is None else f"black on {_shade(len(own) / row.depth)}")
        texts.append(text.append("\n"))
    return texts


def _shade(share: float) -> str:
    return RAMP[min(int(share * len(RAMP)), len(RAMP) - 1)]


def _ramp(verb: str, first: str = "first", last: str = "last") -> Text:
    line = Text(f"{verb} {first} ".lstrip(), "dim")
    for colour in RAMP:
        line.append("   ", f"on {colour}")
    return line.append(f" {last}", "dim")


def _beginning(number: int, rows: int, prompt: Sequence[str]) -> Text:
    """A row's number, where there are several, and the dimmed end of its prompt."""
    text = Text(f"row {number}\n" if rows > 1 else "", "bold dim")
    return Text.assemble(text, (_end_of_prompt("".join(prompt)), "dim"))


def _row_texts(found: Sequence[Passage]) -> list[Text]:
    texts = []
    for passage in found:
        text = _beginning(passage.number, len(found), passage.prompt)
        for span in passage.spans:
            text.append(span.label, STYLES[span.kind])
        texts.append(text.append("\n"))
    return texts


def _end_of_prompt(prompt: str) -> str:
    shown = "".join(prompt.splitlines(keepends=True)[-PROMPT_LINES:])[-PROMPT_CHARACTERS:]
    hidden = len(prompt) - len(shown)
    return (f"… {hidden} characters before\n" if hidden else "") + printable(shown)


def _legend(kinds: Counter[str]) -> Text:
    lines = []
    for kind, meaning in MEANING.items():
        if kinds[kind]:
            share = f" {kinds[kind]:4d}  {kinds[kind] / kinds.total():4.0%}  "
            lines.append(Text.assemble((" ab ", STYLES[kind]), share, (meaning, "dim")))
    return Text("\n").join(lines)


def runs_table(runs: Sequence[Mapping[str, Any]]) -> Table:
    """The sides of a comparison, one per line."""
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    for number, head in enumerate(HEADS):
        narrow = head.replace(" ", "\n").replace("/", "\n/")
        table.add_column(narrow, justify="right" if number else "left", overflow="fold")
    for run in runs:
        row = cells(run)
        verdict = Text(row.values[-1], {True: "green", False: "bold red", None: "dim"}[row.same])
        table.add_row(*(Text(value) for value in row.values[:-1]), verdict)
    return table


def steps_chart(trace: Trace) -> RenderableType:
    """A line per step, or per equal run of steps where there are many: guesses drawn, the accepted ones filled; for a
    canvas, what was computed and committed."""
    if filled := fills(trace):
        return _canvases(filled)
    if read := reads(trace):
        return grids(read)
    found = bars(trace, CHART_LINES)
    if not found:
        return _other_decisions(trace)
    most = max(bar.drafted for bar in found)
    if not most:
        return Text(f"No guesses were made in {found[-1].last} steps.", "dim")
    table = Table(box=None, padding=(0, 1), header_style="dim")
    for head in ("step", "guesses", "accepted", "tokens", "exit"):
        table.add_column(head, justify="left" if head == "guesses" else "right", no_wrap=True)
    table.columns[-1].header = "exit layer" if any(bar.exit is not None for bar in found) else ""
    for bar in found:
        accepted = f"{bar.accepted.total()} of {bar.drafted}"
        table.add_row(
            bar.name, _bar(bar, most), accepted, str(bar.tokens), "" if bar.exit is None else f"{bar.exit:.3g}"
        )
    return table


def _bar(bar: Bar, most: int) -> Text:
    scale = min(1.0, CHART_WIDTH / most)
    full = round(bar.drafted * scale)
    line, used = Text(), 0
    for source, count in bar.accepted.items():
        length = round(count * scale)
        line.append("█" * length, STYLES[source].split(" on ")[1].split()[0])
        used += length
    return line.append("░" * max(full - used, 0), "dim")


def _canvases(found: Sequence[Fill]) -> RenderableType:
    parts: list[RenderableType] = []
    for fill in found[:FILL_ROWS]:
        row = f"row {fill.number}, " if len(found) > 1 else ""
        parts.append(Text(row + _columns(fill), "dim"))
        parts.append(_canvas(fill))
    if len(found) > FILL_ROWS:
        parts.append(Text(f"and {len(found) - FILL_ROWS} more rows", "dim"))
    return Group(*parts, Text(KEYS[found[0].verb], "dim"))


def _columns(fill: Fill) -> str:
    """What the columns of its canvas are."""
    if fill.given is None:
        return f"{fill.prompt} prompt tokens | {fill.length} positions from left to right"
    return f"{fill.length} tokens of the finished text from left to right, {int(fill.given.sum())} of them given"


def _canvas(fill: Fill) -> Text:
    """A line per step: the prompt, a bar, the canvas."""
    picture = grid(fill, FILL_COLUMNS, FILL_LINES)
    width, gap = round(picture.width), round(picture.start)
    cells = [[(" ", "")] * width for _ in picture.lines]
    for work in picture.boxes:
        x = round(work.x)
        for line in cells[work.y : work.y + work.height]:
            line[x : x + work.width] = [(WORKED.get(work.kind, "░"), "dim")] * work.width
    for line, own in zip(cells, picture.lines, strict=True):
        for mark in own.marks:
            line[round(mark.x)] = ("█", _shade(mark.tone))
        if gap:
            line[gap - 2 : gap] = [("│", "dim"), ("", "")]
    names = [str(line.first) if line.first == line.last else f"{line.first}–{line.last}" for line in picture.lines]
    most = max(map(len, names))
    return Text("\n").join(
        Text.assemble((f"{name:>{most}} ", "dim"), *line) for name, line in zip(names, cells, strict=True)
    )


def _other_decisions(trace: Trace) -> RenderableType:
    if not trace.steps:
        return Text("The trace holds no decisions.", "dim")
    table = Table(box=box.SIMPLE_HEAD)
    for head in ("site", "decision", "times", "spent in all"):
        table.add_column(head, justify="left" if head in ("site", "decision") else "right")
    spent: dict[tuple[str, str], float] = defaultdict(float)
    times: Counter[tuple[str, str]] = Counter()
    for step in trace.steps:
        key = (step.site, step.decision.kind)
        times[key] += 1
        spent[key] += step.decision.spent().sum().item()
    for (site, kind), number in times.items():
        table.add_row(Text(site), kind, str(number), f"{spent[site, kind]:g}")
    return table
