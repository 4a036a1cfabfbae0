"""Measured step times: how long one forward takes as a function of how many tokens each row brings."""

from __future__ import annotations

import bisect
import time
import weakref
from dataclasses import dataclass

import torch

from pertoken.core.cost import synchronize
from pertoken.models.cache import TreeCache
from pertoken.models.stack import Stack

WIDTHS = (1, 2, 4, 8, 16, 32, 64)
CONTEXT = 128
REPEATS = 4
_MEASURED: weakref.WeakKeyDictionary[Stack, dict[tuple[int, int], tuple[int, StepTime]]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class StepTime:
    """Seconds of a forward with `widths[i]` tokens per row, interpolated between and extended past the measured
    ones."""

    widths: tuple[int, ...]
    seconds: tuple[float, ...]

    def __call__(self, width: float) -> float:
        return self.seconds[0] + sum(
            self.slope(low) * (min(width, high) - low)
            for low, high in zip(self.widths, (*self.widths[1:], float("inf")), strict=True)
            if width > low
        )

    def slope(self, width: float) -> float:
        """Seconds that one more token per row costs at this width."""
        if len(self.widths) == 1:
            return self.seconds[0] / self.widths[0]
        at = min(max(bisect.bisect_right(self.widths, width) - 1, 0), len(self.widths) - 2)
        rise = self.seconds[at + 1] - self.seconds[at]
        return max(rise, 0.0) / (self.widths[at + 1] - self.widths[at])


@torch.inference_mode()
def step_time(stack: Stack, rows: int, widest: int = WIDTHS[-1]) -> StepTime:
    """Measure once per stack, number of rows and threads: least of a few runs at each width, head included."""
    key = (rows, torch.get_num_threads())
    known = _MEASURED.setdefault(stack, {})
    if key in known and known[key][0] >= widest:
        return known[key][1]
    adapter = stack.adapter
    room = adapter.positions
    context = min(CONTEXT, max(room - WIDTHS[-1], 1))
    widths = [w for w in WIDTHS if w <= max(widest, 2) and context + w <= room]
    cache = TreeCache(adapter, rows, context + WIDTHS[-1])
    cache.base, cache.valid[:, :context] = context, True
    seconds = []
    for width in widths:
        ids = torch.zeros(rows, width, dtype=torch.long, device=adapter.device)
        positions = (context + torch.arange(width, device=adapter.device)).expand(rows, -1)
        allow = torch.ones(width, width, dtype=torch.bool, device=adapter.device).tril().expand(rows, -1, -1)
        best = float("inf")
        for _ in range(REPEATS):
            synchronize(adapter.device)
            start = time.perf_counter()
            stack.logits(stack.forward(ids, positions, cache, context, allow))
            synchronize(adapter.device)
            best = min(best, time.perf_counter() - start)
        seconds.append(max(best, seconds[-1] if seconds else 0.0))
    known[key] = (widest, StepTime(tuple(widths), tuple(seconds)))
    return known[key][1]
