"""Masks applied to logits, in place: only what is forbidden is written."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pertoken.decode.grammar.compiled import kernel
from pertoken.decode.grammar.provider import bits


def forbid(scores: Tensor, mask: np.ndarray, size: int) -> None:
    """Set scores `[vocabulary]` of tokens that a bitmask `[word]` does not allow to minus infinity, and all beyond
    `size`."""
    if scores.shape[-1] > size:
        scores[size:] = -torch.inf
    if scores.device.type == "cpu" and scores.dtype == torch.float32 and scores.is_contiguous():
        _write(scores.detach().numpy(), mask, min(size, len(scores)))
        return
    forbidden = np.flatnonzero(~bits(mask, min(size, len(scores))))
    scores[torch.from_numpy(forbidden).to(scores.device)] = -torch.inf


@kernel
def _write(scores, mask, size):
    low = -np.float32(np.inf)
    for word in range((size + 31) // 32):
        bits_ = mask[word]
        if bits_ == -1:
            continue
        last = min(32 * word + 32, size)
        if bits_ == 0:
            scores[32 * word : last] = low
            continue
        for token in range(32 * word, last):
            if not (bits_ >> (token & 31)) & 1:
                scores[token] = low
