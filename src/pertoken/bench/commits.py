"""Commit rules at all of their settings: what the claims of each of them are measured on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pertoken.bench import diffusion
from pertoken.bench.claims import Bench
from pertoken.bench.diffusion import BLOCK, Point, Task
from pertoken.denoise.entropy import Entropy
from pertoken.denoise.entropy_bound import EntropyBound
from pertoken.denoise.factor import Factor
from pertoken.denoise.learn2pd import Filter, Learn2PD
from pertoken.denoise.loop import Denoise
from pertoken.denoise.margin import Margin
from pertoken.denoise.random_commit import RandomCommit
from pertoken.denoise.rules import CommitRule
from pertoken.denoise.schedule import Schedule
from pertoken.denoise.threshold import Threshold
from pertoken.models.load import resolve
from pertoken.zoo.filters import filter_name

DIALS: dict[str, tuple[float, ...]] = {
    "learn2pd": (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.96, 0.99),
    "threshold": (0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95),
    "factor": (0.1, 0.25, 0.5, 0.75, 1.0, 1.5),
    "entropy_bound": (0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
    "schedule": (4, 2),
    "margin": (4, 2),
    "entropy": (4, 2),
    "random_commit": (4, 2),
}
ADAPTIVE = ("learn2pd", "threshold", "factor", "entropy_bound")


def trained(bench: Bench, layers: int = 2) -> Filter:
    """The packaged filter with so many layers; the paper's has two."""

    def make() -> Filter:
        return Filter.load(f"{resolve('zoo:code-filter')}/{filter_name(BLOCK, layers)}")

    return bench.shared(("filter", layers), make)


def ruled(bench: Bench, name: str, dial: float, length: int, **more: Any) -> Denoise:
    """A commit rule at a setting; the dial of rules with an even pace is how many positions they commit per step."""
    made: dict[str, Callable[[], CommitRule]] = {
        "learn2pd": lambda: Learn2PD(trained(bench), dial),
        "threshold": lambda: Threshold(dial),
        "factor": lambda: Factor(dial),
        "entropy_bound": lambda: EntropyBound(dial),
        "schedule": Schedule,
        "margin": Margin,
        "entropy": Entropy,
        "random_commit": lambda: RandomCommit(bench.seed),
    }
    steps = None if name in ADAPTIVE else length // int(dial)
    return Denoise(made[name](), steps=steps, block=BLOCK, **more)


def tasks(bench: Bench) -> list[Task]:
    """Code to be gone on with, and unit tests."""
    length = 64 if bench.quick else 128
    return [diffusion.excerpts(bench, length, 32, 3), diffusion.unit_tests(bench, 32, 3, length)]


def sweep(bench: Bench, task: Task, name: str) -> list[Point]:
    """A commit rule at all of its settings; for adaptive rules, at one commit per step as well."""
    dials = DIALS[name][1::2] if bench.quick else DIALS[name]
    decoders = {f"{name} {dial:g}": ruled(bench, name, dial, task.length) for dial in dials}
    found = diffusion.points(bench, task, decoders)
    return found + ([diffusion.exact(bench, task)] if name in ADAPTIVE else [])
