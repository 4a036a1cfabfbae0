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
from pertoken.view.runs import HEADS, cells
from pertoken.view.spans import MEANING, Bar, Passage, Totals, bars, passages, printable, totals

STYLES = {
    "model": "black on #9ecae9 underline",
    "ngram": "black on #f5d38a italic",
    "exit": "black on #a3d9c0 underline italic",
    "corrected": "bold #d55e00 underline",
    "plain": "",
    "unknown": "dim",
}
PROMPT_LINES, PROMPT_CHARACTERS = 8, 600
CHART_LINES, CHART_WIDTH = 32, 40


def text_view(trace: Trace) -> RenderableType:
    """The output of every row, each token styled by what it cost, below a dimmed end of its prompt."""
    found = passages(trace)
    parts: list[RenderableType] = [_headline(trace), *_row_texts(found)]
    if not found:
        parts.append(Text("The trace holds no text and no decoding steps.", "dim"))
    legend = _legend(Counter(span.kind for passage in found for span in passage.spans))
    return Group(*parts, legend)


def _headline(trace: Trace) -> Text:
    names = [str(trace.about[key]) for key in ("method", "model") if trace.about.get(key)]
    line = Text(" on ".join(names) or "trace", "bold")
    summary = summarised(totals(trace))
    return line.append(f"  {summary}", "not bold dim") if summary else line


def summarised(sums: Totals) -> str:
    """The totals as one line; empty for a trace without decoding steps."""
    if not sums.steps:
        return ""
    line = f"{sums.tokens} tokens in {sums.steps} model steps"
    if sums.drafted:
        line += f", {sums.accepted} of {sums.drafted} guesses accepted"
    return line


def _row_texts(found: Sequence[Passage]) -> list[Text]:
    texts = []
    for passage in found:
        text = Text()
        if len(found) > 1:
            text.append(f"row {passage.number}\n", "bold dim")
        text.append(_end_of_prompt("".join(passage.prompt)), "dim")
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
    """A line per step, or per equal run of steps where there are many: guesses drawn, the accepted ones filled."""
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
