"""`tune`: the setting of a method that spends least and keeps the quality."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from pertoken.cli.errors import complain
from pertoken.cli.output import AsJson, Batch, Device, Draft, Dtype, console, escaped, print_json, progress, table


def tune(
    name: Annotated[str, typer.Argument(metavar="METHOD", help="A policy or decoder with a dial.")],
    model: Annotated[str, typer.Option(help="Directory, hub id, or zoo:NAME.")],
    data: Annotated[
        Path,
        typer.Option(help='Prompts: one per line; .tsv: answers behind a tab; .jsonl: "prompt" and maybe "answer".'),
    ],
    keep_quality: Annotated[float, typer.Option(help="Share of the whole model's quality to keep.")] = 0.99,
    out: Annotated[
        Path | None,
        typer.Option(help="Where the choice goes, the chart beside it.", show_default="METHOD.tuned.json"),
    ] = None,
    values: Annotated[
        str | None, typer.Option(help="Values of the dial, with commas.", show_default="those of its card")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Another setting of the method.")
    ] = None,
    draft: Draft = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate per prompt.")] = 64,
    limit: Annotated[int | None, typer.Option(help="Take only so many prompts, from the first.")] = None,
    batch: Batch = 8,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Find the setting of a method that spends least and keeps the quality, on your own texts.

    Turns the method's dial (`methods --json` names it; a policy's is its budget), shows quality against computation
    beside the whole model (full) and a random choice that spends as much, and writes the chosen setting to a file for
    `pertoken run --config`. If nothing keeps the quality, it says so and writes full.

    Quality without answers: mean edit similarity (1 - edits / length of the longer text) of the output with that of the
    whole model, decoding greedily; the whole model has 1. With answers: mean edit similarity of the output, as far as
    the answer is long, with the answer, over that of the whole model.

    Computation: floating-point operations of the run, prompts included, over those of the whole model. A policy is
    attached and not verified (`run POLICY` would verify it).

    Ctrl-C keeps the settings tried so far. Exit codes: 0 a choice was written, 1 stopped before the end, 2 bad
    arguments.

    Example: pertoken tune stop_exit --model zoo:code-target --data prompts.txt --keep-quality 0.95
    """
    from pertoken.bench.compare import Options
    from pertoken.bench.settings import dial_of, setting, value_of
    from pertoken.bench.texts import read_examples
    from pertoken.bench.tune import tune as sweep
    from pertoken.bench.tune import write
    from pertoken.core.card import card
    from pertoken.methods import load_methods

    load_methods()
    one = card(name)
    dial = dial_of(one)
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} is too few; give at least 1")
    examples = read_examples(data)[:limit]
    others = dict(setting(one, text) for text in settings or ())
    tried = [value_of(dial.name, text.strip()) for text in values.split(",")] if values else None
    options = Options(max_new_tokens, dtype=dtype, device=device, batch=batch)
    with progress() as status:
        found = sweep(
            name, model, draft, examples, options,
            keep=keep_quality, values=tried, settings=others, data=str(data), status=status,
        )  # fmt: skip
    kept = write(found, out or Path(f"{name}.tuned.json")) if found.points else []
    if as_json:
        print_json(found.to_json())
    else:
        show_tuned(found)
    if kept:
        print(f"configuration: {kept[0]}, chart: {kept[1]}", file=sys.stderr)
    if found.interrupted:
        complain(f"stopped; {len(found.of(name))} setting(s) were tried")
    raise typer.Exit(1 if found.interrupted else 0)


def show_tuned(found: Any) -> None:
    """The settings of a sweep with their quality as bars, and what was chosen."""
    from pertoken.bench.catalogue import number

    rows, out = table(found.dial, "operations", "quality", "95 %", "", "same text"), console()
    theirs = {point.setting: point for point in found.of("random")}
    for point in sorted((p for p in found.points if p.of != "random"), key=lambda p: p.compute):
        for one in filter(None, (point, theirs.get(point.setting) if point.of != "full" else None)):
            of_random = one.of == "random"
            bar = ("░" if of_random else "█") * round(12 * min(max(one.quality, 0), 1))
            name = "  random" if of_random else one.setting.partition("=")[2] or one.of
            cells = (name, f"{100 * one.compute:.1f} %", f"{one.quality:.3f}", f"{one.low:.2f}–{one.high:.2f}", bar)
            rows.add_row(*map(escaped, cells), f"{100 * one.same:.0f} %", style="dim" if of_random else None)
    out.print(rows)
    for name, reason in found.left_out.items():
        out.print(f"{name} was left out: {reason}", style="yellow", markup=False)
    if found.idle:
        out.print(
            f"No setting of {found.method} changed anything on these texts: they may be shorter than what it always "
            "keeps, or a part that it needs was not given (--set).",
            style="yellow",
        )
    chosen = found.chosen
    if chosen is not None:
        told = f"{found.method} {chosen.setting} keeps {number(chosen.quality)} of the quality for "
        out.print(f"[green]chosen:[/] {escaped(told)}{100 * chosen.compute:.1f} % of the operations", soft_wrap=True)
    elif found.points:
        told = "spends less and keeps" if found.keep <= 1 else "reaches"
        out.print(
            f"[yellow]chosen: {found.whole}[/]; nothing that was tried {told} {found.keep:g} of the quality",
            soft_wrap=True,
        )
