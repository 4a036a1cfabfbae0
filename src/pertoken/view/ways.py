"""Ways of an image's tokens through a grid of scales, off a trace of a policy that routes them (`depth.routes`).

Data only; nothing is drawn here. The trace is of one forward.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pertoken.core.decision import Depth
from pertoken.core.trace import Trace


def stages(trace: Trace, site: str = "depth.routes") -> list[Tensor]:
    """Of each row, how many stages every token took, `[image, token]`, finest row first."""
    found: dict[int, Tensor] = {}
    for step in trace.steps:
        if step.site.startswith(f"{site}.") and isinstance(step.decision, Depth):
            row = int(step.site.split(".")[-2])
            taken = (step.decision.layers[..., 0] & step.decision.valid).long()
            found[row] = found.get(row, torch.zeros_like(taken)) + taken
    return [found[row] for row in sorted(found)]


def finest(taken: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> Tensor:
    """`[image, height, width]` of the first row's map: the finest token that takes a stage at each place, numbered
    through all rows, or -1. taken: as `stages` gives it; sizes: height and width of each row's map."""
    high, wide = sizes[0]
    down, across = torch.arange(high), torch.arange(wide)
    place = torch.full((len(taken[0]), high, wide), -1)
    start = sum(height * width for height, width in sizes)
    for own, (height, width) in zip(reversed(taken), reversed(sizes), strict=True):
        start -= height * width
        token = (down * height // high)[:, None] * width + across * width // wide
        place = torch.where(own[:, token] > 0, start + token, place)
    return place
