"""Claims: one plain sentence about a method, the number that would show it, and the function that measures it.

    @claim("dyspec", claim="a DySpec tree commits more tokens per target step than a chain of its size",
           metric="tokens per target step", expected="> 1")
    def beats_chain(bench: Bench) -> Measurement: ...

With `compare="ratio"` (the default) `expected` speaks of value / baseline_value, with `compare="value"` of the value.
"""

from __future__ import annotations

import importlib
import keyword
import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any, TypeVar

from pertoken.core.card import card

FRAMEWORK = (
    "answers",
    "canvas_probes",
    "catalogue",
    "claims",
    "code_tasks",
    "compare",
    "completion",
    "curve",
    "demo",
    "diffusion",
    "docs",
    "execute",
    "key_exactness",
    "key_tasks",
    "kvpress_run",
    "picture_run",
    "pictures",
    "results",
    "runner",
    "settings",
    "sides",
    "spending",
    "study_images",
    "study_runs",
    "suite",
    "texts",
    "tune",
)
BENCHES = {"code": "completion"}
"""Modules of what is measured over many methods and is none itself, by name."""
COMPARISONS = ("ratio", "value")
OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
    "==": lambda value, bound: math.isclose(value, bound, rel_tol=1e-9, abs_tol=1e-12),
}
_EXPECTED = re.compile(r"\s*(>=|<=|==|>|<)\s*([-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?)\s*")

T = TypeVar("T")


@dataclass(frozen=True)
class Measurement:
    """What a claim's function found: the method's value, the baseline's by name, and from how many samples (`n`).

    Values are in the unit of the claim's metric; detail is whatever JSON a reader needs to judge them.
    """

    value: float
    baseline: str
    baseline_value: float
    n: int
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """value / baseline_value; not a number where the baseline is 0."""
        return self.value / self.baseline_value if self.baseline_value else math.nan


@dataclass(frozen=True)
class Expected:
    """A bound such as ">= 1.5"."""

    relation: str
    bound: float

    @classmethod
    def parse(cls, text: str) -> Expected:
        """Read "> 1", ">= 0.95", "== 1", "<= 1.02"; raises `ValueError` for anything else."""
        match = _EXPECTED.fullmatch(text)
        if match is None:
            raise ValueError(f"expected={text!r} is not a bound; write a relation and a number such as '>= 1.5'")
        return cls(match[1], float(match[2]))

    def holds(self, value: float) -> bool:
        """Whether the value is within the bound; not a number never is."""
        return not math.isnan(value) and OPERATORS[self.relation](value, self.bound)


@dataclass
class Bench:
    """What a claim's function is given.

    quick: take fewer samples, so that all claims of a method end within two minutes on two cores; seed: for everything
    random; status: tells whoever waits what is being done. Claims of one run share what is dear through `shared`.
    """

    quick: bool = False
    seed: int = 0
    status: Callable[[str], None] = lambda text: None
    cache: dict[Any, Any] = field(default_factory=dict)

    def shared(self, key: Any, factory: Callable[[], T]) -> T:
        """The value made by `factory` when `key` was first asked for in this run."""
        if key not in self.cache:
            self.cache[key] = factory()
        return self.cache[key]


@dataclass(frozen=True)
class Claim:
    """A registered claim; `measure` is the decorated function."""

    method: str
    claim: str
    metric: str
    expected: str
    compare: str
    measure: Callable[[Bench], Measurement]
    shown: bool = False

    def record(self, found: Measurement, seed: int) -> dict[str, Any]:
        """The record that is printed and kept; numbers that are not finite become null."""
        compared = found.ratio if self.compare == "ratio" else found.value
        record = {
            "method": self.method,
            "claim": self.claim,
            "metric": self.metric,
            "value": _finite(found.value),
            "baseline": found.baseline,
            "baseline_value": _finite(found.baseline_value),
            "ratio": _finite(found.ratio),
            "expected": self.expected,
            "holds": bool(Expected.parse(self.expected).holds(compared)),
            "seed": seed,
            "n": int(found.n),
        }
        return record | ({"detail": jsonable(found.detail)} if found.detail else {})

    def failed(self, error: BaseException, seed: int) -> dict[str, Any]:
        """The record of a claim whose function raised."""
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        where = f"{trace.tb_frame.f_code.co_name}, line {trace.tb_lineno}" if trace else "unknown"
        detail = {"error": f"{type(error).__name__}: {error}", "where": where}
        return self.record(Measurement(math.nan, "", math.nan, 0, detail), seed)


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def jsonable(value: Any) -> Any:
    """The value in types that JSON has: arrays become lists, numbers that are not finite null, the rest text."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return _finite(value)
    if isinstance(value, dict):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [jsonable(v) for v in value]
    return jsonable(value.tolist()) if callable(getattr(value, "tolist", None)) else str(value)


_CLAIMS: dict[tuple[str, str], Claim] = {}


def claim(
    method: str, *, claim: str, metric: str, expected: str, compare: str = "ratio", shown: bool = False
) -> Callable[[Callable[[Bench], Measurement]], Callable[[Bench], Measurement]]:
    """Register a function that measures a claim of `method`; those `shown` stand in the README's table. Raises
    `ValueError` for a malformed or repeated claim."""
    Expected.parse(expected)
    if compare not in COMPARISONS:
        raise ValueError(f"compare={compare!r} is unknown; choose one of {', '.join(COMPARISONS)}")

    def register(measure: Callable[[Bench], Measurement]) -> Callable[[Bench], Measurement]:
        known = _CLAIMS.get((method, claim))
        if known is not None and _origin(known.measure) != _origin(measure):
            raise ValueError(f"{method} already claims {claim!r} in {_origin(known.measure)}; say it in other words")
        _CLAIMS[method, claim] = Claim(method, claim, metric, expected, compare, measure, shown)
        return measure

    return register


def _origin(measure: Callable[..., Any]) -> str:
    """Where a claim's function was written, the same when its module is loaded again; of a partial one with the values
    that were filled in."""
    if isinstance(measure, partial):
        given = [getattr(value, "__qualname__", value) for value in (*measure.args, *measure.keywords.values())]
        return f"{_origin(measure.func)} of {given}"
    return measure.__qualname__


def stem(name: str) -> str:
    """The module name of a method's claims, as its file's: an underscore follows a word that Python reserves."""
    return f"{name}_" if keyword.iskeyword(name) else name


def claims_of(name: str) -> list[Claim]:
    """The claims of one method, or of one of `BENCHES`, in the order they were written, importing their module when
    first asked.

    Raises `ValueError` for an unknown name. A method without a module of claims has none.
    """
    if name in BENCHES:
        importlib.import_module(f"{__package__}.{BENCHES[name]}")
    else:
        card(name)
        module = f"{__package__}.{stem(name)}"
        if stem(name) not in FRAMEWORK and find_spec(module) is not None:
            importlib.import_module(module)
    return [c for c in _CLAIMS.values() if c.method == name]
