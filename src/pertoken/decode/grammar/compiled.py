"""Kernels are compiled by numba and kept on disk; without numba, calling one says what to install."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pertoken.core.errors import BadRequest

try:
    from numba import carray, types
    from numba import njit as _njit
    from numba.extending import intrinsic
except ImportError:
    _njit = None


def kernel(function: Callable[..., Any]) -> Any:
    """Compile a function when it is first called."""
    if _njit is not None:
        return _njit(cache=True)(function)

    def missing(*_: Any) -> Any:
        raise BadRequest(
            "the grammar engine is compiled by numba, which is not installed; "
            "install it with pip install 'pertoken[grammar]'"
        )

    return missing


def _reader() -> Any:
    """What gives a kernel the int32 array at an address. It gets a number sooner than an array."""
    if _njit is None:
        return None

    @intrinsic
    def pointer(context: Any, address: Any) -> Any:
        kind = types.CPointer(types.int32)

        def cast(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(kind))

        return kind(address), cast

    read: Any = pointer

    @_njit
    def numbers_at(address: int) -> Any:
        return carray(read(address), 1 << 40)

    return numbers_at


numbers_at: Any = _reader()
