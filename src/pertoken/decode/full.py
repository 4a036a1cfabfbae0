"""Plain decoding in the shared loop: one token per target step. The baseline that every decoder is measured against."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

from torch import Tensor

from pertoken.core.card import Paper, method
from pertoken.decode.request import Request
from pertoken.decode.speculation import Proposal, Session, Speculation
from pertoken.decode.tree import Tree
from pertoken.decode.verify import Walk
from pertoken.models.context import Context


class NoGuess(Session):
    """Empty trees."""

    def __init__(self, request: Request):
        self.request = request

    def propose(self) -> Proposal:
        return Proposal([Tree() for _ in self.request.active], [{} for _ in self.request.active])

    def observe(self, proposal: Proposal, walks: list[Walk], logits: Tensor, states: list[Tensor]) -> None:
        """Nothing to learn."""

    def select(self, rows: list[int]) -> None:
        """Nothing is kept per row."""


@method(
    question="decode",
    shape="decoder",
    exactness="lossless",
    paper=Paper("Plain autoregressive decoding"),
    reads={"logits"},
    writes={"guesses"},
    baseline=True,
)
@dataclass(frozen=True)
class Full(Speculation):
    """Plain decoding: no guesses, one token per step."""

    def session(self, request: Request, target: Context, scope: ExitStack) -> Session:
        return NoGuess(request)
