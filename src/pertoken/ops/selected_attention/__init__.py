"""Attention over chosen keys: `naive` is the definition, `torch` what runs, `triton` the same on a GPU."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from pertoken.ops.selected_attention.torch import selected_attention as gathering
from pertoken.ops.selected_attention.triton import refusal
from pertoken.ops.selected_attention.triton import selected_attention as in_one_kernel

__all__ = ["selected_attention"]


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
    """As `ops.selected_attention.torch`, where the arguments are described, in the form that `form` picks."""
    return form(query, key, value, bias)(query, key, value, index, allowed, scale, bias, softcap, turned)


def form(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Callable[..., Tensor]:
    """The triton form on a GPU, where triton is installed and no gradient is needed; else the torch form, which also
    runs while torch's operations are watched: an operation counter does not see into a kernel."""
    if query.is_cuda and not is_in_torch_dispatch_mode() and refusal(query, key, value, bias) is None:
        return in_one_kernel
    return gathering
