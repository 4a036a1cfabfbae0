"""Measured step times: how long one forward takes as a function of how many tokens each row brings."""

from __future__ import annotations

import bisect
import time
import weakref
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch

from pertoken.core.cost import synchronize
from pertoken.models.cache import TreeCache
from pertoken.models.stack import Stack

WIDTHS = (1, 2, 4, 8, 16, 32, 64)
CONTEXT = 128
MOST_TOKENS = 128  # of all rows together; times go on in a straight line from there
REPEATS = 4
_MEASURED: weakref.WeakKeyDictionary[Stack, dict[tuple[int, int], tuple[int, StepTime]]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class StepTime:
    """Seconds of a forward with `widths[i]` tokens per row, interpolated between and extended past the measured
    ones."""

    widths: tuple[int, ...]
    seconds: tuple[float, ...]

    def __call__(self, width: float) -> float:
        at = self._piece(width)
        return self._levels[at] + self._slopes[at] * max(width - self.widths[at], 0)

    def slope(self, width: float) -> float:
        """Seconds that one more token costs at this width."""
        return self._slopes[self._piece(width)]

    def _piece(self, width: float) -> int:
        return min(max(bisect.bisect_right(self.widths, width) - 1, 0), len(self._slopes) - 1)

    @cached_property
    def _slopes(self) -> list[float]:
        """Of the line from each width to the next; a noisy fall counts as flat."""
        if len(self.widths) == 1:
            return [self.seconds[0] / self.widths[0]]
        spans = zip(pairwise(self.widths), pairwise(self.seconds), strict=True)
        return [max(late - early, 0.0) / (high - low) for (low, high), (early, late) in spans]

    @cached_property
    def _levels(self) -> list[float]:
        """Seconds at each width, falls flattened."""
        rises = (slope * (high - low) for slope, (low, high) in zip(self._slopes, pairwise(self.widths), strict=False))
        return list(accumulate(rises, initial=self.seconds[0]))


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


def block_time(stack: Stack, rows: int) -> StepTime:
    """Seconds of a forward by the tokens of all rows together: as measured with one row up to `rows` tokens, with
    `rows` rows from there on."""
    alone = step_time(stack, 1)
    if rows == 1:
        return alone
    widest = max(MOST_TOKENS // rows, 2)
    together = step_time(stack, rows, widest)
    few = [(w, s) for w, s in zip(alone.widths, alone.seconds, strict=True) if w < rows]
    many = [(rows * w, s) for w, s in zip(together.widths, together.seconds, strict=True) if w <= widest]
    seconds = accumulate((s for _, s in [*few, *many]), max)
    return StepTime(tuple(w for w, _ in [*few, *many]), tuple(seconds))
