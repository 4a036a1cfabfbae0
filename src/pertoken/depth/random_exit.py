"""Random exit: each generated token leaves after a random number of layers. The control of exits that look.

With shares s[l], the chance that a token leaves after l layers, the token at place p draws one number u(p) from the
seed and leaves after the first l with s[1] + .. + s[l] > u(p); what is left over runs all layers. u depends on the
place alone, so that a row is in a batch what it is alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pertoken.core.card import Paper, method
from pertoken.core.errors import BadRequest
from pertoken.depth.exits import ExitPolicy, ExitView


@method(
    question="depth",
    shape="policy",
    exactness="approximate",
    paper=Paper("Early exit at a random layer (control)"),
    reads={"states"},
    writes={"layers"},
    baselines=("full",),
    baseline=True,
)
@dataclass(frozen=True)
class RandomExit(ExitPolicy):
    """Tokens leave after l layers at a rate of `shares[l]`, and at the latest after `budget` layers."""

    shares: tuple[tuple[int, float], ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if any(ran < 1 or share < 0 for ran, share in self.shares) or sum(share for _, share in self.shares) > 1 + 1e-9:
            raise BadRequest(
                f"shares={self.shares} must be (layers >= 1, share >= 0) with shares that add to at most 1"
            )

    def asks(self, ran: int, layers: int) -> bool:
        return any(at == ran for at, _ in self.shares)

    def after(self, view: ExitView) -> Tensor:
        assert view.positions is not None
        level = sum(share for at, share in self.shares if at <= view.ran)
        return (uniform(view.positions, self.seed) < level).long()


def uniform(places: Tensor, seed: int) -> Tensor:
    """A number in [0, 1) for each place, the same whatever stands beside it."""
    mixed = (places.long() + 1) * 0x9E3779B1 + (seed + 1) * 0x85EBCA77
    for _ in range(2):
        mixed = ((mixed & 0xFFFFFFFF) ^ ((mixed & 0xFFFFFFFF) >> 15)) * 0x2C1B3C6D
    return ((mixed & 0xFFFFFF).double() / 2**24).to(torch.float32)
