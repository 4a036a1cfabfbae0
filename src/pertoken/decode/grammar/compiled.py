"""Kernels are compiled by numba and kept on disk; without numba, calling one says what to install."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pertoken.core.errors import BadRequest

try:
    from numba import njit as _njit
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
