"""A grammar and a vocabulary made ready for matching; shared by any number of matchers.

Nothing is computed before it is needed: a rule becomes an automaton when it is first called, a position is numbered
when it is first reached, its tokens are found when it is first asked for them, and the finished mask of every parse
is kept. What a rule without references does to a vocabulary is kept with the vocabulary, under the grammar's `keys`:
the mask of a JSON string is found once for all schemas.
"""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np

from pertoken.core.errors import BadRequest
from pertoken.decode.grammar import masks as kernels
from pertoken.decode.grammar.counts import alike
from pertoken.decode.grammar.ir import Grammar
from pertoken.decode.grammar.loading import add_rules, load, more_slots, share
from pertoken.decode.grammar.nfa import Builder, Nfa
from pertoken.decode.grammar.normal import normal
from pertoken.decode.grammar.tables import (
    AMBIGUOUS,
    DETAIL,
    ENDS,
    FAILED,
    MOST_ITEMS,
    NEEDS_ENTRY,
    NEEDS_RULE,
    NEEDS_SLOT,
    PARSE,
    PATH,
    REASON,
    Tables,
)
from pertoken.decode.grammar.vocabulary import Vocabulary

MOST_MASKS = 1 << 26  # bytes of finished masks; beyond, they are forgotten
MOST_PARSES = 1 << 18  # whose masks are known


class Engine:
    """Matches one grammar over one vocabulary. memory: bytes that its tables may take."""

    def __init__(self, grammar: Grammar, vocabulary: Vocabulary, memory: int = 1 << 28):
        self.grammar, self.vocabulary = grammar, vocabulary
        self.memory, self.trie = memory, vocabulary.block
        self.found = np.zeros(vocabulary.size, np.int32)
        self.matchers: weakref.WeakSet[Any] = weakref.WeakSet()
        self.pinned = False  # whether others than matchers hold numbers of parses
        self.normal = None if grammar.plain else normal(grammar)
        self._begin()

    def _begin(self) -> None:
        """Empty tables with the root rule in them."""
        grammar, vocabulary = self.grammar, self.vocabulary
        self.tables = Tables(self.memory)
        self.pool = np.zeros((4, vocabulary.words), np.int32)
        self.masks: dict[int, np.ndarray] = {}
        self.kept = 0
        self.forced: dict[int, list[int]] = {}
        self.single: dict[int, int | None] = {}
        self.base: list[int] = []
        if self.tables.view(PATH).size <= vocabulary.longest:
            self.tables.grow(PATH, vocabulary.longest + 1)
        nfas: list[Nfa] = []
        ranks: list[int] = []
        empty = False
        if self.normal is None:
            self.builder = Builder(dict(grammar.rules), {})
        else:
            self.builder, nfas, ranks, empty = self.normal
        add_rules(self, ranks)
        for rule, nfa in enumerate(nfas):
            load(self, rule, nfa)
        root = self.builder.numbers[grammar.root]
        if self.base[root] < 0:
            load(self, root, self.builder.build(self.builder.rules[grammar.root]))
        self.start = self.run(lambda block: kernels.first_parse(block, root, empty))

    def spare(self) -> None:
        """Free what no living matcher needs, if the tables have become large: they are begun anew, and the matchers
        read their texts again. To be called by matchers only, between two tokens."""
        if self.pinned or 2 * self.tables.bytes() <= self.memory:
            return
        self._begin()
        for matcher in list(self.matchers):
            matcher.read_again()
        if 2 * self.tables.bytes() > self.memory:
            self.pinned = True  # all of it is needed

    def read(self, parse: int, token: int) -> int:
        """Parse after a token, or -1."""
        return self.run(lambda block: kernels.read(block, self.trie, parse, token))

    def read_bytes(self, parse: int, data: bytes) -> tuple[int, int]:
        """Parse after bytes (or -1), and how many were read before that."""
        array, done = np.frombuffer(data, np.uint8), 0
        while True:
            after, count, parse = kernels.read_bytes(self.tables.block, array[done:], parse)
            done += count
            if after != FAILED:
                return int(after), done
            self._serve()

    def ends(self, parse: int) -> bool:
        """Whether a sentence may end here."""
        return bool(self.tables.view(PARSE)[5 * parse + 2] & ENDS)

    def mask(self, parse: int) -> np.ndarray:
        """int32 `[word]`: bitmask of the tokens that may come next, ends of text included. Not to be changed."""
        mask = self.masks.get(parse)
        if mask is None and self.builder.counted:
            if len(self.masks) > MOST_PARSES:
                self.masks.clear()
            same = self.run(lambda block: alike(block, parse, self.vocabulary.longest))
            if same != parse:
                mask = self.masks[parse] = self.mask(same)
        if mask is None:
            mask = np.empty(self.vocabulary.words, np.int32)
            self.run(lambda block: kernels.fill(block, self.trie, self.pool, parse, mask, self.found))
            if self.ends(parse):
                for end in self.vocabulary.ends:
                    mask[end >> 5] |= np.int32(np.uint32(1 << (end & 31)).view(np.int32))
            if not mask.any():
                raise BadRequest(
                    "no token of the vocabulary may come next: it cannot spell what the grammar asks for here (or no "
                    "id ends a text). Give a vocabulary with single bytes, its ends, or another grammar"
                )
            self.kept += mask.nbytes
            if self.kept > MOST_MASKS:
                self.masks.clear()
                self.kept = mask.nbytes
            self.masks[parse] = mask
        return mask

    def only_token(self, parse: int) -> int | None:
        """The token that must come next, an end of text included, or None if there is a choice."""
        if parse not in self.single:
            mask = self.mask(parse)
            words = np.flatnonzero(mask)
            word = int(mask[words[0]]) & 0xFFFFFFFF if len(words) == 1 else 0
            self.single[parse] = None if word & (word - 1) or not word else int(words[0]) * 32 + word.bit_length() - 1
        return self.single[parse]

    def only_byte(self, parse: int) -> int:
        """The byte that must come next, or -1 if there is a choice."""
        return self.run(lambda block: kernels.only_byte(block, parse))

    def forced_bytes(self, parse: int, most: int = 4096) -> tuple[bytes, int]:
        """What must come next, as long as there is no choice, and the parse after it."""
        found = bytearray()
        while len(found) < most and (byte := self.only_byte(parse)) >= 0:
            found.append(byte)
            parse, _ = self.read_bytes(parse, bytes([byte]))
        return bytes(found), parse

    def may_grow(self, data: bytes, parse: int) -> bool:
        """Whether a token spells all of `data` and more, and the grammar allows its first byte behind `data`."""
        node, last = 0, int(self.trie[6])
        heads, afters = self.trie[self.trie[0] :], self.trie[self.trie[1] :]
        for byte in data:
            while node < last and heads[node] & 255 != byte:
                node = int(afters[node])
            if node >= last:
                return False
            node, last = node + 1, int(afters[node])
        while node < last:
            if self.read_bytes(parse, bytes([heads[node] & 255]))[0] >= 0:
                return True
            node = int(afters[node])
        return False

    def run(self, kernel: Any) -> int:
        """Call a kernel until it has what it needs."""
        while True:
            result = kernel(self.tables.block)
            if result != FAILED:
                return int(result)
            self._serve()

    def _serve(self) -> None:
        """Give a kernel what it stopped for."""
        reason, detail = int(self.tables.block[REASON]), int(self.tables.block[DETAIL])
        if reason == NEEDS_RULE:
            load(self, detail, self.builder.build(self.builder.rules[self.builder.names[detail]]))
        elif reason == NEEDS_ENTRY:
            share(self, detail)
        elif reason == NEEDS_SLOT:
            more_slots(self)
        elif reason == AMBIGUOUS:
            raise BadRequest(
                f"the grammar reads this text in more than {MOST_ITEMS} ways at once; make it less ambiguous (one rule "
                "per meaning, lists as repetitions)"
            )
        else:
            self.tables.grow(reason)
