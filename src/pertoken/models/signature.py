"""Telling models apart, for what was learnt about one of them and is of no use with another."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def signature(model: nn.Module) -> str:
    """A short hash of a model's shapes and of a few of its weights: tells models apart, dtypes not."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name}{list(weight.shape)}".encode())
        few = weight.flatten()[:: max(weight.numel() // 8, 1)].to(torch.bfloat16).float()
        digest.update(few.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
