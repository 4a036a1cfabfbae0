"""What is shown while kernels are compiled."""

from __future__ import annotations

from io import StringIO

import numpy as np
import pytest
from rich.console import Console

numba = pytest.importorskip("numba")

from numba.core import event  # noqa: E402

from pertoken.decode.grammar import compiled  # noqa: E402


@pytest.fixture
def line(monkeypatch):
    monkeypatch.setattr(compiled, "_kernels", set())
    made = compiled.Compiling(Console(file=StringIO(), force_terminal=True, width=100))
    listener = compiled.watched(made)
    yield made
    event.unregister("numba:compile", listener)


def shown(line) -> str:
    return line.console.file.getvalue()


def uncached(function):
    compiled._kernels.add(function)
    return numba.njit(function)


def test_a_line_while_kernels_are_compiled(line):
    inner = uncached(lambda x: x + 1)
    outer = uncached(lambda x: inner(x) + inner(x + 1))
    assert outer(3) == 9
    assert "compiling the grammar engine, once on this machine" in shown(line)
    assert "0/2" in shown(line) and line.shown is None and not line.depth
    assert line.done == {inner.py_func, outer.py_func}


def test_nothing_where_all_is_compiled_or_is_not_ours(line):
    ours, other = uncached(lambda x: x + 1), numba.njit(lambda x: x + 2)
    assert other(1) == 3 and not shown(line)
    ours(1)
    told = shown(line)
    assert ours(2) == 3 and shown(line) == told
    ours(np.float64(0.5))  # another signature of the same kernel
    assert shown(line) != told and len(line.done) == 1


def test_a_kernel_that_does_not_compile_ends_the_line(line):
    broken = uncached(lambda x: x.nothing)
    with pytest.raises(numba.TypingError):
        broken(1)
    assert line.shown is None and not line.depth


def test_silent_without_a_terminal(line):
    line.console = Console(file=StringIO(), force_terminal=False)
    uncached(lambda x: x * 2)(1)
    assert not shown(line).strip()
