"""Signals that decisions are made from: batched pure functions of logits or hidden states.

Logits are `[..., vocabulary]` and are read in float32, in nats; hidden states are `[..., width]`. The last axis is
reduced.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def entropy(logits: Tensor) -> Tensor:
    """Shannon entropy in nats of the softmax of logits `[..., vocabulary]`."""
    log_p = logits.float().log_softmax(-1)
    return -(log_p.exp() * log_p.clamp(min=-1e9)).sum(-1)


def confidence(logits: Tensor) -> Tensor:
    """Probability of the most likely token, computed without the whole softmax."""
    logits = logits.float()
    return (logits.amax(-1) - logits.logsumexp(-1)).exp()


def margin(logits: Tensor) -> Tensor:
    """Difference in probability of the two most likely tokens; 1 for a vocabulary of one."""
    logits = logits.float()
    if logits.shape[-1] == 1:
        return logits.new_ones(logits.shape[:-1])
    top = logits.topk(2, -1).values
    top = (top - logits.logsumexp(-1, keepdim=True)).exp()
    return top[..., 0] - top[..., 1]


def divergence(logits: Tensor, reference: Tensor) -> Tensor:
    """Kullback-Leibler divergence KL(reference || logits) in nats."""
    log_q, log_p = logits.float().log_softmax(-1), reference.float().log_softmax(-1)
    p = log_p.exp()
    return torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(-1)


def similarity(states: Tensor, others: Tensor) -> Tensor:
    """Cosine similarity of two sets of vectors `[..., width]`; 0 where one is zero."""
    return F.cosine_similarity(states.float(), others.float(), dim=-1)


def drift(states: Tensor, previous: Tensor) -> Tensor:
    """Length of the change relative to the length of `previous`; 0 where nothing moved."""
    moved = (states.float() - previous.float()).norm(dim=-1)
    return moved / previous.float().norm(dim=-1).clamp(min=1e-12)
