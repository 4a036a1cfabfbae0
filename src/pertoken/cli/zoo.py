"""`zoo`: the small trained models that ship with the package."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from pertoken.cli.output import AsJson, Results, console, escaped, print_json, progress, table

zoo_app = typer.Typer(no_args_is_help=True, help="The small trained models that ship with the package.")


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
