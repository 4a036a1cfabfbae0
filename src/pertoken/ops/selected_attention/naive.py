"""The definition, one query at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def selected_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    allowed: Tensor,
    scale: float,
    bias: Tensor | None = None,
    softcap: float | None = None,
    turned: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """As `ops.selected_attention.torch`, where the arguments are described."""
    rows, heads, runs, length, _ = query.shape
    kv_heads, groups = key.shape[1], index.shape[1]
    out = []
    for row in range(rows):
        for head in range(heads):
            kv, group = head // (heads // kv_heads), head // (heads // groups)
            for run in range(runs):
                for q in range(length):
                    weights, values = [], []
                    for slot, column in enumerate(index[row, group, run].tolist()):
                        if not allowed[row, group, run, q, slot]:
                            continue
                        read = key[row, kv, column].float()
                        if turned is not None:
                            cos, sin = (part[slot].float() for part in turned)
                            half = len(cos) // 2
                            read = read * cos + torch.cat((-read[half:], read[:half])) * sin
                        score = (query[row, head, run, q].float() * read).sum() * scale
                        if softcap is not None:
                            score = softcap * torch.tanh(score / softcap)
                        if bias is not None:
                            score = score + bias[row, group, run, q if bias.shape[3] > 1 else 0, slot]
                        weights.append(score)
                        values.append(value[row, kv, column].float())
                    if not weights:
                        out.append(torch.zeros(value.shape[-1]))
                        continue
                    law = torch.stack(weights).softmax(0)
                    out.append((law[:, None] * torch.stack(values)).sum(0))
    return torch.stack(out).view(rows, heads, runs, length, value.shape[-1]).to(query.dtype)
