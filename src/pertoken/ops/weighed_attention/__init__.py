"""Attention that also says how much of it each key got: `naive` is the definition, `torch` what runs."""

from pertoken.ops.weighed_attention.torch import attention_mass, weighed_attention

__all__ = ["attention_mass", "weighed_attention"]
