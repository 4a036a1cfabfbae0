"""Command line: methods, bench, tune, run, demo, trace, zoo.

Exit codes: 0 fine, 1 a claim or run failed, 2 bad arguments.

Everything heavy is imported inside the commands, so that help is instant.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

TRACEBACK = "PERTOKEN_TRACEBACK"


class Commands(TyperGroup):
    """Says expected errors in one sentence on stderr; a traceback is for bugs, or when PERTOKEN_TRACEBACK is set."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt:
            complain("stopped")
            raise typer.Exit(1) from None
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whoever read our output has gone
            raise typer.Exit(1) from None
        except Exception as error:
            code = exit_code(error)
            if code is None or os.environ.get(TRACEBACK):
                raise
            complain(str(error))
            raise typer.Exit(code) from None


def exit_code(error: Exception) -> int | None:
    """2 for what the user gave, 1 for a run that failed in a way we foresaw, None for a bug."""
    if isinstance(error, (ValueError, OSError)):
        return 2
    return 1 if type(error).__module__.split(".")[0] == "pertoken" else None


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Every token gets just what it needs: run, measure, record and draw dynamic-token methods.",
)
zoo_app = typer.Typer(no_args_is_help=True, help="The small trained models that ship with the package.")
app.add_typer(zoo_app, name="zoo")


def _version(wanted: bool) -> None:
    if wanted:
        from pertoken import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


BASELINE = "full; for a diffusion model dense: one per step, no cache"
CANVAS = "For diffusion models, whose canvas is --max-new-tokens long"
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON alone on stdout.")]
Html = Annotated[Path | None, typer.Option(help="Write a self-contained HTML report.")]
Results = Annotated[Path | None, typer.Option(help="Directory of results; default: ./results, or the checkout's.")]


def complain(text: str) -> None:
    """One red sentence on stderr."""
    typer.secho(f"pertoken: {text}", fg="red", err=True)


def print_json(value: Any) -> None:
    import json

    from pertoken.bench.claims import jsonable

    print(json.dumps(jsonable(value), indent=1, ensure_ascii=False))


def console(stderr: bool = False) -> Any:
    from rich.console import Console

    return Console(stderr=stderr)


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """A status line on stderr; plain lines where stderr is not a terminal."""
    err = console(stderr=True)
    if not err.is_terminal:
        yield lambda text: print(text, file=sys.stderr, flush=True)
        return
    with err.status("starting") as status:
        yield lambda text: status.update(escaped(text))


def escaped(text: str) -> str:
    """Text that rich prints as it is."""
    from rich.markup import escape

    return escape(text)


def table(*heads: str, title: str | None = None) -> Any:
    from rich import box
    from rich.table import Table

    made = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for head in heads:
        made.add_column(head, overflow="fold")
    return made


@app.command()
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


@app.command()
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


@app.command()
def run(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME[+NAME...]", help="Methods, beside the dense model.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Directory, hub id, or zoo:NAME.", show_default="--config's")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A method with settings, as `tune` chose them.")] = None,
    draft: Annotated[str | None, typer.Option(help="Draft model, for methods that need one.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Text to go on from.")] = None,
    input_file: Annotated[
        Path | None,
        typer.Option("--input", help='A prompt per line, .jsonl with "prompt" in each, or a picture, or a folder.'),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate per prompt.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float | None, typer.Option(help="Sample from this share of the probability.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample from this many tokens.")] = None,
    dtype: Annotated[str, typer.Option(help="fp32, bf16, or auto (as stored).")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto (the GPU where there is one).")] = "auto",
    baseline: Annotated[
        str | None,
        typer.Option(
            help="What speed is relative to: a method, or generate (transformers' own).", show_default=BASELINE
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="For sampling.")] = 0,
    batch: Annotated[int, typer.Option(help="Prompts generated together.")] = 8,
    block: Annotated[
        int | None, typer.Option(help="Positions per block.", rich_help_panel=CANVAS, show_default="32")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Steps over the canvas.", rich_help_panel=CANVAS, show_default="one per position")
    ] = None,
    filter_file: Annotated[
        Path | None, typer.Option("--filter", help="Trained filter, for methods that need one.", rich_help_panel=CANVAS)
    ] = None,
    language: Annotated[
        str | None, typer.Option(help="What is written, for methods that parse it.", rich_help_panel=CANVAS)
    ] = None,
    grammar: Annotated[
        Path | None, typer.Option(help="Keep texts in this grammar: a .gbnf, .lark or .regex file.")
    ] = None,
    json_schema: Annotated[Path | None, typer.Option(help="Keep texts valid by this JSON Schema.")] = None,
    as_json: AsJson = False,
    html: Html = None,
    trace: Annotated[Path | None, typer.Option(help="Save what every token got; read it with `trace`.")] = None,
) -> None:
    """Run methods beside the dense model on your own input: output, speed, steps, operations, memory, agreement.

    NAME+NAME puts methods together: policies under a decoder, or rules of a diffusion model. Several names are set side
    by side.

    Example: pertoken run threshold+dual_cache learn2pd --model zoo:code-diffusion --prompt "def parse(text):"

    Example: pertoken run dyspec+xgrammar --model zoo:code-target --json-schema schema.json --prompt "data = "

    Example: pertoken run dyspec --model zoo:code-target --prompt "def parse(text):" --html report.html

    Example: pertoken run --config tuned.json --prompt "def parse(text):"

    Example: pertoken run dymu --model zoo:scenes-segmenter --input photo.png --html regions.html

    Example: pertoken run langdc --model zoo:clips-langdc --input clip.gif --prompt "how many things ?" --html clip.html
    """
    seen = input_file is not None and is_picture(input_file)
    if not seen and (prompt is None) == (input_file is None):
        raise ValueError('give one of --prompt "TEXT" and --input FILE')
    chosen = None
    if config is not None:
        from pertoken.bench.settings import Config

        chosen = Config.load(config)
        model, draft = model or chosen.model, draft or chosen.draft
    if not names and chosen is None:
        raise ValueError("give the NAME of a method, or --config FILE as `pertoken tune` wrote it")
    if model is None:
        raise ValueError("give --model: a directory, a hub id, or zoo:NAME")
    names = names or []
    if input_file is not None and seen:
        from pertoken.bench.clip_run import is_watcher, watch
        from pertoken.bench.picture_run import look

        if is_watcher(model):
            with progress() as status:
                watched = watch(names, model, input_file, prompt, dtype, device, status=status)
            show_clip(watched, as_json, html)
            return
        if prompt is not None:
            raise ValueError("--prompt beside a picture is a question about a clip; give a model that watches clips")
        with progress() as status:
            looks = look(names, model, input_file, dtype, device, status)
        show_pictures(looks, as_json, html)
        return
    from pertoken.bench.compare import Options, compare
    from pertoken.bench.texts import read_prompts

    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
    canvas = {"block": block, "steps": steps, "filter": filter_file and str(filter_file), "language": language}
    canvas |= {"grammar": grammar and str(grammar), "json_schema": json_schema and str(json_schema), "config": chosen}
    options = Options(max_new_tokens, dtype=dtype, device=device, baseline=baseline, batch=batch, **sampling, **canvas)
    prompts = [prompt] if prompt is not None else read_prompts(input_file)  # type: ignore[arg-type]
    with progress() as status:
        found = compare(names, model, draft, prompts, options, status)
    if trace is not None:
        save_traces(found, trace)
    show(found, as_json, html)


@app.command()
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
    draft: Annotated[str | None, typer.Option(help="Draft model, for methods that need one.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate per prompt.")] = 64,
    limit: Annotated[int | None, typer.Option(help="Take only so many prompts, from the first.")] = None,
    batch: Annotated[int, typer.Option(help="Prompts generated together.")] = 8,
    dtype: Annotated[str, typer.Option(help="fp32, bf16, or auto (as stored).")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto (the GPU where there is one).")] = "auto",
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


def is_picture(path: Path) -> bool:
    """Whether an input is a picture or a folder of them."""
    return path.is_dir() or path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def show_clip(watched: Any, as_json: bool, html: Path | None) -> None:
    """Sides of a run on a clip on stdout and, if asked for, as a page with the clip as a strip."""
    if html is not None:
        from pertoken.view.regions import write

        write(watched.drawn, f"{watched.model}: {watched.clip}", html)
        print(f"report: {html}", file=sys.stderr)
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


def show_pictures(looks: Any, as_json: bool, html: Path | None) -> None:
    """Sides of a run on pictures on stdout and, if asked for, as a page with the regions drawn."""
    if html is not None:
        from pertoken.view.regions import write

        write(looks.drawn, f"{looks.model}: {', '.join(one.name for one in looks.sides)}", html)
        print(f"report: {html}", file=sys.stderr)
    if as_json:
        print_json(looks.to_json())
        return
    rows = table("method", "tokens left", "largest regions", "seconds", "speed-up", "GFLOP", "against dense")
    for one in looks.sides:
        tokens = f"{sum(one.tokens) / len(one.tokens):.1f}" if one.tokens else "all"
        largest = ", ".join(str(size) for size in sorted((s for row in one.regions for s in row), reverse=True)[:5])
        cells = (one.name, tokens, largest or "-", f"{one.seconds:.4f}", f"{one.speedup:.2f}", f"{one.flops / 1e9:.3f}")
        rows.add_row(*cells, f"{one.agreement:.4f} ({one.measure})")
    console().print(rows)
    if looks.note:
        print(looks.note, file=sys.stderr)


@app.command()
def demo(
    html: Html = None,
    as_json: AsJson = False,
    quick: Annotated[bool, typer.Option(help="Fewer tokens, one pass.")] = False,
) -> None:
    """Several methods on the packaged code model and a real prompt; under a minute.

    Example: pertoken demo --html demo.html
    """
    from pertoken.bench.demo import demo as demonstrate

    with progress() as status:
        found = demonstrate(quick, status)
    show(found, as_json, html)


def show(found: Any, as_json: bool, html: Path | None) -> None:
    """A comparison on stdout and, if asked for, as a report."""
    if html is not None:
        from pertoken.view.html import write

        write(found.traces, html)
        print(f"report: {html}", file=sys.stderr)
    if as_json:
        print_json(found.to_json())
        return
    from pertoken.view.terminal import runs_table, text_view

    out = console()
    data = found.to_json()
    for one in found.traces[-1:]:
        out.print(text_view(one))
    out.print(runs_table(data["runs"]))


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


@app.command()
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
    if html is not None:
        from pertoken.view.html import write

        write([loaded], html)
        print(f"report: {html}", file=sys.stderr)
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


@zoo_app.command("list")
def zoo_list(as_json: AsJson = False) -> None:
    """List the zoo's models and whether their weights are here.

    Example: pertoken zoo list
    """
    from pertoken.bench.catalogue import zoo_entries

    found = zoo_entries()
    if as_json:
        print_json(found)
        return
    rows = table("model", "layers", "width", "vocabulary", "steps", "teacher", "weights")
    for one in found:
        size = f"{one['bytes'] / 1e6:.2f} MB" if one["bytes"] else "not here; train it"
        cells = [str(one[key] or "-") for key in ("layers", "width", "vocabulary", "steps")]
        rows.add_row(one["name"], *cells, one["teacher"] or "-", size)
    console().print(rows)


@zoo_app.command("train")
def zoo_train(
    name: Annotated[str, typer.Argument(help="A name from `pertoken zoo list`.")],
    out: Annotated[Path, typer.Option(help="Directory of the run; a run found there goes on.")],
    steps: Annotated[int | None, typer.Option(help="Stop after this many steps in all.")] = None,
    compile_model: Annotated[bool, typer.Option("--compile/--no-compile", help="Compile the training step.")] = True,
    images: Annotated[
        str | None,
        typer.Option(help="What a classifier learns from: a folder with a folder of pictures per class, or digits."),
    ] = None,
) -> None:
    """Train a zoo model again from its recipe; Ctrl-C saves, the same command goes on.

    Example: pertoken zoo train code-draft --out runs

    Example: pertoken zoo train scenes-classifier --images photos --out runs
    """
    from pertoken.bench.catalogue import recipe
    from pertoken.bench.curve import write_curve
    from pertoken.zoo.pausing import PAUSES, learn
    from pertoken.zoo.pictures import pictures
    from pertoken.zoo.recipe import FILTERS
    from pertoken.zoo.scenes_models import SCENE_RECIPES, SceneRun
    from pertoken.zoo.train import Run
    from pertoken.zoo.tunings import TUNINGS

    wanted = recipe(name)
    if steps is not None and steps < 1:
        raise ValueError(f"steps={steps} is too few; give at least 1")
    if images is not None and name not in SCENE_RECIPES:
        raise ValueError(f"{name} does not learn from pictures; --images goes with a classifier of `pertoken zoo list`")
    if name in FILTERS:
        from pertoken.zoo.filters import train_filters

        with progress() as status:
            for path in train_filters(name, out / name, wanted, steps, status):
                print(f"filter: {path}", file=sys.stderr)
        return
    if name in PAUSES:
        with progress() as status:
            print(f"threshold: {learn(out / name, wanted, status)}", file=sys.stderr)
        return
    if name in TUNINGS:
        from pertoken.zoo.tuning import tune

        with progress() as status:
            print(f"trained: {tune(name, out / name, wanted, steps, status)}", file=sys.stderr)
        return
    if name in SCENE_RECIPES:
        given = None if images is None else pictures(images, wanted.size)
        training: Any = SceneRun(name, out / name, wanted, given)
    else:
        training = Run(name, out / name, wanted, compile_model)
    resumed = training.resume()
    print(f"going on from step {training.step}" if resumed else f"starting {name}", file=sys.stderr)
    try:
        training.train(until=steps)
    finally:
        for path in write_curve(training.curve, out / name):
            print(f"curve: {path}", file=sys.stderr)
    print(f"model: {training.export()}", file=sys.stderr)


@zoo_app.command("measure")
def zoo_measure(as_json: AsJson = False, results: Results = None) -> None:
    """Measure the packaged models on held-out files (loss, agreement, repetition, speed) into results/zoo.json.

    Example: pertoken zoo measure
    """
    from pertoken.bench import results as kept
    from pertoken.zoo.evaluate import evaluate

    with progress() as status:
        found = evaluate("code-target", "code-draft", status)
    document = {"date": kept.now(), "versions": kept.versions(), "machine": kept.machine(), **found}
    path = kept.write("zoo", document, kept.results_dir(results))
    print(f"kept in {path}", file=sys.stderr)
    if as_json:
        print_json(document)
        return
    rows = table("what", "value")
    for name, value in found.items():
        for part, figure in value.items() if isinstance(value, dict) else [("", value)]:
            rows.add_row(
                f"{name} {part}".strip(), f"{figure:.4g}" if isinstance(figure, float) else escaped(str(figure))
            )
    console().print(rows)


def main() -> None:
    """The `pertoken` command."""
    app()


if __name__ == "__main__":
    main()
