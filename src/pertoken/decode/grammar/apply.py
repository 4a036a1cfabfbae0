"""Masks applied to logits, in place: only what is forbidden is written, and nothing is copied."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pertoken.decode.grammar.compiled import kernel
from pertoken.decode.grammar.provider import bits

WRITTEN = {  # how scores on the CPU are seen by the kernel, and what minus infinity is then
    torch.float32: (torch.float32, np.float32(-np.inf)),
    torch.float64: (torch.float64, np.float64(-np.inf)),
    torch.bfloat16: (torch.int16, np.int16(0xFF80 - (1 << 16))),
    torch.float16: (torch.int16, np.int16(0xFC00 - (1 << 16))),
}


def forbid(scores: Tensor, mask: np.ndarray, size: int) -> None:
    """Set scores `[vocabulary]` of tokens that a bitmask `[word]` does not allow to minus infinity, and all beyond
    `size`."""
    if len(scores) > size:
        scores[size:] = -torch.inf
    size = min(size, len(scores))
    if scores.device.type == "cpu" and scores.dtype in WRITTEN and scores.is_contiguous():
        seen, low = WRITTEN[scores.dtype]
        write(scores.detach().view(seen).numpy(), mask, size, low)
        return
    allowed = bits(mask, size)
    few = bool(2 * np.count_nonzero(allowed) < size)
    index = torch.from_numpy(np.flatnonzero(allowed == few)).to(scores.device)
    if few:
        kept = scores[index]
        scores.fill_(-torch.inf)
        scores[index] = kept
    else:
        scores[index] = -torch.inf


@kernel
def write(scores, mask, size, low):
    """Write `low` where a bit is not set; by whole words, so that it takes the same time whatever the bits are."""
    for word in range(size // 32):
        allowed, first = mask[word], 32 * word
        if allowed == -1:
            continue
        if allowed == 0:
            scores[first : first + 32] = low
            continue
        for k in range(32):
            scores[first + k] = scores[first + k] if (allowed >> k) & 1 else low
    for token in range(size - size % 32, size):
        if not (mask[token >> 5] >> (token & 31)) & 1:
            scores[token] = low
