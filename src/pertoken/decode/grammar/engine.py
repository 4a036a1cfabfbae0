"""A grammar and a vocabulary made ready for matching; shared by any number of matchers.

Nothing is computed before it is needed: a rule becomes an automaton when it is first called, a position is numbered
when it is first reached, its tokens are found when it is first asked for them, and the finished mask of every parse
is kept. What a rule without references does to a vocabulary is kept with the vocabulary (see `sharing`): the mask of a
JSON string is found once for all schemas.
"""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np

from pertoken.core.errors import BadRequest
from pertoken.decode.grammar import masks as kernels
from pertoken.decode.grammar.ir import Grammar
from pertoken.decode.grammar.loading import load, make_room
from pertoken.decode.grammar.nfa import Builder, Nfa
from pertoken.decode.grammar.normal import normal
from pertoken.decode.grammar.sharing import share_repeat, share_split
from pertoken.decode.grammar.tables import (
    ABOUT,
    AMBIGUOUS,
    DEAD,
    DETAIL,
    ENDS,
    FAILED,
    MASK,
    MOST_ITEMS,
    NEEDS_REPEAT,
    NEEDS_RULE,
    NEEDS_SPLIT,
    PARSE,
    PATH,
    REASON,
    SPLIT,
    Tables,
)
from pertoken.decode.grammar.trie import FIRSTS, HEADS, child, only_bit
from pertoken.decode.grammar.vocabulary import Vocabulary


class Engine:
    """Matches one grammar over one vocabulary. memory: bytes that its tables may take."""

    def __init__(self, grammar: Grammar, vocabulary: Vocabulary, memory: int = 1 << 28):
        self.grammar, self.vocabulary, self.memory = grammar, vocabulary, memory
        self.matchers: weakref.WeakSet[Any] = weakref.WeakSet()
        self.pinned = False  # whether others than matchers hold numbers of parses
        self.normal = None if grammar.plain else normal(grammar)
        self._begin()

    def _begin(self) -> None:
        """Empty tables with the root rule in them."""
        grammar, vocabulary = self.grammar, self.vocabulary
        self.tables = Tables(self.memory)
        self.tables.hold(PATH, 4 * (vocabulary.longest + 4))
        self.target: tuple[Any, int, int, int] = (None, 0, 0, 0)  # the bitmask last written to, and where it is
        self.forgot: int | None = None  # table whose entries were forgotten to find the mask that is asked for
        self.forced: dict[int, list[int]] = {}
        self.single: dict[int, int | None] = {}
        nfas: list[Nfa] = []
        self.ranks: list[int] = []
        empty = False
        if self.normal is None:
            self.builder = Builder(dict(grammar.rules), {}, grammar.known)
        else:
            self.builder, nfas, self.ranks, empty = self.normal
        for rule, nfa in enumerate(nfas):
            load(self, rule, nfa)
        root = self.builder.numbers[grammar.root]
        if not nfas:
            load(self, root, self.builder.rule(root))
        self.start = self.run(lambda block: kernels.first_parse(block, root, empty))

    def spare(self) -> None:
        """Free what no living matcher needs, if the tables have become large: they are begun anew, and the matchers
        read their texts again. To be called by matchers only, between two tokens."""
        if self.pinned or 2 * self.tables.block.nbytes <= self.memory:
            return
        self._begin()
        for matcher in list(self.matchers):
            matcher.read_again()
        if 2 * self.tables.block.nbytes > self.memory:
            self.pinned = True  # all of it is needed

    def read(self, parse: int, token: int) -> int:
        """Parse after a token, or -1."""
        return self.run(lambda block: kernels.read(block, self.vocabulary.block, parse, token))

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
        block = self.tables.block
        return bool(block[block[PARSE] + 6 * parse + 2] & ENDS)

    def fill(self, parse: int, bitmask: Any, row: int) -> None:
        """Write which tokens may come next, ends of text included, into a row of an int32 bitmask `[row, word]`, a
        numpy array or a torch tensor on the CPU."""
        known, address, rows, stride = self.target
        if bitmask is not known:
            address, rows, stride = self._look_at(bitmask)
        if not 0 <= row < rows:
            raise BadRequest(f"row {row} is none of the {rows} rows of the bitmask; give one of 0 to {rows - 1}")
        address += row * stride
        tables, vocabulary = self.tables, self.vocabulary
        found = kernels.fill(tables.address, vocabulary.address, parse, address)
        if found:
            self.forgot = None
            while found == FAILED:
                self._serve()
                found = kernels.fill(self.tables.address, vocabulary.address, parse, address)
            if found == DEAD:
                raise BadRequest(
                    "no token of the vocabulary may come next: it cannot spell what the grammar asks for here (or no "
                    "id ends a text). Give a vocabulary with single bytes, its ends, or another grammar"
                )

    def _look_at(self, bitmask: Any) -> tuple[int, int, int]:
        """Address of a bitmask, how many rows it has, and bytes from row to row; kept for the next mask."""
        array, words = bitmask if isinstance(bitmask, np.ndarray) else bitmask.numpy(), self.vocabulary.words
        fits = array.ndim == 2 and array.shape[1] == words and array.strides[1] == 4
        if not fits or array.dtype != np.int32 or not array.flags.writeable:
            raise BadRequest(
                f"a bitmask {list(array.shape)} of {array.dtype} cannot hold masks of this vocabulary; give an int32 "
                f"one of {words} words a row that can be written, such as new_bitmask(rows, {self.vocabulary.size})"
            )
        found = (array.ctypes.data, array.shape[0], array.strides[0])
        if array is bitmask:  # a tensor may get other memory
            self.target = (bitmask, *found)
        return found

    def mask(self, parse: int) -> np.ndarray:
        """int32 `[word]`: bitmask of the tokens that may come next, ends of text included."""
        mask = np.empty((1, self.vocabulary.words), np.int32)
        self.fill(parse, mask, 0)
        return mask[0]

    def only_token(self, parse: int) -> int | None:
        """The token that must come next, an end of text included, or None if there is a choice."""
        if parse not in self.single:
            token = only_bit(self.mask(parse))
            self.single[parse] = None if token < 0 else int(token)
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
        trie, node = self.vocabulary.block, 0
        heads, firsts = int(trie[HEADS]), int(trie[FIRSTS])
        for byte in data:
            node = int(child(trie, int(trie[firsts + node]), int(trie[firsts + node + 1]), byte))
            if node < 0:
                return False
        below = trie[heads + trie[firsts + node] : heads + trie[firsts + node + 1]] & 255
        return any(self.read_bytes(parse, bytes([byte]))[0] >= 0 for byte in below.tolist())

    def bytes(self) -> int:
        """Memory that it takes, besides its grammar and its vocabulary."""
        return self.tables.bytes()

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
            load(self, detail, self.builder.rule(detail))
        elif reason == NEEDS_SPLIT:
            share_split(self, detail)
        elif reason == NEEDS_REPEAT:
            share_repeat(self, detail, int(self.tables.block[ABOUT]))
        elif reason in (SPLIT, MASK):
            make_room(self, reason, self.forgot == reason)
            self.forgot = reason
        elif reason == AMBIGUOUS:
            raise BadRequest(
                f"the grammar reads this text in more than {MOST_ITEMS} ways at once; make it less ambiguous (one rule "
                "per meaning, lists as repetitions)"
            )
        else:
            self.tables.grow(reason)
