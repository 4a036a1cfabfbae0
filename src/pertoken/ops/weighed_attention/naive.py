"""The definition, one query at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def weighed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    places: Tensor,
    real: Tensor,
    until: Tensor,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """As `ops.weighed_attention.torch`, where the arguments are described."""
    rows, heads, queries, _ = query.shape
    kv_heads, keys = key.shape[1:3]
    out = torch.zeros(rows, heads, queries, value.shape[-1])
    mass = torch.zeros(rows, kv_heads, keys)
    for row in range(rows):
        for head in range(heads):
            kv = head // (heads // kv_heads)
            group = kv if places.shape[1] > 1 else 0
            for q in range(queries):
                read = [k for k in range(keys) if real[row, group, k] and places[row, group, k] <= until[row, q]]
                if not read:
                    continue
                scores = (query[row, head, q].float() * key[row, kv, read].float()).sum(-1) * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                law = scores.softmax(0)
                out[row, head, q] = (law[:, None] * value[row, kv, read].float()).sum(0)
                mass[row, kv, read] += law
    return out.to(query.dtype), mass
