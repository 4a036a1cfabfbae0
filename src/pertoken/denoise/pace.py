"""How many places a block of masked ones commits at each step, if the rule leaves it to the clock.

*even*, LLaDA's (arXiv 2502.09992): m places and S steps give m // S commits per step, one more at the first m % S.
*dream*, Dream's (arXiv 2508.15487): times t_0 = 1 to t_S = 1e-3, evenly spaced; step i commits
floor(n_i (1 - t_{i+1} / t_i)) of the n_i places left, the last step all. Both name steps that commit nothing (the even
one if S > m, Dream's by its floor); they would cost a forward and change nothing, so they are left out. m is what is
undecided when the row comes to the block: one that was cut before that is paced as the shorter block it is.
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


def quotas(pace: str, size: int, steps: int) -> Tensor:
    """Commits `[places, step]` of each step that commits anything of a block with 0 to `size` places, which they add up
    to; behind the last of these steps it is repeated."""
    if pace not in PACES:
        raise BadRequest(f"pace={pace!r} is unknown; choose one of {', '.join(PACES)}")
    places = torch.arange(size + 1)
    counts = _even(places, steps) if pace == "even" else _dream(places, steps)
    some = counts > 0
    number = some.cumsum(-1)
    used = number[:, -1:].clamp(min=1)
    width = int(used.max())
    kept = counts.new_zeros(len(counts), width + 1).scatter_(1, number * some, counts)[
        :, 1:
    ]  # column 0 takes idle ones
    return kept.gather(1, torch.arange(width).minimum(used - 1))


def _even(places: Tensor, steps: int) -> Tensor:
    return places[:, None] // steps + (torch.arange(steps) < places[:, None] % steps)


def _dream(places: Tensor, steps: int) -> Tensor:
    left, counts = places, []
    for now, after in pairwise(times(steps).tolist()):
        counts.append((left.double() * (1 - after / now)).long())
        left = left - counts[-1]
    counts[-1] = counts[-1] + left
    return torch.stack(counts, -1)
