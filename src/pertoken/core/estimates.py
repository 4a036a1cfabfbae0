"""Estimates with their uncertainty: bootstrap intervals over tasks, and pass@k; what ranks say: their correlation, and
the area under the ROC curve."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb

import numpy as np
from numpy.typing import ArrayLike

ROUNDS = 2000


def interval(values: Sequence[float], level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values`, one per task. Both ends are the mean for one task, not a
    number for none."""
    array = np.asarray(values, dtype=float)
    if not len(array):
        return float("nan"), float("nan")
    drawn = np.random.default_rng(seed).integers(len(array), size=(ROUNDS, len(array)))
    means = array[drawn].mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def difference(one: Sequence[float], other: Sequence[float], level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Interval of the mean of `one` minus that of `other`, both on the same tasks (paired)."""
    if len(one) != len(other):
        raise ValueError(f"paired values must be as many on both sides, not {len(one)} and {len(other)}")
    return interval(np.asarray(one, dtype=float) - np.asarray(other, dtype=float), level, seed)  # type: ignore[arg-type]


def spearman(one: ArrayLike, other: ArrayLike) -> float:
    """Rank correlation of as many numbers on both sides, ties at their mean rank; 0 where a side is constant."""

    a, b = (ranks - ranks.mean() for ranks in (_ranks(one), _ranks(other)))
    return float(a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-12))


def roc_area(scores: ArrayLike, positive: ArrayLike) -> float:
    """Area under the ROC curve: the chance that one of the `positive` has a higher score than one that is not, ties
    counted half; 0 where there are none of a kind."""
    chosen = np.ravel(positive).astype(bool)
    yes, no = int(chosen.sum()), int((~chosen).sum())
    return float((_ranks(scores)[chosen].sum() - yes * (yes - 1) / 2) / max(yes * no, 1))


def _ranks(values: ArrayLike) -> np.ndarray:
    """Ranks from 0, ties at their mean rank."""
    _, place, counts = np.unique(np.ravel(values), return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts + 1) / 2)[np.ravel(place)]


def pass_at(k: int, passed: int, samples: int) -> float:
    """Unbiased chance that at least one of `k` of the samples passes (Chen et al., arXiv 2107.03374)."""
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} needs at least {k} samples, there are {samples}")
    return 1 - comb(samples - passed, k) / comb(samples, k)
