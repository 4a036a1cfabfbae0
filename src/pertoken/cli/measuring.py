"""`methods` and `bench`: what there is, and whether what it claims holds."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from pertoken.cli.errors import complain
from pertoken.cli.output import AsJson, Results, console, escaped, print_json, progress, table


def methods(as_json: AsJson = False, results: Results = None) -> None:
    """List every method with its card and newest results.

    Example: pertoken methods
    """
    from pertoken.bench.catalogue import entries, headline

    found = entries(results)
    if as_json:
        print_json(found)
        return
    rows = table("method\n[dim]question", "shape\n[dim]exactness", "decides\n[dim]needs", "paper\n[dim]newest result")
    for column in rows.columns[:3]:
        column.no_wrap = True
    for one in found:
        pairs = (
            (one["name"], one["question"]),
            (one["shape"], one["exactness"]),
            (", ".join(one["writes"]), ", ".join(one["needs"])),
            (one["paper"]["arxiv"] or "-", escaped(headline(one))),
        )
        rows.add_row(*(f"{first}\n[dim]{second}" for first, second in pairs))
    console().print(rows)


def bench(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Methods, or code: all methods on one task.")],
    quick: Annotated[bool, typer.Option(help="Fewer samples, under two minutes, nothing is written.")] = False,
    as_json: AsJson = False,
    results: Results = None,
    seed: Annotated[int, typer.Option(help="For everything random.")] = 0,
    only: Annotated[str, typer.Option(metavar="TEXT", help="Only claims whose sentence contains this.")] = "",
) -> None:
    """Measure the claims of methods; a full run keeps every finished claim in results/NAME.json.

    `code` compares methods that decode or skip layers by their completions of held-out Python: lines (exact, edit
    similarity), functions (ROUGE-L, do they parse) and functions that are run on their tests, each beside a random
    choice at its budget. It ends with a table of methods by measures.

    Example: pertoken bench dyspec --quick

    Example: pertoken bench code --json
    """
    from pertoken.bench.catalogue import number
    from pertoken.bench.runner import run
    from pertoken.methods import load_methods

    load_methods()
    with progress() as status:
        say = console(stderr=True)

        def on_record(record: dict[str, Any]) -> None:
            outcome = "holds" if record["holds"] else "does not hold"
            say.print(f"{record['method']}: {record['claim']}: {outcome}", soft_wrap=True, markup=False)

        outcome = run(names, quick, on_record, seed=seed, directory=results, status=status, only=only)
    if as_json:
        print_json(outcome.records)
    else:
        out = console()
        for record in outcome.records:
            verdict = "[green]holds        [/]" if record["holds"] else "[red]does not hold[/]"
            error = record.get("detail", {}).get("error")
            figures = f"{number(record['value'])} against {number(record['baseline_value'])} ({record['baseline']})"
            figures += f", ratio {number(record['ratio'])}, expected {record['expected']}; {record['metric']}"
            out.print(f"{verdict} {record['method']}: {escaped(record['claim'])}")
            out.print(f"              [red]{escaped(error)}" if error else f"              [dim]{escaped(figures)}")
            if lines := record.get("detail", {}).get("table"):
                shown = table(*lines[0])
                for line in lines:
                    shown.add_row(*(escaped(v) if isinstance(v, str) else number(v) for v in line.values()))
                out.print(shown)
    kept = ", ".join(map(str, outcome.saved)) or "nothing"
    if outcome.interrupted:
        complain(f"stopped; {len(outcome.records)} finished claim(s), kept in: {kept}")
    elif outcome.saved:
        print(f"kept in {kept}", file=sys.stderr)
    raise typer.Exit(0 if outcome.fine else 1)
