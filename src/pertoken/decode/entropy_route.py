"""Entropy routing: the large model is asked where the small one is unsure. The baseline of trained routers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pertoken.core.card import Dial, Paper, method
from pertoken.core.signals import entropy
from pertoken.decode.r2r import Route, Routing
from pertoken.decode.request import Row
from pertoken.decode.router import Seen


@dataclass(frozen=True)
class Unsure(Route):
    """Questions from this entropy on, in nats."""

    nats: float

    def questions(self, rows: Sequence[Row], seen: Seen) -> Tensor:
        return entropy(seen.logits) >= self.nats


@method(
    question="decode",
    shape="decoder",
    exactness="approximate",
    paper=Paper("Routing by the small model's entropy"),
    reads={"logits"},
    writes={"tokens"},
    needs={"draft"},
    baseline=True,
    dial=Dial("threshold", (4.0, 3.0, 2.0, 1.5, 1.0, 0.6, 0.3, 0.1)),
)
@dataclass(frozen=True)
class EntropyRoute(Routing):
    """A small model writes; where its entropy is `threshold` nats or more the token is the large model's."""

    threshold: float = 0.45

    def route(self, small: Any) -> Route:
        return Unsure(self.threshold)
