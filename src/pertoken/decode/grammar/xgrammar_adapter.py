"""xgrammar (Apache-2.0) behind `TokenMask`; needs `pip install xgrammar`."""

from __future__ import annotations

from typing import Any

import numpy as np

from pertoken.core.errors import BadRequest
from pertoken.decode.grammar.provider import TokenMask, bits, new_bitmask
from pertoken.decode.grammar.vocabulary import Vocabulary


def compiler_of(vocabulary: Vocabulary, threads: int = 1) -> Any:
    """xgrammar's compiler for a vocabulary; make it once and share it."""
    try:
        from xgrammar import GrammarCompiler, TokenizerInfo
    except ImportError as error:
        raise BadRequest("xgrammar is not installed; install it with pip install 'pertoken[grammar]'") from error
    if not vocabulary.ends:
        raise BadRequest("xgrammar needs an id that ends a text; give the vocabulary its ends")
    tokens = [vocabulary.spells(i) for i in range(vocabulary.size)]
    info = TokenizerInfo(tokens, vocab_size=vocabulary.size, stop_token_ids=list(vocabulary.ends))
    return GrammarCompiler(info, max_threads=threads)


class XGrammarMask(TokenMask):
    """A text under a grammar that `compiler_of(...)` compiled (`compile_json_schema`, `compile_grammar`, ...)."""

    def __init__(self, compiled: Any, vocabulary: Vocabulary):
        from xgrammar import GrammarMatcher

        self.vocabulary, self.inner = vocabulary, GrammarMatcher(compiled)

    def accept(self, token: int) -> bool:
        if self.finished or not 0 <= token < self.vocabulary.size:
            return False
        if token not in self.vocabulary.ends and not self.vocabulary.spells(token):
            return False
        return bool(self.inner.accept_token(token))

    def rollback(self, count: int) -> None:
        if count == 0:
            return
        try:
            self.inner.rollback(count)
        except Exception as error:  # its own exception classes have no common base
            raise BadRequest(f"xgrammar cannot take back {count} tokens: {error}") from error

    def fork(self) -> XGrammarMask:
        twin = object.__new__(XGrammarMask)
        twin.inner, twin.vocabulary = self.inner.fork(), self.vocabulary
        return twin

    def fill(self, bitmask: Any, row: int = 0) -> None:
        mask = bitmask if isinstance(bitmask, np.ndarray) else bitmask.numpy()
        if self.finished:
            mask[row] = 0
            return
        mask[row] = -1
        if self.inner.fill_next_token_bitmask(mask, row) and not mask[row].any():
            raise BadRequest("xgrammar finds no token that may come next: a dead end")
        if rest := self.vocabulary.size % 32:
            mask[row, -1] &= np.int32((1 << rest) - 1)

    def forced(self) -> list[int]:
        """The forced text in the tokenizer's own tokenisation, less its last token, which what follows might make
        longer."""
        if self.finished or self.vocabulary.encode is None:
            return []
        return self.vocabulary.encode(self.inner.find_jump_forward_string())[:-1]

    def only(self) -> int | None:
        if self.finished:
            return None
        mask = new_bitmask(1, self.vocabulary.size)
        self.fill(mask)
        allowed = np.flatnonzero(bits(mask[0], self.vocabulary.size))
        return int(allowed[0]) if len(allowed) == 1 else None

    @property
    def finished(self) -> bool:
        return bool(self.inner.is_terminated())

    @property
    def complete(self) -> bool:
        return bool(self.inner.is_completed())
