"""Command line: methods, bench, tune, run, demo, trace, zoo.

Exit codes: 0 fine, 1 a claim or run failed, 2 bad arguments.

The commands are functions of the modules beside this one. Everything heavy is imported inside them, so that help is
instant.
"""

from __future__ import annotations

from typing import Annotated

import typer

from pertoken.cli.errors import Commands
from pertoken.cli.measuring import bench, methods
from pertoken.cli.running import demo, run
from pertoken.cli.showing import trace
from pertoken.cli.tuning import tune
from pertoken.cli.zoo import zoo_app

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Every token gets just what it needs: run, measure, record and draw dynamic-token methods.",
)
for _command in (methods, bench, run, tune, demo, trace):
    app.command()(_command)
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


def main() -> None:
    """The `pertoken` command."""
    app()
