"""Policies that take a given number of tokens from every image at every layer.

With N patches, L layers and n = budget.count(N) patches to be left, layer l (from 0) takes away so many that
N - round((N - n) sum_{j <= l} w_j / sum_j w_j) are left, w_j = 1 - inflect + 2 inflect j / (L - 1). inflect 0 takes as
many at each layer, -1 most at the first, 1 most at the last.
"""

from __future__ import annotations

from dataclasses import dataclass

from pertoken.core.errors import BadRequest
from pertoken.reduce.reduction import Reduction
from pertoken.reduce.tokens import Tokens


@dataclass(frozen=True)
class Scheduled(Reduction):
    """Base. budget: patches of each image that are left after the last layer; r: tokens taken at each layer instead, as
    the papers count; inflect in [-1, 1]: see the module."""

    r: int | None = None
    inflect: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not -1 <= self.inflect <= 1:
            raise BadRequest(f"inflect={self.inflect} is outside [-1, 1]; give 0 to take as many tokens at each layer")
        if self.r is not None and self.r < 0:
            raise BadRequest(f"r={self.r} is negative; give the tokens to take at each layer, 0 for none")

    def left(self, index: int, patches: int, layers: int) -> int:
        """Patches of each image that may be left after layer `index`."""
        if self.budget.is_full:
            return patches
        weights = [1 - self.inflect + 2 * self.inflect * j / max(layers - 1, 1) for j in range(layers)]
        done = sum(weights[: index + 1])
        if self.r is not None:
            return max(patches - round(self.r * done), 0)
        return patches - round((patches - self.budget.count(patches)) * done / sum(weights))

    def taken(self, index: int, tokens: Tokens, patches: int, layers: int) -> int:
        """Tokens to take from each image at layer `index`, which has more than one left afterwards."""
        now = tokens.longest - tokens.prefix
        return max(min(now - self.left(index, patches, layers), now - 1), 0)

    def acts(self, index: int, tokens: Tokens, patches: int, layers: int) -> bool:
        return self.taken(index, tokens, patches, layers) > 0
