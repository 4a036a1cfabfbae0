"""Looking on while layers run: for refresh rules that decide in mid-forward.

`DiffusionModel` runs the planned positions in groups of layers and shows each group to the watch, which may have rows
*widened*: from a layer of its choice on, that row is computed at every position. What enters that layer at positions
that were not planned is their input as last computed, which is kept for this. Layers that ran narrow above it are run
again, so that the result does not depend on the size of the groups.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from torch import Tensor

from pertoken.denoise.canvas import Canvas

if TYPE_CHECKING:
    from pertoken.denoise.model import DiffusionModel


class Watch(ABC):
    """Made for one call by `RefreshRule.watch`; may keep state per row of the canvas."""

    @abstractmethod
    def wanted(self, canvas: Canvas) -> Tensor:
        """bool `[row, column]`: positions to compute beside the planned ones, without those that predict them."""

    @abstractmethod
    def group(self, model: DiffusionModel, canvas: Canvas) -> int:
        """How many layers run before the watch is shown them."""

    @abstractmethod
    def before(self, model: DiffusionModel, canvas: Canvas, first: int, last: int) -> None:
        """Layers `first..last` (exclusive) are about to overwrite queries, keys and values of some positions."""

    @abstractmethod
    def after(self, model: DiffusionModel, canvas: Canvas, first: int, last: int) -> Tensor:
        """`[row]`: the layer from which on the row is computed at every position, the depth of the model for none.

        Not asked in a forward that computes everything anyway.
        """

    @abstractmethod
    def finish(self, model: DiffusionModel, canvas: Canvas) -> None:
        """The forward is complete, nothing is committed yet."""

    @abstractmethod
    def select(self, rows: Tensor) -> None:
        """Keep only these rows."""
