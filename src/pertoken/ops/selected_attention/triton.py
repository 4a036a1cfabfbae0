"""Attention over chosen keys on a GPU: one kernel reads them through the index, so that no copy of them is made.

For each row, key head, run and block of queries it goes through the chosen keys in blocks, with the softmax of what was
read so far kept in fp32. All query heads of a key head share what is loaded. Forward only. How many queries and keys a
block has follows from what fits; it is not tuned to any GPU.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from pertoken.core.errors import BadRequest

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LEAST = 16  # rows of a tile, as products of tiles need; queries and chosen keys are rows
MOST = 64
TILE = 16 * 2**10  # bytes of a block's queries, and of its keys and values: compiled, 48 KiB of shared memory do


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
    """As `ops.selected_attention.torch`, where the arguments are described, without gradients. Keys, values, bias and
    places of the index that no query reads are not looked at, whatever stands there.

    Tensors are on a GPU, or anywhere if TRITON_INTERPRET=1 was set before triton was imported.
    """
    why = refusal(query, key, value, bias)
    if why is not None:
        raise BadRequest(why)
    out = query.new_empty(*query.shape[:-1], value.shape[-1])
    if not out.numel() or not index.shape[-1]:
        return out.zero_()
    attend, interpreted = kernel(query)
    programs, given, constants = launch(out, query, key, value, index, allowed, scale, bias, softcap, turned)
    with torch.cuda.device_of(query):
        attend[programs,](*given, **constants, WIDEN=interpreted, num_stages=stages(query, constants))
    return out


@cache
def installed() -> bool:
    """Whether there is a triton to import."""
    return find_spec("triton") is not None


def refusal(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> str | None:
    """Why the kernel does not take these, and what to do; None if it does."""
    if not installed():
        return "triton is not installed here; run pip install 'pertoken[gpu]', or use the op's torch form"
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (query, key, value, bias)):
        return "the triton form gives no gradients; use the op's torch form, or torch.no_grad()"
    kinds = {x.dtype for x in (query, key, value)}
    if len(kinds) > 1 or not kinds <= set(DTYPES):
        given = ", ".join(sorted(map(str, kinds)))
        return f"queries, keys and values are {given}; all must be one of {', '.join(map(str, DTYPES))}"
    return None


def kernel(query: Tensor) -> tuple[Any, bool]:
    """The kernel, and whether triton interprets it; raises `BadRequest` where it cannot run."""
    from triton import JITFunction

    from pertoken.ops.selected_attention.triton_kernel import attend

    interpreted = not isinstance(attend, JITFunction)
    if not interpreted and not query.is_cuda:
        raise BadRequest(
            f"queries are on {query.device}; the triton form runs on a GPU: move the tensors there, use the op's torch "
            "form, or set TRITON_INTERPRET=1 before triton is imported"
        )
    return attend, interpreted


def launch(
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    allowed: Tensor,
    scale: float,
    bias: Tensor | None,
    softcap: float | None,
    turned: tuple[Tensor, Tensor] | None,
) -> tuple[int, tuple[Any, ...], dict[str, int]]:
    """How many programs, the kernel's arguments in order, and those it is compiled for."""
    rows, heads, runs, length, dim = query.shape
    kv_heads, chosen, value_dim = key.shape[1], index.shape[-1], value.shape[-1]
    each = heads // kv_heads
    index = index.expand(-1, kv_heads, -1, -1)
    allowed = allowed.view(torch.uint8).expand(-1, kv_heads, -1, -1, -1)
    if bias is not None:
        bias = bias.expand(-1, kv_heads, -1, length, -1)
    cos, sin = turned if turned is not None else (None, None)
    width, value_width, size = power(dim), power(value_dim), query.element_size()
    read = value_width + (width if turned is None else 2 * width)  # what is turned is loaded twice
    asked = min(fitting(width * size), power(each * length))
    tensors = (query, key, value, index, allowed, bias, cos, sin, out)
    given = (
        *tensors,
        *(None if x is None else x.stride() for x in tensors),
        float(scale),
        None if softcap is None else float(softcap),
        kv_heads,
        each,
        runs,
        length,
        chosen,
        0 if cos is None else cos.shape[-1],
    )
    constants = {"DIM": dim, "VALUE_DIM": value_dim, "WIDTH": width, "VALUE_WIDTH": value_width}
    constants |= {"ASKED": asked, "READ": fitting(read * size)}
    return rows * kv_heads * runs * -(-each * length // asked), given, constants


def stages(query: Tensor, constants: dict[str, int]) -> int:
    """How many blocks of keys are in flight: 2 where that still fits (see TILE)."""
    return 2 if query.element_size() == 2 and constants["WIDTH"] <= 256 else 1


def fitting(size: int) -> int:
    """Rows of a tile: as many of `size` bytes as fit, a power of 2 from LEAST to MOST."""
    return max(min(1 << max(TILE // size, 1).bit_length() - 1, MOST), LEAST)


def power(size: int) -> int:
    """The least power of 2 that is no less, and LEAST at least."""
    return max(1 << (size - 1).bit_length(), LEAST)
