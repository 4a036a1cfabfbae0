"""What the denoising loop asks of a model: outputs for the places of a block, and what becomes of a rule's choice."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from pertoken.denoise.canvas import Canvas
from pertoken.denoise.rules import Guess


class CanvasModel(ABC):
    """Of the last forward: work `[row]`, positions computed times layers, whole `[row]`, layers computed at every
    position."""

    reads_decided = False  # whether `settle` looks at guesses for decided places
    work: Tensor
    whole: Tensor

    @abstractmethod
    def forward(self, canvas: Canvas, planned: Tensor) -> Tensor:
        """Compute the planned positions `[row, column]` and what they need; `[row, column]` of what was computed."""

    @abstractmethod
    def logits(self, places: Tensor) -> Tensor:
        """Logits `[row, place, vocabulary]` for the tokens at columns `places` `[row, place]` of the present block; all
        of it for a model that `reads_decided`."""

    @abstractmethod
    def logits_at(self, row: Tensor, column: Tensor) -> Tensor:
        """Logits `[position, vocabulary]` for the tokens at these rows and columns."""

    @abstractmethod
    def settle(self, canvas: Canvas, guess: Guess, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """What is final now, bool `[row, place]`, and its tokens `[row, place]`, given what the rule chose."""

    @abstractmethod
    def select(self, rows: Tensor) -> None:
        """Keep only these rows."""
