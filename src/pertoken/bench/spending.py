"""What a policy spent, read off its trace, so that a control can be given as much."""

from __future__ import annotations

from collections import Counter

import torch

from pertoken.core.decision import Exit
from pertoken.core.trace import Trace


def left_after(trace: Trace) -> Counter[int]:
    """How many generated tokens left after each number of layers, of a policy by which tokens leave between layers
    (`depth.exits`); empty for a trace of another kind. Forwards of several tokens read a prompt and do not count."""
    found: Counter[int] = Counter()
    last: tuple[str, Exit] | None = None
    for step in trace.steps:
        if not isinstance(step.decision, Exit):
            continue
        if last is not None and _layer(step.site) <= _layer(last[0]):
            found += _counted(last[1])
        last = step.site, step.decision
    return found + _counted(last[1]) if last is not None else found


def _layer(site: str) -> int:
    return int(site.rsplit(".", 1)[1])


def _counted(decision: Exit) -> Counter[int]:
    if decision.valid.shape[1] > 1:
        return Counter()
    layers, counts = torch.unique(decision.left[decision.valid].abs(), return_counts=True)
    return Counter(dict(zip(layers.tolist(), counts.tolist(), strict=True)))
