"""Trace: what every token got, recorded step by step; saved as safetensors with a JSON header, replayed exactly.

A trace is a list of steps; a step is one decision made at one site. Nothing in a trace file is executed on load.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pertoken.core.decision import KINDS, Decision

FORMAT = "pertoken-trace-1"


@dataclass(frozen=True)
class Step:
    """One decision: where it was made, for which batch rows, and what it was."""

    site: str
    decision: Decision
    rows: tuple[int, ...] = ()
    note: dict[str, Any] = field(default_factory=dict)


class TraceMismatch(ValueError):
    """A replay asked for a decision that the trace does not hold at this point."""


@dataclass
class Trace:
    """A recording. `about` holds what a reader needs to draw it: method, tokens, texts, costs."""

    about: dict[str, Any] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)

    def record(self, site: str, decision: Decision, rows: tuple[int, ...] = (), **note: Any) -> None:
        """Append a detached CPU copy of the decision."""
        kept = type(decision)(**{k: v.detach().to("cpu", copy=True) for k, v in decision.tensors().items()})
        self.steps.append(Step(site, kept, tuple(rows), note))

    def at(self, site: str) -> Iterator[Step]:
        """The steps of one site in order."""
        return (step for step in self.steps if step.site == site)

    def player(self) -> Player:
        """A cursor that serves the recorded decisions in order."""
        return Player(self)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; tensors by step, everything else as JSON in its header."""
        tensors, index = {}, []
        for number, step in enumerate(self.steps):
            names = step.decision.tensors()
            tensors |= {f"{number}/{name}": tensor.contiguous() for name, tensor in names.items()}
            index.append({"site": step.site, "kind": step.decision.kind, "rows": list(step.rows), "note": step.note})
        header = {"format": FORMAT, "about": json.dumps(self.about), "steps": json.dumps(index)}
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, str(path), header)

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Read what `save` wrote; raises `ValueError` if the file is something else."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"no trace at {path}; record one with `pertoken run ... --trace FILE`")
        try:
            with safe_open(str(path), "pt") as file:
                header = file.metadata() or {}
                if header.get("format") != FORMAT:
                    raise ValueError(
                        f"{path} is not a trace of this library (format {header.get('format')!r}, wanted {FORMAT!r})"
                    )
                trace = cls(json.loads(header["about"]))
                for number, entry in enumerate(json.loads(header["steps"])):
                    if entry["kind"] not in KINDS:
                        raise ValueError(
                            f"{path} holds a decision of kind {entry['kind']!r}; this version knows {', '.join(KINDS)}"
                        )
                    kind = KINDS[entry["kind"]]
                    names = [k for k in file.keys() if k.startswith(f"{number}/")]  # noqa: SIM118
                    decision = kind(**{k.split("/", 1)[1]: file.get_tensor(k) for k in names})
                    trace.steps.append(Step(entry["site"], decision, tuple(entry["rows"]), entry["note"]))
                return trace
        except (SafetensorError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} cannot be read as a trace: {error}") from error

    def same_as(self, other: Trace) -> bool:
        """Whether both hold the same decisions at the same sites."""
        if len(self.steps) != len(other.steps):
            return False
        for mine, theirs in zip(self.steps, other.steps, strict=True):
            if (mine.site, mine.rows, mine.decision.kind) != (theirs.site, theirs.rows, theirs.decision.kind):
                return False
            ours, yours = mine.decision.tensors(), theirs.decision.tensors()
            if ours.keys() != yours.keys() or any(not torch.equal(ours[k], yours[k]) for k in ours):
                return False
        return True


class Player:
    """Serves a trace's decisions in the order they were made and refuses to serve another."""

    def __init__(self, trace: Trace):
        self.trace, self.next_step = trace, 0

    def take(self, site: str, kind: type[Decision]) -> Step:
        """The next step, which must have been made at `site` and be of `kind`."""
        if self.next_step >= len(self.trace.steps):
            raise TraceMismatch(
                f"replay asks for decision {self.next_step + 1} at {site!r}; the trace holds {len(self.trace.steps)}. "
                "Replay with the model, inputs and settings that were recorded"
            )
        step = self.trace.steps[self.next_step]
        if step.site != site or not isinstance(step.decision, kind):
            raise TraceMismatch(
                f"replay asks for {kind.kind!r} at {site!r}, but decision {self.next_step + 1} of the trace is "
                f"{step.decision.kind!r} at {step.site!r}. Replay with the method that was recorded"
            )
        self.next_step += 1
        return step

    @property
    def coming(self) -> str | None:
        """The site of the next step, None after the last one."""
        return None if self.finished else self.trace.steps[self.next_step].site

    @property
    def finished(self) -> bool:
        return self.next_step == len(self.trace.steps)


@dataclass
class Tape:
    """What the next call of a decoder records into and plays from."""

    trace: Trace | None = None
    player: Player | None = None

    def taken(self) -> tuple[Trace | None, Player | None]:
        """Both, for the call that begins now; the one after it gets none."""
        taken = self.trace, self.player
        self.trace = self.player = None
        return taken


@dataclass(frozen=True)
class Recorded:
    """Base of every decoder whose calls can be recorded and replayed; its class says what a recording holds."""

    _tape: Tape = field(default_factory=Tape, init=False, repr=False, compare=False)

    @contextmanager
    def record(self) -> Iterator[Trace]:
        """Record the decisions of the next call made inside the block."""
        self._tape.trace = trace = Trace({"method": type(self).__name__})
        try:
            yield trace
        finally:
            self._tape.trace = None

    @contextmanager
    def replay(self, trace: Trace) -> Iterator[None]:
        """Serve the next call inside the block from a recording: the same decisions, without sampling."""
        self._tape.player = trace.player()
        try:
            yield
        finally:
            self._tape.player = None
