"""Grammars in transformers' own generation: a logits processor for ragged batches, beams and assisted generation.

The processor is given whole rows of ids each time, and rows may have moved (beams) or lost their ends (drafts that were
not accepted). It keeps one matcher per row with the ids that it has read, and brings the one with the longest common
beginning up to date: back by what differs, then on.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from pertoken.core.errors import BadRequest
from pertoken.decode.grammar.provider import TokenMask, bits, new_bitmask


class GrammarProcessor(LogitsProcessor):
    """Keeps every row a beginning of a sentence. One object serves one call of `generate`.

    start: makes a matcher for a new text; size: tokens of the vocabulary, scores of ids beyond are forbidden. The text
    begins behind the ids of the first call (the prompt). A row that has left the grammar (a draft token that will be
    refused, padding behind a finished text) is left as it is.
    """

    def __init__(self, start: Callable[[], TokenMask], size: int):
        self.start, self.size = start, size
        self.prompt: int | None = None
        self.rows: list[tuple[list[int], TokenMask]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        if self.prompt is None:
            self.prompt = input_ids.shape[1]
        if input_ids.shape[1] < self.prompt:
            raise BadRequest(
                f"this processor began with a prompt of {self.prompt} ids and is now given {input_ids.shape[1]}; make "
                "a new one for each call of generate"
            )
        texts = input_ids[:, self.prompt :].tolist()
        rows = [self._state(row, text) for row, text in enumerate(texts)]
        self.rows = [(text[: len(text) - lost], matcher) for text, (matcher, lost) in zip(texts, rows, strict=True)]
        masks = new_bitmask(len(rows), self.size)
        for row, (matcher, lost) in enumerate(rows):
            if lost or matcher.finished:
                masks[row] = -1
                continue
            try:
                matcher.fill(masks, row)
            except BadRequest as error:
                raise BadRequest(f"row {row}, after {len(texts[row])} tokens: {error}") from error
        allowed = torch.from_numpy(bits(masks, self.size)).to(scores.device)
        if scores.shape[-1] > self.size:
            allowed = torch.nn.functional.pad(allowed, (0, scores.shape[-1] - self.size))
        return scores.masked_fill_(~allowed, -torch.inf)

    def _state(self, row: int, text: list[int]) -> tuple[TokenMask, int]:
        """A matcher that has read `text` as far as the grammar allows, and how many of its ids it has not."""
        best, shared = None, -1
        order = [row, *range(len(self.rows))] if row < len(self.rows) else range(len(self.rows))
        for other in order:
            known = self.rows[other][0]
            common = _common(known, text)
            if common > shared:
                best, shared = other, common
            if common == len(text) or common == len(known) == len(text) - 1:
                break
        if best is None:
            matcher, shared = self.start(), 0
        else:
            known, matcher = self.rows[best]
            matcher = matcher.fork()
            matcher.rollback(len(known) - shared)
        for at in range(shared, len(text)):
            if not matcher.accept(text[at]):
                return matcher, len(text) - at
        return matcher, 0


def _common(one: list[int], other: list[int]) -> int:
    """How many ids two lists begin with in common."""
    least = min(len(one), len(other))
    if one[:least] == other[:least]:
        return least
    differ = np.flatnonzero(np.array(one[:least]) != np.array(other[:least]))
    return int(differ[0])
