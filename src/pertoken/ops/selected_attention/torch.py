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


def gathered(x: Tensor, index: Tensor) -> Tensor:
    """`[batch, kv_heads, run, chosen, dim]` of `x` `[batch, kv_heads, key, dim]` at index `[batch, groups, run,
    chosen]`."""
    row = torch.arange(x.shape[0], device=x.device)[:, None, None, None]
    head = torch.arange(x.shape[1], device=x.device)[:, None, None]
    return rows_of(x, row, head, index)


def rows_of(x: Tensor, row: Tensor, head: Tensor, column: Tensor) -> Tensor:
    """`x[row, head, column]` `[..., dim]` of `x` `[batch, kv_heads, key, dim]`, where the three broadcast."""
    dim, steps = x.shape[-1], x.stride()
    if x.requires_grad or steps[3] != 1 or any(step % dim for step in steps[:3]):
        return x[row, head, column]
    each = [step // dim for step in steps[:3]]  # as rows of one table, which are copied whole: 5x faster on a CPU
    length = 1 + sum(step * (size - 1) for step, size in zip(each, x.shape[:3], strict=True))
    where = row * each[0] + head * each[1] + column * each[2]
    return x.as_strided((length, dim), (dim, 1)).index_select(0, where.flatten()).view(*where.shape, dim)


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
    keys = gathered(key, index)
    if turned is not None:
        keys = rotated(keys, *turned)
    return gathered_attention(query, keys, gathered(value, index), allowed, scale, bias, softcap)


def gathered_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    allowed: Tensor,
    scale: float,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """As `selected_attention`, of keys and values `[batch, kv_heads, run, chosen, dim]` that stand side by side."""
    rows, heads, runs, length, dim = query.shape
    kv_heads = keys.shape[1]
    each = heads // kv_heads
    asked = query.view(rows, kv_heads, each, runs, length, dim).transpose(2, 3).flatten(3, 4)
    empty = ~allowed.any(-1, keepdim=True)[:, :, :, None].expand(-1, -1, -1, each, -1, -1).flatten(3, 4)
    if each * length <= FEW or softcap is not None:
        reads = allowed[:, :, :, None].expand(-1, -1, -1, each, -1, -1).flatten(3, 4)
        added = None
        if bias is not None:  # [row, group, run, each*query, chosen], as reads
            added = bias[:, :, :, None].expand(-1, -1, -1, each, length, -1).flatten(3, 4)
        scores = torch.matmul(asked, keys.transpose(-1, -2)) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.float()
        if added is not None:
            scores = scores + added
        law = scores.masked_fill(~reads, -torch.inf).masked_fill(empty, 0).softmax(-1).to(values.dtype)
        out = torch.matmul(law, values)
    else:
        closed = ~(allowed | ~allowed.any(-1, keepdim=True))
        mask = torch.zeros_like(closed, dtype=asked.dtype) if bias is None else bias.to(asked.dtype).expand_as(closed)
        mask = mask.masked_fill(closed, -torch.inf)  # added: the kernel would turn a bool one into that, per head
        mask = mask[:, :, :, None].expand(-1, -1, -1, each, -1, -1).flatten(3, 4)
        flat = [x.transpose(1, 2).flatten(0, 1) for x in (asked, keys, values, mask)]  # [row*run, kv_head, ...]
        out = F.scaled_dot_product_attention(*flat[:3], attn_mask=flat[3].expand(-1, kv_heads, -1, -1), scale=scale)
        out = out.view(rows, runs, kv_heads, each * length, -1).transpose(1, 2)
    out = out.masked_fill(empty, 0)
    out = out.view(rows, kv_heads, runs, each, length, -1).transpose(2, 3)
    return out.reshape(rows, heads, runs, length, -1)
