"""Random pauses: as many lookaheads at places that nothing chose, the control that every rule of pausing must beat."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from pertoken.core.card import Dial, Paper, method
from pertoken.core.errors import BadRequest
from pertoken.decode.lookahead import Lookahead, Rule
from pertoken.decode.request import Row
from pertoken.models.context import Context


@dataclass(frozen=True)
class Chance(Rule):
    """Pause with this probability, drawn from the seed and the text, so that it does not depend on the batch."""

    rate: float
    seed: int

    def pauses(self, rows: Sequence[Row], logits: Tensor) -> list[bool]:
        drawn = (zlib.crc32(np.array(row.tokens, dtype=np.int64).tobytes(), self.seed) for row in rows)
        return [number < self.rate * 2**32 for number in drawn]


@method(
    question="decode",
    shape="decoder",
    exactness="approximate",
    paper=Paper("Random pauses (control)"),
    reads={"tokens"},
    writes={"tokens"},
    baseline=True,
    dial=Dial("rate", (0.01, 0.02, 0.05, 0.1, 0.2, 0.4)),
)
@dataclass(frozen=True)
class RandomPause(Lookahead):
    """Greedy decoding that pauses at random places, a share `rate` of all."""

    rate: float = 0.07
    seed: int = 0

    def rule(self, target: Context) -> Rule:
        if not 0 <= self.rate <= 1:
            raise BadRequest(f"rate={self.rate} is no share of the places; give 0 to 1")
        return Chance(self.rate, self.seed)
