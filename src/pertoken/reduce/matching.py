"""Bipartite soft matching: which tokens are alike enough to be one (ToMe, arXiv 2210.09461, section 3).

Tokens fall into A (even places) and B (odd places). Every token a of A proposes to its best partner
b(a) = argmax_b k_a k_b, at the score m(a) = k_a k_{b(a)}, where k is the mean of the layer's keys over heads, of length
1. No chains can arise, so that all proposals that are accepted are carried out at once. Tokens that are no patches
neither propose nor are proposed to.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pertoken.core.decision import Assign
from pertoken.reduce.reduction import TokenView


def proposals(view: TokenView) -> tuple[Tensor, Tensor]:
    """Scores `[image, a]` float32 of the tokens at even places, -inf where there is none to be merged, and the
    partners' numbers among the tokens at odd places `[image, a]`."""
    metric = view.metric
    patch = view.valid.clone()
    patch[:, : view.prefix] = False
    scores = metric[:, 0::2] @ metric[:, 1::2].transpose(-1, -2)
    scores = scores.masked_fill(~(patch[:, 0::2, None] & patch[:, None, 1::2]), -torch.inf)
    if not scores.shape[-1]:
        return scores.new_full(scores.shape[:2], -torch.inf), scores.new_zeros(scores.shape[:2], dtype=torch.long)
    best = scores.max(-1)
    return best.values, best.indices


def most(view: TokenView) -> Tensor:
    """`[image]` how many tokens of each image may be merged at once."""
    return (view.valid.sum(-1) - view.prefix).clamp(min=0) // 2


def best(scores: Tensor, count: Tensor) -> Tensor:
    """`[image, a]` bool: the `count` `[image]` proposals of the highest scores, of equals the first."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    ranks = torch.arange(scores.shape[-1], device=scores.device)
    wanted = torch.zeros_like(scores, dtype=torch.bool)
    wanted.scatter_(-1, order, ranks < count[:, None])
    return wanted & (scores > -torch.inf)


def merged(view: TokenView, accepted: Tensor, partner: Tensor) -> Assign:
    """Carry out the accepted proposals `[image, a]`. The next tokens are the prefix, then those left of A, then B: the
    order changes from layer to layer, so that others can meet. An image in which nothing merges stays as it is."""
    valid = view.valid
    places = torch.arange(valid.shape[1], device=valid.device)
    gone = torch.zeros_like(valid)
    gone[:, 0::2] = accepted
    front = places < view.prefix
    even = (places % 2 == 0) & ~front
    stay_a, stay_b = valid & even & ~gone, valid & (places % 2 == 1) & ~front
    group = torch.full_like(valid, -1, dtype=torch.long)
    group = torch.where(front & valid, places, group)
    group = torch.where(stay_a, view.prefix + stay_a.cumsum(-1) - 1, group)
    offset = view.prefix + stay_a.sum(-1, keepdim=True)
    group = torch.where(stay_b, offset + stay_b.cumsum(-1) - 1, group)
    into = group[:, 1::2].gather(1, partner) if group.shape[1] > 1 else group[:, :0]
    group[:, 0::2] = torch.where(accepted, into, group[:, 0::2])
    here = torch.where(valid, places, -1)
    return Assign(valid, torch.where(accepted.any(-1, keepdim=True), group, here))
