"""llguidance (MIT) behind `TokenMask`; needs `pip install llguidance`."""

from __future__ import annotations

from typing import Any

import numpy as np

from pertoken.core.errors import BadRequest
from pertoken.decode.grammar.provider import TokenMask, bits, new_bitmask
from pertoken.decode.grammar.vocabulary import Vocabulary


def tokenizer_of(vocabulary: Vocabulary) -> Any:
    """llguidance's tokenizer for a vocabulary; make it once and share it."""
    try:
        from llguidance import LLTokenizer, TokenizerWrapper
    except ImportError as error:
        raise BadRequest("llguidance is not installed; install it with pip install 'pertoken[grammar]'") from error
    if not vocabulary.ends:
        raise BadRequest("llguidance needs an id that ends a text; give the vocabulary its ends")

    class Plain:
        def __init__(self) -> None:
            size = vocabulary.size
            self.eos_token_id, self.bos_token_id = vocabulary.ends[0], None
            self.tokens = [vocabulary.spells(i) or f"\xff<{i}>".encode("latin-1") for i in range(size)]
            self.special_token_ids = [i for i in range(size) if not vocabulary.spells(i)]

        def __call__(self, text: Any) -> list[int]:
            text = text.decode("utf-8", "ignore") if isinstance(text, bytes) else text
            return vocabulary.encode(text) if vocabulary.encode is not None else []

    return LLTokenizer(TokenizerWrapper(Plain()), n_vocab=vocabulary.size, eos_token=list(vocabulary.ends))


class LLGuidance(TokenMask):
    """A text under a grammar of llguidance (see `LLMatcher.grammar_from_json_schema`, `..._lark`, `..._regex`)."""

    def __init__(self, tokenizer: Any, grammar: str, vocabulary: Vocabulary):
        from llguidance import LLMatcher

        self.vocabulary, self.ended = vocabulary, False
        self.inner = LLMatcher(tokenizer, grammar)
        if self.inner.is_error():
            raise BadRequest(f"llguidance refuses the grammar: {self.inner.get_error()}")

    def accept(self, token: int) -> bool:
        if self.ended or self.inner.validate_tokens([token]) != 1:
            return False
        self.inner.consume_token(token)
        self.ended = token in self.vocabulary.ends
        return True

    def rollback(self, count: int) -> None:
        if not self.inner.rollback(count):
            raise BadRequest(f"llguidance cannot take back {count} tokens: {self.inner.get_error()}")
        self.ended = self.ended and count == 0

    def fork(self) -> LLGuidance:
        twin = object.__new__(LLGuidance)
        twin.inner, twin.vocabulary, twin.ended = self.inner.deep_copy(), self.vocabulary, self.ended
        return twin

    def fill(self, bitmask: Any, row: int = 0) -> None:
        from llguidance.numpy import fill_next_token_bitmask

        mask = bitmask if isinstance(bitmask, np.ndarray) else bitmask.numpy()
        if self.ended:
            mask[row] = 0
            return
        fill_next_token_bitmask(self.inner, mask, row)
        if not mask[row].any():
            raise BadRequest(f"llguidance finds no token that may come next: {self.inner.get_error() or 'a dead end'}")

    def forced(self) -> list[int]:
        return [] if self.ended else list(self.inner.compute_ff_tokens())

    def only(self) -> int | None:
        if self.ended:
            return None
        mask = new_bitmask(1, self.vocabulary.size)
        self.fill(mask)
        allowed = np.flatnonzero(bits(mask[0], self.vocabulary.size))
        return int(allowed[0]) if len(allowed) == 1 else None

    @property
    def finished(self) -> bool:
        return self.ended

    @property
    def complete(self) -> bool:
        return bool(self.ended or self.inner.is_accepting())
