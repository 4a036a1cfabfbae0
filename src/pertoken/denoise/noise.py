"""Random tokens for undecided positions, as a function of where they stand: no generator, no order of drawing."""

from __future__ import annotations

import torch
from torch import Tensor

from pertoken.denoise.canvas import Canvas

SPREAD = (0x9E3779B97F4A7C15 - 2**64, 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)  # splitmix64, signed


def noise(canvas: Canvas, vocabulary: int, seed: int | None) -> Tensor:
    """`[row, place]` tokens, uniform over the vocabulary: splitmix64's scrambling of seed, row (if the seed is not
    None), block, step and place."""
    device = canvas.ids.device
    rows = torch.tensor(canvas.numbers, device=device) if seed is not None else torch.zeros_like(canvas.block)
    x = torch.full_like(canvas.block, seed or 0)
    for part in (rows[:, None], canvas.block[:, None], canvas.block_step[:, None], canvas.columns[: canvas.size]):
        x = scrambled((x[:, None] if x.ndim == 1 else x) + (part + 1) * SPREAD[0])
    return (x & torch.iinfo(torch.long).max) % vocabulary


def scrambled(x: Tensor) -> Tensor:
    """splitmix64's finaliser on int64, whose products wrap around."""
    for shift, factor in ((30, SPREAD[1]), (27, SPREAD[2]), (31, 1)):
        x = (x ^ ((x >> shift) & (2 ** (64 - shift) - 1))) * factor
    return x
