"""Kernels are compiled by numba and kept on disk; without numba, calling one says what to install.

The first grammar on a machine waits for that, and is told so: `Compiling` shows it while it lasts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pertoken.core.errors import BadRequest

try:
    from numba import carray, types
    from numba import njit as _njit
    from numba.core import event
    from numba.extending import intrinsic
except ImportError:
    _njit = None

_kernels: set[Any] = set()  # the functions


def kernel(function: Callable[..., Any]) -> Any:
    """Compile a function when it is first called."""
    if _njit is not None:
        _kernels.add(function)
        return _njit(cache=True)(function)

    def missing(*_: Any) -> Any:
        raise BadRequest(
            "the grammar engine is compiled by numba, which is not installed; "
            "install it with pip install 'pertoken[grammar]'"
        )

    return missing


def _reader() -> Any:
    """What gives a kernel the int32 array at an address. It gets a number sooner than an array."""
    if _njit is None:
        return None

    @intrinsic
    def pointer(context: Any, address: Any) -> Any:
        kind = types.CPointer(types.int32)

        def cast(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(kind))

        return kind(address), cast

    read: Any = pointer

    @_njit
    def numbers_at(address: int) -> Any:
        return carray(read(address), 1 << 40)

    return numbers_at


numbers_at: Any = _reader()


class Compiling:
    """A progress line on the terminal from the first kernel that is not on disk to the last one of the same call; those
    of a later call go on with it. Where there is no terminal, nothing is written."""

    def __init__(self, console: Console | None = None):
        self.console = console
        self.done: set[Any] = set()
        self.depth = 0
        self.shown: Progress | None = None

    def started(self) -> None:
        self.depth += 1
        if self.shown is None:
            words = TextColumn("compiling the grammar engine, once on this machine")
            columns = words, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
            self.shown = Progress(*columns, console=self.console or Console(stderr=True), transient=True)
            self.task = self.shown.add_task("", total=len(_kernels), completed=len(self.done))
            self.shown.start()

    def ended(self, function: Any) -> None:
        self.depth -= 1
        self.done.add(function)
        if self.shown is not None:
            self.shown.update(self.task, completed=len(self.done))
            if not self.depth:
                self.shown.stop()
                self.shown = None


def watched(line: Compiling) -> Any:
    """Tell `line` of every kernel that numba compiles; returns what to unregister."""

    class Listener(event.Listener):
        def on_start(self, event: Any) -> None:
            if event.data["dispatcher"].py_func in _kernels:
                line.started()

        def on_end(self, event: Any) -> None:
            if event.data["dispatcher"].py_func in _kernels:
                line.ended(event.data["dispatcher"].py_func)

    listener = Listener()
    event.register("numba:compile", listener)
    return listener


if _njit is not None:
    watched(Compiling())
