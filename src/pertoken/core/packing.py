"""Rows of different lengths that stand one after the other, in groups of like length for attention."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LIKE = 0.75  # rows share a bucket if the shortest has at least this share of the longest one's tokens


@dataclass(frozen=True)
class Bucket:
    """Rows that attend together. rows: their numbers; index `[row, token]`: flat places, the row's first one where it
    has no token; valid, of that shape, or None if all are real."""

    rows: list[int]
    index: Tensor
    valid: Tensor | None

    def gathered(self, parts: Tensor) -> tuple[Tensor, Tensor]:
        """What was computed for the bucket, `[row, token, ...]`, as `[real token, ...]` with the flat place of each."""
        if self.valid is None:
            return parts.flatten(0, 1), self.index.flatten()
        return parts[self.valid], self.index[self.valid]


def buckets(counts: Sequence[int], device: torch.device) -> tuple[Bucket, ...]:
    """Rows of `counts` tokens each, at least one, in groups of like length, each padded to its longest."""
    starts = [0, *itertools.accumulate(counts)]
    groups: list[list[int]] = []
    for row in sorted(range(len(counts)), key=lambda row: -counts[row]):
        if groups and counts[row] >= LIKE * counts[groups[-1][0]]:
            groups[-1].append(row)
        else:
            groups.append([row])
    made = []
    for rows in groups:
        longest = counts[rows[0]]
        inside = torch.arange(longest, device=device)
        valid = inside < torch.tensor([counts[row] for row in rows], device=device)[:, None]
        index = torch.tensor([starts[row] for row in rows], device=device)[:, None] + torch.where(valid, inside, 0)
        made.append(Bucket(rows, index, None if counts[rows[-1]] == longest else valid))
    return tuple(made)
