"""Pertoken's own `TokenMask`: a list of parses, one per accepted token."""

from __future__ import annotations

from typing import Any

import numpy as np

from pertoken.core.errors import BadRequest
from pertoken.decode.grammar.engine import Engine
from pertoken.decode.grammar.provider import TokenMask


class Matcher(TokenMask):
    """A text under an engine's grammar. Forking copies the list; going back shortens it."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.parses = [engine.start]
        self.tokens: list[int] = []
        self.ended = False
        engine.matchers.add(self)

    def accept(self, token: int) -> bool:
        engine = self.engine
        if self.ended or not 0 <= token < engine.vocabulary.size:
            return False
        if token in engine.vocabulary.ends:
            if not engine.ends(self.parses[-1]):
                return False
            self.parses.append(self.parses[-1])
            self.tokens.append(token)
            self.ended = True
            return True
        if not engine.vocabulary.spells(token):
            return False
        engine.spare()
        after = engine.read(self.parses[-1], token)
        if after < 0:
            return False
        self.parses.append(after)
        self.tokens.append(token)
        return True

    def read_again(self) -> None:
        """Read the text anew: the engine has forgotten its parses."""
        tokens, self.tokens, self.parses, self.ended = self.tokens, [], [self.engine.start], False
        for token in tokens:
            if token in self.engine.vocabulary.ends:
                self.parses.append(self.parses[-1])
                self.ended = True
            else:
                self.parses.append(self.engine.read(self.parses[-1], token))
        self.tokens = tokens

    def rollback(self, count: int) -> None:
        if not 0 <= count < len(self.parses):
            raise BadRequest(f"rollback({count}) after {len(self.parses) - 1} accepted tokens; give at most that many")
        if count:
            del self.parses[-count:], self.tokens[-count:]
            self.ended = False

    def fork(self) -> Matcher:
        twin = Matcher(self.engine)
        twin.parses, twin.tokens, twin.ended = self.parses.copy(), self.tokens.copy(), self.ended
        return twin

    def fill(self, bitmask: Any, row: int = 0) -> None:
        if self.ended:
            bitmask[row] = 0
        else:
            self.engine.fill(self.parses[-1], bitmask, row)

    @property
    def mask(self) -> np.ndarray:
        """int32 `[word]`."""
        if self.ended:
            return np.zeros(self.engine.vocabulary.words, np.int32)
        return self.engine.mask(self.parses[-1])

    @property
    def finished(self) -> bool:
        return self.ended

    @property
    def complete(self) -> bool:
        return self.engine.ends(self.parses[-1])

    def forced(self) -> list[int]:
        """The forced text in the tokenizer's own tokenisation, less the last tokens that the text after it could still
        make longer: where `order` is forced and `orderId` is a token too, `order` is not given. Without a tokenizer
        (`encode`), the token of a mask that allows only one."""
        engine, vocabulary = self.engine, self.engine.vocabulary
        if self.ended:
            return []
        if vocabulary.encode is None:
            single = self.only()
            return [] if single is None else [single]
        found = engine.forced.get(self.parses[-1])
        if found is None:
            data, parse = engine.forced_bytes(self.parses[-1])
            found = engine.forced[self.parses[-1]] = canonical(engine, data, parse)
        return found.copy()

    def only(self) -> int | None:
        if self.ended:
            return None
        return self.engine.only_token(self.parses[-1])


def canonical(engine: Engine, data: bytes, parse: int) -> list[int]:
    """Ids of forced bytes `data`, up to where they are certain whatever comes after them (from `parse` on)."""
    vocabulary = engine.vocabulary
    if not data or vocabulary.encode is None:
        return []
    found, at = [], 0
    for token in vocabulary.encode(data.decode("utf-8", "ignore")):
        spelled = vocabulary.spells(token)
        if not spelled or data[at : at + len(spelled)] != spelled or engine.may_grow(data[at:], parse):
            break
        found.append(token)
        at += len(spelled)
    return found
