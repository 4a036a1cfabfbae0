"""Attention in which one token stands at several positions."""

from pertoken.ops.unmerged_attention.torch import exact_attention, unmerged_attention

__all__ = ["exact_attention", "unmerged_attention"]
