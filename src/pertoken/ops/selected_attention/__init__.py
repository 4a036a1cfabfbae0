"""Attention over chosen keys: `naive` is the definition, `torch` what runs, `triton` the same on a GPU."""

from pertoken.ops.selected_attention.torch import selected_attention

__all__ = ["selected_attention"]
