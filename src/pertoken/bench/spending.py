"""What a policy spent, read off its trace, so that a control can be given as much."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import zip_longest

import torch
from torch import Tensor

from pertoken.core.decision import Depth, Exit
from pertoken.core.trace import Trace
from pertoken.depth.exits import SITE as EXITS
from pertoken.depth.layers import SITE as LAYERS


def layers_run(trace: Trace) -> Counter[int]:
    """How many generated tokens ran each number of layers, of a policy that chooses layers (`depth.layers`) or lets
    tokens leave between them (`depth.exits`); empty for a trace of another kind. Forwards of several tokens read a
    prompt and do not count."""
    found: Counter[int] = Counter()
    for valid, layers in _forwards(trace):
        if valid.shape[1] == 1:
            numbers, counts = torch.unique(layers[valid], return_counts=True)
            found.update(dict(zip(numbers.tolist(), counts.tolist(), strict=True)))
    return found


def _forwards(trace: Trace) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each forward which tokens are real and how many layers they ran, both `[batch, token]`. Where it decided more
    than once, after one layer and another, the last decision counts."""
    steps = [step for step in trace.steps if step.site == LAYERS or step.site.startswith(EXITS)]
    for step, after in zip_longest(steps, steps[1:]):
        decision = step.decision
        if isinstance(decision, Depth):
            yield decision.valid, decision.layers.sum(-1)
        elif isinstance(decision, Exit) and (after is None or _place(after.site) <= _place(step.site)):
            yield decision.valid, decision.left.abs()


def _place(site: str) -> int:
    """After how many layers a decision was made; 0 for one before the first."""
    number = site.rpartition(".")[2]
    return int(number) if number.isdigit() else 0
