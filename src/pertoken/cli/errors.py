"""What goes wrong, said in one sentence on stderr, and its exit code."""

from __future__ import annotations

import os
import sys
from typing import Any

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


def complain(text: str) -> None:
    """One red sentence on stderr."""
    typer.secho(f"pertoken: {text}", fg="red", err=True)
