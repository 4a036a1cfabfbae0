"""Cards: a method's metadata, and the registry that the CLI, the docs and the contract tests are generated from."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

QUESTIONS = ("chunk", "prompt", "attend", "reduce", "depth", "decode", "denoise", "credit", "inspect")
SHAPES = ("policy", "decoder", "objective", "tool")
EXACTNESS = ("lossless", "approximate")

T = TypeVar("T")


@dataclass(frozen=True)
class Paper:
    """Where a method comes from. A method without a paper (a baseline) has an empty arXiv id."""

    title: str
    arxiv: str = ""


@dataclass(frozen=True)
class Dial:
    """What of a method trades quality for computation.

    name: one of its settings; values: to try, from the least computation to the most (for `steps` of a canvas: as
    shares of its positions); beside: other settings while the dial is turned.
    """

    name: str
    values: tuple[Any, ...]
    beside: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Card:
    """Everything that is generated about a method.

    question: its folder; shape: how a user calls it; reads/writes: what it looks at and changes, from which pairs are
    allowed or refused; needs: what its constructor must be given ("draft": a smaller model with the same tokenizer,
    "diffusion_draft": a masked-diffusion one, "policy": a policy); baselines: names that its claims are measured
    against; dial: what is swept to tune it, where that is not a policy's budget.
    """

    name: str
    build: Callable[..., Any]
    question: str
    shape: str
    paper: Paper
    exactness: str
    reads: frozenset[str]
    writes: frozenset[str]
    needs: frozenset[str]
    baselines: tuple[str, ...]
    baseline: bool
    dial: Dial | None = None

    @property
    def summary(self) -> str:
        """The first line of the method's docstring."""
        return (self.build.__doc__ or "").strip().splitlines()[0] if self.build.__doc__ else ""


_REGISTRY: dict[str, Card] = {}


def _place(build: Any) -> tuple[str, str]:
    return build.__module__, build.__qualname__


def method(
    *,
    question: str,
    shape: str,
    exactness: str,
    paper: Paper,
    name: str | None = None,
    reads: set[str] = frozenset(),  # type: ignore[assignment]
    writes: set[str] = frozenset(),  # type: ignore[assignment]
    needs: set[str] = frozenset(),  # type: ignore[assignment]
    baselines: tuple[str, ...] = (),
    baseline: bool = False,
    dial: Dial | None = None,
) -> Callable[[T], T]:
    """Register a method under its card; the name is that of its file unless given."""
    for label, value, allowed in (
        ("question", question, QUESTIONS),
        ("shape", shape, SHAPES),
        ("exactness", exactness, EXACTNESS),
    ):
        if value not in allowed:
            raise ValueError(f"card {label}={value!r} is unknown; choose one of {', '.join(allowed)}")

    def register(build: T) -> T:
        own = name or build.__module__.rsplit(".", 1)[-1].rstrip("_")  # type: ignore[attr-defined]
        known = _REGISTRY.get(own)
        if known is not None and _place(known.build) != _place(build):
            raise ValueError(f"method name {own!r} is taken by {known.build.__module__}; give another with name=")
        _REGISTRY[own] = Card(
            own,
            build,  # type: ignore[arg-type]
            question,
            shape,
            paper,
            exactness,
            frozenset(reads),
            frozenset(writes),
            frozenset(needs),
            baselines,
            baseline,
            dial,
        )
        return build

    return register


def cards() -> dict[str, Card]:
    """Every registered card by name, sorted by folder and name."""
    ordered = sorted(_REGISTRY.values(), key=lambda c: (QUESTIONS.index(c.question), c.baseline, c.name))
    return {card.name: card for card in ordered}


def card(name: str) -> Card:
    """The card of a method; an unknown name raises `ValueError` naming the nearest ones."""
    if name in _REGISTRY:
        return _REGISTRY[name]
    near = difflib.get_close_matches(name, _REGISTRY, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known methods: {', '.join(cards())}"
    raise ValueError(f"method {name!r} is unknown; {hint}")
