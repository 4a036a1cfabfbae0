"""An interpolated n-gram model (Witten-Bell): what a neural model must clearly beat to have learned anything."""

from __future__ import annotations

import numpy as np

BITS = 12  # bits per token id: five ids fit one 64-bit key


class NGramModel:
    """Counts of 1..order-grams of a token stream; p(w|h) = (c(hw) + t(h) p(w|h')) / (c(h) + t(h)), t(h) distinct
    successors."""

    def __init__(self, stream: np.ndarray, order: int = 5):
        if stream.max() >= 1 << BITS:
            raise ValueError(
                f"token id {int(stream.max())} does not fit {BITS} bits; the vocabulary may have {1 << BITS}"
            )
        self.order = order
        self.tables = []
        for length in range(1, order + 1):
            keys, counts = np.unique(_keys(stream, length), return_counts=True)
            heads, first = np.unique(keys >> BITS, return_index=True)
            ends = np.append(first[1:], len(keys))
            totals = np.add.reduceat(counts, first)
            self.tables.append((keys, counts, heads, totals, ends - first))

    def loss(self, stream: np.ndarray, vocabulary: int) -> float:
        """Nats per token of `stream` from its `order`-th token on."""
        probability = np.full(len(stream) - self.order + 1, 1.0 / vocabulary)
        for length, (keys, counts, heads, totals, kinds) in enumerate(self.tables, 1):
            own = _keys(stream[self.order - length :], length)
            count = _lookup(own, keys, counts)
            total, distinct = _lookup(own >> BITS, heads, totals), _lookup(own >> BITS, heads, kinds)
            mixed = (count + distinct * probability) / np.maximum(total + distinct, 1)
            probability = np.where(total > 0, mixed, probability)
        return float(-np.log(probability).mean())


def _keys(stream: np.ndarray, length: int) -> np.ndarray:
    """Every `length`-gram as one integer, the last token in the lowest bits."""
    ids, count = stream.astype(np.int64), len(stream) - length + 1
    keys = np.zeros(count, dtype=np.int64)
    for offset in range(length):
        keys = (keys << BITS) | ids[offset : offset + count]
    return keys


def _lookup(wanted: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The value of each wanted key, 0 where it is not there."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)
