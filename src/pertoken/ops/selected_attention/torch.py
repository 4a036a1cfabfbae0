"""Attention over chosen keys, by gathering them: time and memory follow the keys chosen, not the context."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pertoken.core.rotation import rotated

GATHERED = 64 * 2**20  # bytes of keys gathered at once; more runs than fit are done in turn
FEW = 16  # queries per key head up to which two plain products beat the fused kernel (on a CPU, in half precision, 4x)


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
    """Output `[batch, heads, run, query, dim]` of queries that fall into runs which share their keys.

    query `[batch, heads, run, query, dim]`; key and value `[batch, kv_heads, key, dim]`; index `[batch, groups, run,
    chosen]` columns of keys, one set for all heads (groups 1) or one per key head; allowed `[batch, groups, run, query,
    chosen]` bool: which of them a query reads (a column that stands twice counts twice where both are allowed); scale
    of the scores; bias, as allowed or with one query for all, is added to the scores; softcap bounds their size before
    that. turned: cosines and sines `[chosen, dim]` that chosen keys are turned by, by their places in the index (the
    queries come turned). A query that reads nothing gets zeros. Differentiable in query, key, value and bias.
    """
    rows, heads, runs, length, dim = query.shape
    kv_heads, chosen = key.shape[1], index.shape[-1]
    if not chosen:
        return query.new_zeros(rows, heads, runs, length, value.shape[-1])
    each = rows * kv_heads * chosen * (dim + value.shape[-1]) * key.element_size()
    step = max(GATHERED // max(each, 1), 1)
    if step >= runs:
        return _runs(query, key, value, index, allowed, scale, bias, softcap, turned)
    parts = [
        _runs(
            query[:, :, at : at + step],
            key,
            value,
            index[:, :, at : at + step],
            allowed[:, :, at : at + step],
            scale,
            None if bias is None else bias[:, :, at : at + step],
            softcap,
            turned,
        )
        for at in range(0, runs, step)
    ]
    return torch.cat(parts, 2)


def _runs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    allowed: Tensor,
    scale: float,
    bias: Tensor | None,
    softcap: float | None,
    turned: tuple[Tensor, Tensor] | None,
) -> Tensor:
    rows, heads, runs, length, dim = query.shape
    kv_heads = key.shape[1]
    each = heads // kv_heads
    row = torch.arange(rows, device=key.device)[:, None, None, None]
    head = torch.arange(kv_heads, device=key.device)[None, :, None, None]
    keys, values = key[row, head, index], value[row, head, index]  # [row, kv_head, run, chosen, dim]
    if turned is not None:
        keys = rotated(keys, *turned)
    asked = query.view(rows, kv_heads, each, runs, length, dim).transpose(2, 3).flatten(3, 4)
    reads = (
        allowed[:, :, :, None].expand(-1, -1, -1, each, -1, -1).flatten(3, 4)
    )  # [row, group, run, each*query, chosen]
    added = None
    if bias is not None:
        added = bias[:, :, :, None].expand(-1, -1, -1, each, length, -1).flatten(3, 4)
    empty = ~reads.any(-1, keepdim=True)
    if each * length <= FEW or softcap is not None:
        scores = torch.matmul(asked, keys.transpose(-1, -2)) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.float()
        if added is not None:
            scores = scores + added
        law = scores.masked_fill(~reads, -torch.inf).masked_fill(empty, 0).softmax(-1).to(values.dtype)
        out = torch.matmul(law, values)
    else:
        mask = (reads | empty).expand(rows, kv_heads, runs, -1, -1)
        if added is not None:
            mask = added.to(asked.dtype).masked_fill(~(reads | empty), -torch.inf).expand(rows, kv_heads, runs, -1, -1)
        flat = [x.transpose(1, 2).flatten(0, 1) for x in (asked, keys, values, mask)]  # [row*run, kv_head, ...]
        out = F.scaled_dot_product_attention(*flat[:3], attn_mask=flat[3], scale=scale)
        out = out.view(rows, runs, kv_heads, each * length, -1).transpose(1, 2)
    out = out.masked_fill(empty, 0)
    out = out.view(rows, kv_heads, runs, each, length, -1).transpose(2, 3)
    return out.reshape(rows, heads, runs, length, -1)
