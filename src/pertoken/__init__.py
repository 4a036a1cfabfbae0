"""Every token gets just what it needs: decide, record, replay, compose, price and draw computation per token.

Public names are imported when they are first used; importing the package does nothing else.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pertoken.core.attach import attach
    from pertoken.core.budget import Budget
    from pertoken.core.trace import Trace
    from pertoken.decode.del_ import DEL
    from pertoken.decode.dyspec import DySpec
    from pertoken.decode.lossless import lossless
    from pertoken.models.load import load

__version__ = "0.1.0"
__all__ = ["DEL", "Budget", "DySpec", "Trace", "attach", "load", "lossless"]

_HOMES = {
    "attach": "core.attach",
    "Budget": "core.budget",
    "Trace": "core.trace",
    "lossless": "decode.lossless",
    "DySpec": "decode.dyspec",
    "DEL": "decode.del_",
    "load": "models.load",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pertoken' has no attribute {name!r}; it offers {', '.join(sorted(_HOMES))}")
    value = getattr(import_module(f"pertoken.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
