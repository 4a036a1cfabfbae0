"""Programs that a model wrote: each ends as it should, and none reaches anything outside."""

from __future__ import annotations

import os
import socket

import pytest

from pertoken.bench.execute import Limits, execute

SHORT = Limits(seconds=1.0, memory=64 * 2**20)


@pytest.mark.parametrize(
    ("program", "how"),
    [
        ("def f(a):\n    return a + 1\nassert f(1) == 2", "passed"),
        ("", "passed"),
        ("import math, json, collections, dataclasses, re, typing\nassert math.isqrt(9) == 3", "passed"),
        ("assert 1 == 2, 'no'", "failed"),
        ("1 / 0", "error"),
        ("def f(:\n", "syntax"),
        ("x = '\0'", "syntax"),
        ("while True: pass", "timeout"),
        ("import time\ntime.sleep(60)", "timeout"),
        ("x = [0] * 10**9", "memory"),
        ("import sys\nsys.exit(0)", "died"),
        ("import os\nos._exit(0)", "died"),
        ("raise SystemExit", "died"),
        ("def f():\n    return f()\nf()", "error"),
        ("import socket\nsocket.socket()", "refused"),
        ("import subprocess\nsubprocess.run(['true'])", "refused"),
        ("import os\nos.system('true')", "refused"),
        ("import os\nos.fork()", "refused"),
        ("import os\nos.kill(os.getppid(), 9)", "refused"),
        ("open('made', 'w')", "refused"),
        ("open('/etc/passwd')", "refused"),
        ("import os\nos.open('made', os.O_CREAT | os.O_WRONLY)", "refused"),
        ("import os\nos.listdir('/')", "refused"),
        ("import shutil\nshutil.rmtree('/nowhere')", "refused"),
        ("import ctypes\nctypes.CDLL(None)", "refused"),
        ("print('x' * 10**6)\ninput_closed = True", "passed"),
        ("import torch", "error"),
    ],
)
def test_a_program_ends_as_it_should(program, how):
    assert execute([program], SHORT)[0].how == how


def test_programs_run_in_order_apart_and_together():
    programs = [
        "x = 1",
        "assert 'x' not in globals()",
        "1/0",
        "import builtins\nbuiltins.len = None",
        "assert len([]) == 0",
    ]
    ended = execute(programs * 20, SHORT)
    assert [e.how for e in ended] == ["passed", "passed", "error", "passed", "passed"] * 20
    assert ended[2].detail == "ZeroDivisionError: division by zero"
    assert ended[0].passed and not ended[2].passed


def test_a_slow_program_holds_up_none_of_the_others():
    programs = ["while True: pass", "x = 1", "while True: pass", "x = 2"]
    ended = execute(programs, Limits(seconds=0.5, children=3))
    assert [e.how for e in ended] == ["timeout", "passed", "timeout", "passed"]


def test_a_program_sees_nothing_of_this_process(tmp_path, monkeypatch):
    monkeypatch.setenv("PERTOKEN_SECRET", "s")
    monkeypatch.chdir(tmp_path)
    program = "import os\nassert 'PERTOKEN_SECRET' not in os.environ\nassert 'pertoken' not in os.sys.modules"
    assert execute([program])[0].passed
    assert os.listdir(tmp_path) == []


def test_no_programs_is_no_server():
    assert execute([]) == []


def test_the_network_is_out_of_reach_even_of_a_program_that_meets_no_hook():
    """The connection itself fails or is refused: a listener on this machine hears nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.3)
        port = listener.getsockname()[1]
        ended = execute([f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)"])[0]
        assert not ended.passed
        with pytest.raises(TimeoutError):
            listener.accept()
