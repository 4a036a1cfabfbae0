"""Attention that also says how much of it each key got, in blocks of queries: no matrix [query, key] over all of them.

The fused kernels of torch keep the weights to themselves, so whoever needs them pays for their plain computation. Where
only the last queries are to be weighed, run the model's own attention and `attention_mass` over those.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 64 * 2**20  # bytes of scores held at once


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
    """Output `[batch, heads, query, dim]` and mass `[batch, kv_heads, key]` float32, the weights that each key got,
    summed over the queries and over the heads that share it.

    query `[batch, heads, query, dim]`; key and value `[batch, kv_heads, key, dim]`; places and real `[batch, groups,
    key]`: the place in the row of each key and whether it may be read at all, one set for all heads (groups 1) or one
    per key head; until `[batch, query]`: the last place that each query reads, -1 for none; scale of the scores;
    softcap bounds their size. A query that reads nothing gets zeros and gives no mass.
    """
    outs, masses = [], []
    for at, step in _blocks(query, key):
        law = _weights(query[:, :, at : at + step], key, places, real, until[:, at : at + step], scale, softcap)
        masses.append(law.sum((2, 3)))
        out = torch.matmul(law.flatten(2, 3).to(value.dtype), value)
        outs.append(out.view(*law.shape[:4], -1).flatten(1, 2))
    if not outs:
        return query.new_zeros(*query.shape[:3], value.shape[-1]), key.new_zeros(key.shape[:3], dtype=torch.float32)
    return torch.cat(outs, 2), torch.stack(masses).sum(0)


def attention_mass(
    query: Tensor,
    key: Tensor,
    places: Tensor,
    real: Tensor,
    until: Tensor,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """The mass alone; arguments as above."""
    mass = key.new_zeros(key.shape[:3], dtype=torch.float32)
    for at, step in _blocks(query, key):
        law = _weights(query[:, :, at : at + step], key, places, real, until[:, at : at + step], scale, softcap)
        mass = mass + law.sum((2, 3))
    return mass


def _blocks(query: Tensor, key: Tensor) -> list[tuple[int, int]]:
    """First query and number of queries of each block."""
    rows, heads, queries, _ = query.shape
    step = max(BLOCK // max(rows * heads * key.shape[2] * 4, 1), 1)
    return [(at, min(step, queries - at)) for at in range(0, queries, step)]


def _weights(
    query: Tensor, key: Tensor, places: Tensor, real: Tensor, until: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """`[batch, kv_head, head of it, query, key]` float32."""
    rows, heads, queries, dim = query.shape
    kv_heads, keys = key.shape[1:3]
    asked = query.reshape(rows, kv_heads, -1, dim)
    scores = torch.matmul(asked, key.transpose(-1, -2)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.float().view(rows, kv_heads, heads // kv_heads, queries, keys)
    reads = (real[:, :, None] & (places[:, :, None] <= until[:, None, :, None]))[:, :, None]
    empty = ~reads.any(-1, keepdim=True)
    law = scores.masked_fill(~reads, -torch.inf).masked_fill(empty, 0).softmax(-1)
    return law.masked_fill(empty, 0)
