"""A grammar on a canvas that is filled in any order: it can always still be completed into a sentence.

Decided positions hold a token, undecided ones may get any. With F_i the states (parses) that the text can be in before
position i, and B_i those of them from which the rest of the canvas can be completed,

    F_0 = {start},   F_{i+1} = union over s in F_i of move(s, t) for the token t at i, or for every token if undecided,
    B_N = those of F_N in which a sentence may end,   B_i = those of F_i with a move into B_{i+1},

a token may be put at an undecided position i alone if and only if it moves a state of B_i into B_{i+1}. From an end of
text on, all positions hold ends of text or padding. Several positions may be decided together if the canvas with all of
them has a completion; of those that a rule has chosen, the most confident ones are kept one by one while that is so.

The sets are finite where nesting is bounded by the canvas, but may be large: of more than `states` states, those that
were met first are kept. Every completion that is found is one, so the promise holds; some are then not found, and their
tokens not allowed. Which states are kept does not depend on how many there are otherwise, so that a token which is
allowed alone stays possible once it is decided.

It loses where sentences are far shorter or longer than the canvas, and time on grammars of many states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pertoken.core.errors import BadRequest
from pertoken.denoise.canvas import Canvas
from pertoken.denoise.rules import Constraint, Guess
from pertoken.denoise.settings import Settings

ENDED = -1
States = frozenset[int]
MOST_KNOWN = 50_000


class Language(Protocol):
    """What is asked of a grammar: states as numbers >= 0. size: of the vocabulary; ends: ids that end a text."""

    start: int
    size: int
    ends: tuple[int, ...]

    def complete(self, state: int) -> bool: ...

    def read(self, state: int, token: int) -> int: ...

    def after(self, state: int) -> tuple[np.ndarray, np.ndarray]: ...


@dataclass(frozen=True)
class GrammarCanvas(Constraint):
    """The text on the canvas, up to its first end of text, can be completed into a sentence of `language`."""

    language: Language
    states: int = 1024
    _search: Any = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.states < 1:
            raise BadRequest(f"states={self.states} keeps nothing; give at least 1")

    def fitted(self, settings: Settings) -> GrammarCanvas:
        vocabulary = settings.adapter.vocabulary
        if self.language.size > vocabulary:
            raise BadRequest(
                f"the grammar's vocabulary has {self.language.size} tokens, the model {vocabulary}; make it from the "
                "model's own tokenizer"
            )
        if not self.language.ends:
            raise BadRequest("the grammar's vocabulary has no id that ends a text; a canvas is filled up with it")
        return GrammarCanvas(self.language, self.states, Search(self.language, self.states, settings.pad))

    def limit(self, scores: Tensor, canvas: Canvas, places: Tensor) -> Tensor:
        width = scores.shape[-1]
        allowed = np.zeros((*places.shape, width), bool)
        for row in range(canvas.rows):
            tokens = _tokens(canvas, row)
            masks = self._search.masks(tokens)
            if masks is None:
                raise BadRequest(
                    f"no sentence of the grammar fits a canvas of {len(tokens)} tokens for row {canvas.numbers[row]}; "
                    "give a longer one (max_new_tokens), another grammar, or more states"
                )
            for place, column in enumerate(places[row].tolist()):
                index = column - canvas.start
                if tokens[index] is None:
                    bits = np.unpackbits(masks[index].view(np.uint8), bitorder="little")[: self.language.size]
                    allowed[row, place, : self.language.size] = bits
                else:
                    allowed[row, place] = True
        return scores.masked_fill(~torch.from_numpy(allowed).to(scores.device), -torch.inf)

    def admit(self, chosen: Tensor, guess: Guess, canvas: Canvas) -> Tensor:
        admitted = chosen.clone()
        for row in range(canvas.rows):
            tokens, columns = _tokens(canvas, row), (canvas.block_columns[row] - canvas.start).tolist()
            places = chosen[row].nonzero().flatten().tolist()
            wanted = {place: int(guess.tokens[row, place]) for place in places}
            together = list(tokens)
            for place, token in wanted.items():
                together[columns[place]] = token
            if self._search.possible(together):
                continue
            for place in sorted(places, key=lambda place: -float(guess.confidence[row, place])):
                trial = list(tokens)
                trial[columns[place]] = wanted[place]
                if self._search.possible(trial):
                    tokens = trial
                else:
                    admitted[row, place] = False
        return admitted


def _tokens(canvas: Canvas, row: int) -> list[int | None]:
    """What is decided of a row's canvas, None where nothing is, as far as the row goes."""
    ids, masked = canvas.ids[row, canvas.start :].tolist(), canvas.masked[row, canvas.start :].tolist()
    length = int(canvas.valid[row, canvas.start :].sum())
    return [None if open_ else token for token, open_ in zip(ids[:length], masked[:length], strict=True)]


class Search:
    """The sets F and B of canvases, with every step of theirs remembered."""

    def __init__(self, language: Language, most: int, pad: int | None = None):
        self.language, self.most = language, most
        self.fillers = {*language.ends, pad}
        self.ends = np.zeros((language.size + 31) // 32, np.int32)
        for end in language.ends:
            self.ends[end >> 5] |= np.int32(np.uint32(1 << (end & 31)).view(np.int32))
        self.steps: dict[tuple[States, int | None], States] = {}
        self.backs: dict[tuple[States, int | None, States], States] = {}
        self.allowed: dict[tuple[States, States], np.ndarray] = {}

    def possible(self, tokens: Sequence[int | None]) -> bool:
        """Whether a canvas can be completed."""
        return bool(self._final(self._forward(tokens)[-1]))

    def masks(self, tokens: Sequence[int | None]) -> dict[int, np.ndarray] | None:
        """For each undecided position the bitmask `[word]` of tokens that leave a completion; None if there is none."""
        before = self._forward(tokens)
        after = self._final(before[-1])
        found: dict[int, np.ndarray] = {}
        for i in reversed(range(len(tokens))):
            here = self._back(before[i], tokens[i], after)
            if tokens[i] is None:
                found[i] = self._mask(here, after)
            after = here
        return found if after else None

    def _forward(self, tokens: Sequence[int | None]) -> list[States]:
        found = [frozenset({self.language.start})]
        for token in tokens:
            found.append(self._step(found[-1], token))
        return found

    def _final(self, states: States) -> States:
        return frozenset(s for s in states if s == ENDED or self.language.complete(s))

    def _moves(self, state: int, token: int | None) -> list[int]:
        """States after a token, or after any."""
        language = self.language
        if token is None:
            if state == ENDED:
                return [ENDED]
            targets = language.after(state)[0].tolist()
            return [*targets, ENDED] if language.complete(state) else targets
        if state == ENDED:
            return [ENDED] if token in self.fillers else []
        if token in language.ends:
            return [ENDED] if language.complete(state) else []
        after = language.read(state, token)
        return [after] if after >= 0 else []

    def _step(self, states: States, token: int | None) -> States:
        key = (states, token)
        if key not in self.steps:
            found = sorted({after for state in states for after in self._moves(state, token)})
            self._room(self.steps)[key] = frozenset(found[: self.most])
        return self.steps[key]

    def _back(self, states: States, token: int | None, after: States) -> States:
        key = (states, token, after)
        if key not in self.backs:
            self._room(self.backs)[key] = frozenset(
                state for state in states if not after.isdisjoint(self._moves(state, token))
            )
        return self.backs[key]

    def _mask(self, states: States, after: States) -> np.ndarray:
        key = (states, after)
        if key not in self.allowed:
            parts = [self.ends] if ENDED in after else []
            for state in states - {ENDED}:
                targets, masks = self.language.after(state)
                parts += [masks[move] for move, target in enumerate(targets.tolist()) if target in after]
            self._room(self.allowed)[key] = reduce(np.bitwise_or, parts, np.zeros_like(self.ends))
        return self.allowed[key]

    @staticmethod
    def _room(known: dict[Any, Any]) -> dict[Any, Any]:
        if len(known) >= MOST_KNOWN:
            known.clear()
        return known
