"""The definition, one position at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """One vector turned by the angles of one position."""
    half = len(cos) // 2
    part = x[: len(cos)]
    part = part * cos + torch.cat((-part[half:], part[:half])) * sin
    return torch.cat((part, x[len(cos) :]))


def unmerged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    columns: Tensor,
    first: int,
    cos: Tensor,
    sin: Tensor,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """As `ops.unmerged_attention.torch`, where the arguments are described."""
    rows, heads, asked, _ = query.shape
    held, groups = key.shape[2], heads // key.shape[1]
    out = torch.zeros(rows, asked, heads, value.shape[-1], dtype=torch.float64)
    for row in range(rows):
        for head in range(heads):
            for token in range(asked):
                found = []
                for position in range(first, columns.shape[1]):
                    if columns[row, position] != held - asked + token:
                        continue
                    q = turned(
                        query[row, head, token].double(), cos[row, position].double(), sin[row, position].double()
                    )
                    scores, values = [], []
                    for other in range(position + 1):
                        column = int(columns[row, other])
                        if column < 0 or (window is not None and position - other >= window):
                            continue
                        k = key[row, head // groups, column].double()
                        k = turned(k, cos[row, other].double(), sin[row, other].double())
                        scores.append((q * k).sum() * scale)
                        values.append(value[row, head // groups, column].double())
                    law = torch.stack(scores).softmax(0)
                    found.append((law[:, None] * torch.stack(values)).sum(0))
                if found:
                    out[row, token, head] = torch.stack(found).mean(0)
    return out.to(query.dtype)
