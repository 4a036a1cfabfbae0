"""How many places a block of masked ones commits at each step, if the rule leaves it to the clock.

*even*, LLaDA's (arXiv 2502.09992): m places and S steps give m // S commits per step, one more at the first m % S.
*dream*, Dream's (arXiv 2508.15487): times t_0 = 1 to t_S = 1e-3, evenly spaced; step i commits
floor(n_i (1 - t_{i+1} / t_i)) of the n_i places left, the last step all. Both name steps that commit nothing (the even
one if S > m, Dream's by its floor); they would cost a forward and change nothing, so they are left out.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from pertoken.core.errors import BadRequest

LAST = 1e-3
PACES = ("even", "dream")


def times(steps: int, last: float = LAST) -> Tensor:
    """`[steps + 1]` float64 from 1 down to `last`."""
    return torch.linspace(1, last, steps + 1, dtype=torch.float64)


def quotas(pace: str, size: int, steps: int) -> list[int]:
    """Commits of each step of a block of `size` places that commits anything; they add up to `size`."""
    if pace not in PACES:
        raise BadRequest(f"pace={pace!r} is unknown; choose one of {', '.join(PACES)}")
    counts = _even(size, steps) if pace == "even" else _dream(size, steps)
    return [count for count in counts if count]


def _even(size: int, steps: int) -> list[int]:
    return [size // steps + (step < size % steps) for step in range(steps)]


def _dream(size: int, steps: int) -> list[int]:
    left, counts = size, []
    for now, after in pairwise(times(steps).tolist()):
        counts.append(int(left * (1 - after / now)))
        left -= counts[-1]
    counts[-1] += left
    return counts
