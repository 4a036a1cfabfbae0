"""What commands share: options with one meaning, and how they print."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON alone on stdout.")]
Html = Annotated[Path | None, typer.Option(help="Write a self-contained HTML report.")]
Results = Annotated[Path | None, typer.Option(help="Directory of results; default: ./results, or the checkout's.")]
Draft = Annotated[str | None, typer.Option(help="Draft model, for methods that need one.")]
Dtype = Annotated[str, typer.Option(help="fp32, bf16, or auto (as stored).")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto (the GPU where there is one).")]
Batch = Annotated[int, typer.Option(help="Prompts generated together.")]


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
