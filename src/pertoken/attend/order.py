"""The best of many scores, with an order among those that are even."""

from __future__ import annotations

import torch
from torch import Tensor

COARSE = 13  # bits of fp32 that are dropped: scores within a tenth of a percent may count as even


def best(scores: Tensor, place: Tensor, most: int) -> Tensor:
    """`[..., most]` indices of the greatest scores `[..., key]`, fp32, the best first; of even ones the last by
    `place`, int64, which broadcasts to them.

    Keys that are not turned are the same wherever a token stands in the first layer, so that ties are common; and what
    is equal by definition may differ in the last bits, by where in a block of memory it was worked out.
    """
    bits = scores.contiguous().view(torch.int32)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # now ordered as the numbers are
    rounded = (bits + (1 << (COARSE - 1))) >> COARSE  # not cut: even votes are often whole numbers, give or take a bit
    return ((rounded.long() << 32) + place).topk(most, -1).indices
