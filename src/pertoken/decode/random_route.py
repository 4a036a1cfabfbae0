"""Random routing: the large model is asked at random places. The control of every router."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pertoken.core.card import Dial, Paper, method
from pertoken.core.errors import BadRequest
from pertoken.decode.r2r import Route, Routing
from pertoken.decode.request import Row
from pertoken.decode.router import Seen


@dataclass(frozen=True)
class Chance(Route):
    """Drawn from the row's own tokens, so that a row is in a batch what it is alone."""

    rate: float
    seed: int

    def questions(self, rows: Sequence[Row], seen: Seen) -> Tensor:
        drawn = [zlib.crc32(np.array(row.tokens, dtype=np.int64).tobytes(), self.seed) for row in rows]
        return torch.tensor([number < self.rate * 2**32 for number in drawn])


@method(
    question="decode",
    shape="decoder",
    exactness="approximate",
    paper=Paper("Random routing (control)"),
    reads={"tokens"},
    writes={"tokens"},
    needs={"draft"},
    baseline=True,
    dial=Dial("rate", (0.05, 0.1, 0.2, 0.4, 0.6, 0.8)),
)
@dataclass(frozen=True)
class RandomRoute(Routing):
    """A small model writes; a share `rate` of the tokens, at random places, are the large model's."""

    rate: float = 0.15
    seed: int = 0

    def route(self, small: Any) -> Route:
        if not 0 <= self.rate <= 1:
            raise BadRequest(f"rate={self.rate} is no share of the tokens; give 0 to 1")
        return Chance(self.rate, self.seed)
