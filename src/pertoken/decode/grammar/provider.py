"""`TokenMask`: the one interface behind which grammar engines stand, and masks applied to logits.

A bitmask is int32 `[row, word]` with `word = ceil(vocabulary / 32)`; bit i % 32 of word i // 32 says whether token i
may come next (the layout of llguidance and xgrammar too).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np


class TokenMask(ABC):
    """One text under a grammar: what it may go on with."""

    @abstractmethod
    def accept(self, token: int) -> bool:
        """Read a token. False, and nothing is changed, if it may not come here. An end of text ends the text; nothing
        may come after."""

    @abstractmethod
    def rollback(self, count: int) -> None:
        """Take back the last `count` accepted tokens."""

    @abstractmethod
    def fork(self) -> TokenMask:
        """An independent copy."""

    @abstractmethod
    def fill(self, bitmask: Any, row: int = 0) -> None:
        """Write the mask of what may come next into a row of `bitmask` (numpy or torch, on the CPU). Raises
        `BadRequest` if no token may: the vocabulary cannot spell what the grammar asks for."""

    @abstractmethod
    def forced(self) -> list[int]:
        """Tokens that must come next, in the tokenizer's own tokenisation; empty if there is a choice. Not accepted
        yet."""

    @abstractmethod
    def only(self) -> int | None:
        """The token that must come next, if the mask allows but one."""

    def after(self, token: int) -> TokenMask | None:
        """A copy that has read a token; None if it may not come here."""
        twin = self.fork()
        return twin if twin.accept(token) else None

    @property
    @abstractmethod
    def finished(self) -> bool:
        """Whether the text has ended by an end of text."""

    @property
    @abstractmethod
    def complete(self) -> bool:
        """Whether the text is a sentence of the grammar, so that it may end here."""


def new_bitmask(rows: int, size: int) -> np.ndarray:
    """int32 `[row, word]`, nothing allowed."""
    return np.zeros((rows, (size + 31) // 32), np.int32)


def bits(mask: np.ndarray, size: int) -> np.ndarray:
    """bool `[..., token]` of a bitmask `[..., word]`."""
    return np.unpackbits(np.ascontiguousarray(mask).view(np.uint8), axis=-1, bitorder="little")[..., :size].astype(bool)
