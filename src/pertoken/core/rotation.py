"""Rotary embedding as arithmetic."""

import torch
from torch import Tensor


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` `[..., dim]` turned by angles with cosines and sines `[..., turned dim]`, which broadcast to it: the first
    half of what is turned against the second (as Llama does), the rest of `dim` untouched."""
    size = cos.shape[-1]
    part, rest = x[..., :size], x[..., size:]
    one, other = part.chunk(2, -1)
    part = part * cos + torch.cat((-other, one), -1) * sin
    return torch.cat((part, rest), -1) if rest.shape[-1] else part
