"""`run` and `demo`: methods beside the dense model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pertoken.cli.output import AsJson, Batch, Device, Draft, Dtype, Html, progress
from pertoken.cli.showing import save_traces, show, show_clip, show_pictures

BASELINE = "full; for a diffusion model dense: one per step, no cache"
CANVAS = "For diffusion models, whose canvas is --max-new-tokens long"


def run(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME[+NAME...]", help="Methods, beside the dense model.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Directory, hub id, or zoo:NAME.", show_default="--config's")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A method with settings, as `tune` chose them.")] = None,
    draft: Draft = None,
    prompt: Annotated[str | None, typer.Option(help="Text to go on from.")] = None,
    input_file: Annotated[
        Path | None,
        typer.Option("--input", help='A prompt per line, .jsonl with "prompt" in each, or a picture, or a folder.'),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate per prompt.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float | None, typer.Option(help="Sample from this share of the probability.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample from this many tokens.")] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    baseline: Annotated[
        str | None,
        typer.Option(
            help="What speed is relative to: a method, or generate (transformers' own).", show_default=BASELINE
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="For sampling.")] = 0,
    batch: Batch = 8,
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

    Example: pertoken run think_at_hard --model zoo:reasoning-think --prompt "sort 5 31 9=" --max-new-tokens 7

    Example: pertoken run --config tuned.json --prompt "def parse(text):"

    Example: pertoken run dymu --model zoo:scenes-segmenter --input photo.png --html regions.html

    Example: pertoken run dit_routing --model zoo:scenes-grid-routed --input photo.png --html ways.html

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


def is_picture(path: Path) -> bool:
    """Whether an input is a picture or a folder of them."""
    return path.is_dir() or path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


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
