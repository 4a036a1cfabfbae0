"""Causal attention over N positions at which U <= N tokens stand, several of them more than once (DyMU, arXiv
2504.17040, section 3.2): projections, norms and feed-forward blocks are computed for U tokens, only this for N
positions.

A token is turned (rotary embedding) by each of its positions, every position attends by itself, and the outputs of a
token's positions are averaged.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from pertoken.core.rotation import rotated


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
    """Output `[row, asked, heads, dim]`, zeros for a token without a position among those asked.

    query `[row, heads, asked, dim]` and key, value `[row, kv_heads, held, dim]`: of tokens, not turned; the asked ones
    are the last of those held. columns `[row, N]` int64: the token at each position, -1 for none; positions from
    `first` on are asked. cos, sin `[row, N, turned dim]`: the angles of each position. window: how many positions back
    each one looks, itself included.
    """
    asked, held, there = query.shape[2], key.shape[2], columns >= 0
    tokens = columns.clamp(min=0)
    groups = query.shape[1] // key.shape[1]
    k = rotated(_spread(key, tokens), cos[:, None], sin[:, None])
    v = _spread(value, tokens)
    own = (tokens[:, first:] - (held - asked)).clamp(min=0)
    q = rotated(_spread(query, own), cos[:, None, first:], sin[:, None, first:])
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    mask = _mask(there, first, window)
    if mask is not None:  # what stands nowhere may hold anything
        k, v = (x.masked_fill(~there[:, None, :, None], 0) for x in (k, v))
    out = scaled_dot_product_attention(q, k, v, mask, scale=scale, is_causal=mask is None and q.shape[2] > 1)
    return _averaged(out, own, there[:, first:], asked)


def exact_attention(
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
    """The same by the paper's equation: products of tokens first, angles of positions after.

    With the two halves (q1, q2) and (k1, k2) of a rotary pair f, tokens u(m), u(n) at positions m, n:
    score(m, n) = sum_f (q1 k1 + q2 k2)[u(m), u(n)] cos(m - n)_f + (q1 k2 - q2 k1)[u(m), u(n)] sin(m - n)_f.
    Slower than `unmerged_attention` on every machine tried; it holds no key or query per position.
    """
    asked, held, there = query.shape[2], key.shape[2], columns >= 0
    tokens, size = columns.clamp(min=0), cos.shape[-1]
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    own = (tokens[:, first:] - (held - asked)).clamp(min=0)
    rows = torch.arange(len(columns), device=columns.device)[:, None, None]
    pair = (rows, slice(None), own[:, :, None], tokens[:, None, :])  # [row, m, n, head] out of [row, head, u, u]
    half = size // 2
    scores = (query[..., size:] @ key[..., size:].transpose(-1, -2))[pair]
    for f in range(half):
        q1, q2, k1, k2 = query[..., f], query[..., half + f], key[..., f], key[..., half + f]
        dot = q1[..., None] * k1[..., None, :] + q2[..., None] * k2[..., None, :]
        cross = q1[..., None] * k2[..., None, :] - q2[..., None] * k1[..., None, :]
        cm, sm, cn, sn = cos[:, first:, None, f], sin[:, first:, None, f], cos[:, None, :, f], sin[:, None, :, f]
        scores = scores + dot[pair] * (cm * cn + sm * sn)[..., None] + cross[pair] * (sm * cn - cm * sn)[..., None]
    mask = _mask(there, first, window, always=True)
    assert mask is not None
    law = (scores.movedim(-1, 1) * scale).masked_fill(~mask, -torch.inf).softmax(-1)
    of_tokens = law.new_zeros(*law.shape[:-1], held).scatter_add_(
        -1, tokens[:, None, None].expand_as(law), law
    )  # what a token gets at all of its positions
    return _averaged(of_tokens @ value, own, there[:, first:], asked)


def _spread(x: Tensor, tokens: Tensor) -> Tensor:
    """`[row, heads, position, dim]` out of `[row, heads, token, dim]`."""
    return x.gather(2, tokens[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[-1]))


def _mask(there: Tensor, first: int, window: int | None, always: bool = False) -> Tensor | None:
    """`[row, 1, asked position, position]` bool; None where it would be plainly causal from the first position on."""
    count = there.shape[1]
    if not always and window is None and first in (0, count - 1) and bool(there.all()):
        return None
    places = torch.arange(count, device=there.device)
    back = places[first:, None] - places
    near = (back >= 0) if window is None else (back >= 0) & (back < window)
    return ((near & there[:, None]) | (back == 0))[:, None]  # an empty position reads itself and is not averaged


def _averaged(out: Tensor, own: Tensor, there: Tensor, asked: int) -> Tensor:
    """`[row, token, heads, dim]` means of `[row, heads, position, dim]` over each token's positions."""
    out = out.transpose(1, 2)
    weight = there.to(out.dtype)
    count = weight.new_zeros(len(out), asked).scatter_add_(1, own, weight)
    index = own[..., None, None].expand_as(out)
    out = out.masked_fill(~there[..., None, None], 0)
    total = out.new_zeros(len(out), asked, *out.shape[2:]).scatter_add_(1, index, out)
    return total / count.clamp(min=1)[..., None, None]
