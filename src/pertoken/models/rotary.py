"""Rotary embedding taken out of a model's hands: keys cached as they are before it, and turned where they are read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pertoken.core.errors import BadRequest
from pertoken.core.rotation import rotated
from pertoken.models.adapter import Adapter


class Rotary:
    """The rotary embedding of one model. Raises `BadRequest` for a family without one."""

    def __init__(self, adapter: Adapter):
        self.adapter = adapter
        self.cos = self.sin = torch.empty(0, 0)
        if self._made(1) is None:
            raise BadRequest(
                f"{type(adapter.model).__name__} has learned positions, which cannot be taken off its keys; choose a "
                "policy, or a setting of it, that keeps original positions"
            )

    def _made(self, count: int) -> Any:
        adapter = self.adapter
        hidden = torch.empty(1, count, 1, dtype=adapter.dtype, device=adapter.device)
        return adapter.rotary(hidden, torch.arange(count, device=adapter.device)[None])

    def table(self, count: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines `[position, dim]` of the first `count` positions."""
        if len(self.cos) < count:
            cos, sin = self._made(max(count, 2 * len(self.cos)))
            self.cos, self.sin = cos[0], sin[0]
        return self.cos[:count], self.sin[:count]

    def turn(self, x: Tensor, positions: Tensor, count: int) -> Tensor:
        """`x` `[..., dim]` turned by `positions`, which broadcast to its leading axes and are below `count`."""
        cos, sin = (part.to(x.device) for part in self.table(max(count, 1)))
        return rotated(x, cos[positions], sin[positions])

    @staticmethod
    def unturned(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around an attention module's forward: it is given angles of 0."""
        cos, sin = kwargs["position_embeddings"] if "position_embeddings" in kwargs else args[1]
        still = (torch.ones_like(cos), torch.zeros_like(sin))
        if "position_embeddings" in kwargs:
            return forward(*args, **(kwargs | {"position_embeddings": still}))
        return forward(args[0], still, *args[2:], **kwargs)
