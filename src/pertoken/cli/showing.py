"""`trace`, and what a run found: on stdout, as JSON, as a report, and as files of traces."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from pertoken.cli.output import AsJson, Html, console, escaped, print_json, table


def trace(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `run --trace FILE` wrote.")],
    html: Html = None,
    as_json: AsJson = False,
) -> None:
    """Show a recorded trace: what each token got, step by step.

    Example: pertoken trace trace.safetensors --html report.html
    """
    from pertoken.core.trace import Trace

    loaded = Trace.load(file)
    report([loaded], html)
    if as_json:
        steps = [
            {
                "site": step.site,
                "kind": step.decision.kind,
                "rows": list(step.rows),
                "note": step.note,
                "spent": step.decision.spent().tolist(),
            }
            for step in loaded.steps
        ]
        print_json({"about": loaded.about, "steps": steps})
        return
    from pertoken.view.terminal import runs_table, steps_chart, text_view

    out = console()
    out.print(text_view(loaded))
    out.print(steps_chart(loaded))
    if runs := loaded.about.get("runs"):
        out.print(runs_table(runs))


def show(found: Any, as_json: bool, html: Path | None) -> None:
    """A comparison on stdout and, if asked for, as a report."""
    report(found.traces, html)
    if as_json:
        print_json(found.to_json())
        return
    from pertoken.view.terminal import runs_table, text_view

    out = console()
    data = found.to_json()
    for one in found.traces[-1:]:
        out.print(text_view(one))
    out.print(runs_table(data["runs"]))


def report(traces: list[Any], html: Path | None) -> None:
    """Traces as a page, if one is asked for."""
    if html is not None:
        from pertoken.view.html import write

        write(traces, html)
        print(f"report: {html}", file=sys.stderr)


def show_pictures(looks: Any, as_json: bool, html: Path | None) -> None:
    """Sides of a run on pictures on stdout and, if asked for, as a page with the regions drawn."""
    report_regions(looks.drawn, f"{looks.model}: {', '.join(one.name for one in looks.sides)}", html)
    if as_json:
        print_json(looks.to_json())
        return
    grid = any(one.cost for one in looks.sides)
    what = ("cost, diagonal 1", "classes") if grid else ("tokens left", "largest regions")
    rows = table("method", *what, "seconds", "speed-up", "GFLOP", "against dense")
    for one in looks.sides:
        tokens = f"{sum(one.tokens) / len(one.tokens):.1f}" if one.tokens else "all"
        largest = ", ".join(str(size) for size in sorted((s for row in one.regions for s in row), reverse=True)[:5])
        if grid:
            tokens, largest = f"{sum(one.cost) / len(one.cost):.2f}", ", ".join(map(escaped, one.labels[:5]))
        cells = (one.name, tokens, largest or "-", f"{one.seconds:.4f}", f"{one.speedup:.2f}", f"{one.flops / 1e9:.3f}")
        rows.add_row(*cells, f"{one.agreement:.4f} ({one.measure})")
    console().print(rows)
    if looks.note:
        print(looks.note, file=sys.stderr)


def show_clip(watched: Any, as_json: bool, html: Path | None) -> None:
    """Sides of a run on a clip on stdout and, if asked for, as a page with the clip as a strip."""
    report_regions(watched.drawn, f"{watched.model}: {watched.clip}", html)
    if as_json:
        print_json(watched.to_json())
        return
    rows = table("method", "tokens", "seconds", "speed-up", "GFLOP", "answer", title=escaped(watched.question))
    for one in watched.sides:
        figures = (str(one.tokens), f"{one.seconds:.4f}", f"{one.speedup:.2f}", f"{one.flops / 1e9:.3f}")
        rows.add_row(one.name, *figures, escaped(one.answer))
    out = console()
    out.print(rows)
    for one in watched.sides:
        for number, text in enumerate(one.said, 1):
            out.print(f"{one.name}, segment {number}: {escaped(text)}")


def report_regions(drawn: list[Any], title: str, html: Path | None) -> None:
    """Pictures with their regions as a page, if one is asked for."""
    if html is not None:
        from pertoken.view.regions import write

        write(drawn, title, html)
        print(f"report: {html}", file=sys.stderr)


def save_traces(found: Any, path: Path) -> None:
    """One file per method that records; with several the method's name goes into each file's."""
    from pertoken.bench.sides import DENSE, PLAIN

    wanted = [one for one in found.traces if one.about["method"] not in (PLAIN, DENSE, found.options.baseline)]
    wanted = wanted or found.traces
    if not wanted:
        raise ValueError(f"none of the methods records decisions, so there is nothing to save in {path}")
    for one in wanted:
        part = re.sub(r"[^\w+-]+", "-", one.about["method"])
        own = path if len(wanted) == 1 else path.with_name(f"{path.stem}.{part}{path.suffix}")
        one.save(own)
        print(f"trace: {own}", file=sys.stderr)
