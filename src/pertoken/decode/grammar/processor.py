"""Grammars in transformers' own generation: a logits processor for ragged batches, beams and assisted generation.

The processor is given whole rows of ids each time, and rows may have moved (beams) or lost their ends (drafts that were
not accepted). It keeps one matcher per row with the ids that it has read, and brings the one with the longest common
beginning up to date: back by what differs, then on. The decoders of this package also ask it ahead of the model: which
tokens a text may go on with, and which one it must.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from pertoken.core.errors import BadRequest
from pertoken.decode.grammar.apply import forbid
from pertoken.decode.grammar.provider import TokenMask, new_bitmask


class GrammarProcessor(LogitsProcessor):
    """Keeps every row a beginning of a sentence. One object serves one call of `generate`.

    start: makes a matcher for a new text; size: tokens of the vocabulary, scores of ids beyond are forbidden. The text
    begins behind the ids of the first call (the prompt). A row that has left the grammar (a draft token that will be
    refused, padding behind a finished text) is left as it is.
    canonical: where the grammar leaves no choice of text, allow only the token with which the tokenizer itself would
    begin it. The model then cannot spell a forced text in pieces that it never saw in training, and decoders skip such
    tokens. Another constraint than without it, but the same for every decoder.
    """

    def __init__(self, start: Callable[[], TokenMask], size: int, canonical: bool = False):
        self.start, self.size, self.canonical = start, size, canonical
        self.prompt: int | None = None
        self.rows: list[tuple[list[int], TokenMask]] = []
        self.mask = new_bitmask(1, size)

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
        states = [None if lost or matcher.finished else matcher for matcher, lost in rows]
        for row, state in enumerate(states):
            if state is not None:
                self._apply(state, scores[row], f"row {row}, after {len(texts[row])} tokens")
        return scores

    def at(self, row: int, text: list[int]) -> TokenMask | None:
        """The state of a row whose output so far is `text`; None if it has left the grammar or ended."""
        matcher, lost = self._state(row, text)
        return None if lost or matcher.finished else matcher

    def forced(self, state: TokenMask) -> int | None:
        """The one token that may come next, if there is but one."""
        found = state.forced() if self.canonical else []
        return found[0] if found else state.only()

    def limit(self, states: Sequence[TokenMask | None], scores: Tensor) -> None:
        """Forbid in scores `[place, vocabulary]`, in place, what may not come next; None leaves a place as it is."""
        for place, state in enumerate(states):
            if state is not None and not state.finished:
                self._apply(state, scores[place], f"place {place}")

    def _apply(self, state: TokenMask, scores: Tensor, where: str) -> None:
        if self.canonical and (found := state.forced()):
            kept = scores[found[0]].clone()
            scores.fill_(-torch.inf)
            scores[found[0]] = kept
            return
        try:
            state.fill(self.mask, 0)
        except BadRequest as error:
            raise BadRequest(f"{where}: {error}") from error
        forbid(scores, self.mask[0], self.size)

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
