"""Run programs that a model wrote, each in a process of its own, with limits, and say how each ended.

    execute(["assert 1 + 1 == 2", "while True: pass"]) -> [Ended("passed"), Ended("timeout")]

A server process, started without this one's environment and site packages, forks a child per program (about 2 ms each).
A child has an empty working directory, a scope of its own, limits on processor time, memory, written bytes and open
files, no standard input or output, and an audit hook that refuses the network, new processes, files opened for writing
or outside the standard library, and foreign code. Where the system allows it, the server also leaves the network and
user namespaces. The hook stops accidents, not an attacker who knows CPython: for code that may be hostile use a
container around the whole. POSIX only. This file is also the server, so it imports nothing but the standard library.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ENDINGS = ("passed", "failed", "error", "syntax", "timeout", "memory", "refused", "died")
REFUSED = (
    *("socket.", "subprocess.", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.system", "os.kill", "pty."),
    *("ctypes.", "shutil.", "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod"),
    *("os.chown", "os.truncate", "os.putenv", "os.unsetenv", "os.chdir", "resource.", "syslog.", "webbrowser."),
)
READS = ("open", "os.listdir", "os.scandir")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


@dataclass(frozen=True)
class Limits:
    """seconds: of processor time, and of the clock (twice as many); memory: bytes beyond what an idle interpreter has;
    children: programs at once."""

    seconds: float = 2.0
    memory: int = 256 * 2**20
    children: int = 2


@dataclass(frozen=True)
class Ended:
    """How a program ended, one of `ENDINGS`, and the last line of its traceback. A program passes if its last line was
    reached: leaving early (`sys.exit`, `os._exit`) is `died`."""

    how: str
    detail: str = ""

    @property
    def passed(self) -> bool:
        return self.how == "passed"


def execute(programs: Iterable[str], limits: Limits | None = None) -> list[Ended]:
    """Run all programs; in order, how each ended. Raises `OSError` where processes cannot be forked."""
    programs = list(programs)
    if not programs:
        return []
    if not hasattr(os, "fork"):
        raise OSError("programs are run in forked processes, which this system has not; use Linux or macOS")
    limits, given = limits or Limits(), Path(__file__).resolve()
    job = {"programs": programs, "seconds": limits.seconds, "memory": limits.memory, "children": limits.children}
    with tempfile.TemporaryDirectory(prefix="pertoken-") as empty:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-B", str(given)],
            input=json.dumps(job),
            capture_output=True,
            text=True,
            cwd=empty,
            env={"PATH": os.defpath, "PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"},
            check=False,
        )
    if done.returncode:
        raise OSError(f"the server of programs ended with code {done.returncode}: {done.stderr.strip()[-400:]}")
    return [Ended(how, detail) for how, detail in json.loads(done.stdout)]


# ---- the server


@dataclass
class _Child:
    number: int
    pid: int
    pipe: int
    deadline: float
    said: bytes = field(default=b"")


def serve() -> None:
    """Read a job from standard input, write how its programs ended to standard output."""
    job = json.load(sys.stdin)
    _leave_network()
    waiting, running, ended = list(enumerate(job["programs"])), {}, [("died", "")] * len(job["programs"])
    while waiting or running:
        while waiting and len(running) < job["children"]:
            number, text = waiting.pop(0)
            child = _fork(number, text, job)
            running[child.pipe] = child
        ready = select.select(list(running), [], [], 0.05)[0]
        for pipe in ready:
            if part := os.read(pipe, 65536):
                running[pipe].said += part
            else:
                child = running.pop(pipe)
                ended[child.number] = _bury(child)
        for child in [c for c in running.values() if time.monotonic() > c.deadline]:
            running.pop(child.pipe)
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGKILL)
            _bury(child)
            ended[child.number] = ("timeout", "")
    json.dump(ended, sys.stdout)


def _bury(child: _Child) -> tuple[str, str]:
    os.close(child.pipe)
    status = os.waitpid(child.pid, 0)[1]
    if os.WIFSIGNALED(status):
        ended_by = os.WTERMSIG(status)
        return ("timeout" if ended_by == signal.SIGXCPU else "died", signal.strsignal(ended_by) or "")
    how, _, detail = child.said.decode(errors="replace").partition("\n")
    return (how, detail) if how in ENDINGS else ("died", "ended before its last line")


def _fork(number: int, text: str, job: dict[str, Any]) -> _Child:
    reads, writes = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writes)
        return _Child(number, pid, reads, time.monotonic() + 2 * job["seconds"] + 0.5)
    try:
        os.close(reads)
        os.setsid()
        sink = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(sink, stream)
        os.write(writes, _run(text, _limited(job)).encode(errors="replace")[:4000])
    finally:
        os._exit(0)


def _limited(job: dict[str, Any]) -> Callable[[], None]:
    """What starts the limits and the hook."""
    import resource

    def start() -> None:
        limits = resource.RLIMIT_CPU, resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE, resource.RLIMIT_CORE
        seconds = max(int(job["seconds"] + 0.999), 1)
        for limit, (soft, hard) in zip(limits, ((seconds, seconds + 1), (0, 0), (32, 32), (0, 0)), strict=True):
            resource.setrlimit(limit, (soft, hard))
        if sys.platform.startswith("linux"):
            used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            resource.setrlimit(resource.RLIMIT_AS, (used + job["memory"],) * 2)
        sys.setrecursionlimit(1000)
        library = os.path.dirname(os.__file__)
        sys.addaudithook(lambda event, given: _refuse(event, given, library))

    return start


def _refuse(event: str, given: tuple[Any, ...], library: str) -> None:
    if event in READS:
        path, writing = given[0], event == "open" and bool(given[2] & WRITING)
        if writing or not (isinstance(path, str) and (os.path.abspath(path) + os.sep).startswith(library + os.sep)):
            raise PermissionError(f"programs may not {event} {path!r}")
    elif event.startswith(REFUSED):
        raise PermissionError(f"programs may not use {event}")


def _run(text: str, start: Callable[[], None]) -> str:
    import warnings

    warnings.simplefilter("ignore")
    start()
    try:
        code = compile(text, "program", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return f"syntax\n{error}"
    scope: dict[str, Any] = {"__name__": "program"}
    try:
        exec(code, scope)
    except AssertionError as error:
        return f"failed\n{error}"
    except PermissionError as error:
        return f"refused\n{error}"
    except MemoryError:
        return "memory\n"
    except SystemExit:
        return "died\nended before its last line"
    except BaseException as error:
        return f"error\n{type(error).__name__}: {error}"
    return "passed\n"


def _leave_network() -> None:
    """Have no network at all, where the system lets a user do that (user and network namespaces)."""
    if sys.platform.startswith("linux"):
        import ctypes

        new_user, new_network = 0x10000000, 0x40000000
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).unshare(new_user | new_network)


if __name__ == "__main__":
    serve()
