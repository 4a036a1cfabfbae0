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
from pertoken.decode.grammar.ir import Grammar
from pertoken.decode.grammar.nfa import EPSILON, Builder, Nfa
from pertoken.decode.grammar.normal import normal
from pertoken.decode.grammar.positions import intern_place
from pertoken.decode.grammar.tables import (
    AMBIGUOUS,
    CALLING,
    COUNTED,
    DETAIL,
    EDGE,
    ENDS,
    ENTRY,
    EXITS,
    FAILED,
    FINAL,
    FOUND,
    MOST_ITEMS,
    NEEDS_ENTRY,
    NEEDS_RULE,
    NEEDS_SLOT,
    PARSE,
    PATH,
    PLACE,
    READS,
    REASON,
    RULE,
    SET,
    SLOTS,
    STATE,
    TOKENS,
    USED,
    WORK,
    Tables,
)
from pertoken.decode.grammar.vocabulary import Vocabulary

MOST_MASKS = 1 << 26  # bytes of finished masks, and again of bitmasks of positions; beyond, they are forgotten


class Engine:
    """Matches one grammar over one vocabulary. memory: bytes that its tables may take."""

    def __init__(self, grammar: Grammar, vocabulary: Vocabulary, memory: int = 1 << 28):
        self.grammar, self.vocabulary = grammar, vocabulary
        self.tables = Tables(memory)
        self.trie = vocabulary.block
        self.pool = np.zeros((4, vocabulary.words), np.int32)
        self.found = np.zeros(vocabulary.size, np.int32)
        self.masks: dict[int, np.ndarray] = {}
        self.forced: dict[int, list[int]] = {}
        self.single: dict[int, int | None] = {}
        self.base: list[int] = []
        self.matchers: weakref.WeakSet[Any] = weakref.WeakSet()
        if self.tables.view(PATH).size <= vocabulary.longest:
            self.tables.grow(PATH, vocabulary.longest + 1)
        nfas: list[Nfa] = []
        ranks: list[int] = []
        empty = False
        if grammar.plain:
            self.builder = Builder(dict(grammar.rules), {})
        else:
            self.builder, nfas, ranks, empty = normal(grammar)
        self._add_rules(ranks)
        for rule, nfa in enumerate(nfas):
            self._load(rule, nfa)
        root = self.builder.numbers[grammar.root]
        if self.base[root] < 0:
            self._load(root, self.builder.build(self.builder.rules[grammar.root]))
        self.start = self.run(lambda block: kernels.first_parse(block, root, empty))

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
            if len(self.masks) * mask.nbytes > MOST_MASKS:
                self.masks.clear()
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
            self._load(detail, self.builder.build(self.builder.rules[self.builder.names[detail]]))
        elif reason == NEEDS_ENTRY:
            self._share(detail)
        elif reason == NEEDS_SLOT:
            self._more_slots()
        elif reason == AMBIGUOUS:
            raise BadRequest(
                f"the grammar reads this text in more than {MOST_ITEMS} ways at once; make it less ambiguous (one rule "
                "per meaning, lists as repetitions)"
            )
        else:
            self.tables.grow(reason)

    def _more_slots(self) -> None:
        if 2 * self.pool.nbytes <= MOST_MASKS:
            self.pool = np.concatenate([self.pool, np.zeros_like(self.pool)])
            return
        self.tables.view(PLACE).reshape(-1, 8)[:, 5] = -1
        for table in (ENTRY, TOKENS, EXITS):
            self.tables.block[USED + table] = 0
        self.tables.block[SLOTS] = 0

    def _share(self, place: int) -> None:
        """Entry of a position of a rule that many grammars have, from the vocabulary or for it."""
        row = self.tables.view(PLACE)[8 * place : 8 * place + 8]
        rule = int(row[7])
        states = self.tables.view(SET)[row[0] : row[0] + row[1]] - self.base[rule]
        key = (self.grammar.keys[self.builder.names[rule]], states.tobytes())
        known = self.vocabulary.shared.get(key)
        if known is None:
            entry = self.run(lambda block: kernels.make_entry(block, self.trie, self.pool, place, self.found))
            start, count, exits, leaving = self.tables.view(ENTRY)[4 * entry : 4 * entry + 4].tolist()
            tokens = self.tables.view(TOKENS)[start : start + count] if start >= 0 else self.pool[~start]
            self.vocabulary.shared[key] = (start < 0, tokens.copy(), self.tables.view(EXITS)[exits:][:leaving].copy())
            return
        wide, tokens, leaving = known
        if wide and self.tables.block[SLOTS] >= len(self.pool):
            self._more_slots()
        exits = self.tables.append(EXITS, leaving)
        if wide:
            slot = int(self.tables.block[SLOTS])
            self.tables.block[SLOTS] += 1
            self.pool[slot], start = tokens, ~slot
        else:
            start = self.tables.append(TOKENS, tokens)
        entry = self.tables.append(ENTRY, np.array([[start, len(tokens), exits, len(leaving)]], np.int32))
        self.tables.view(PLACE)[8 * place + 5] = entry

    def _add_rules(self, ranks: list[int]) -> None:
        """Enter rules that the builder has named since, and its repetitions."""
        fresh = self.builder.names[len(self.base) :]
        if fresh:
            first = len(self.base)
            rows = np.array([[-1, -1, 0, int(name in self.grammar.keys)] for name in fresh], np.int32)
            rows[:, 2] = ranks[first:] if ranks else 0
            self.tables.append(RULE, rows)
            self.base += [-1] * len(fresh)
        counted = self.builder.counted[self.tables.used(COUNTED) :]
        if counted:
            entries = [[c.rule, c.least, -1 if c.most is None else c.most, -1] for c in counted]
            self.tables.append(COUNTED, np.array(entries, np.int32))

    def _load(self, rule: int, nfa: Nfa) -> None:
        """Put a rule's automaton into the tables."""
        self._add_rules([])
        edges = sorted(nfa.edges)
        flags, counts = [0] * nfa.size, [0] * nfa.size
        flags[1] = FINAL
        for q, kind, _, _ in edges:
            counts[q] += 1
            flags[q] |= READS if kind >= 0 else 0 if kind == EPSILON else CALLING
        base, at = self.tables.used(STATE), self.tables.used(EDGE)
        states = []
        for state in range(nfa.size):
            states.append((at, at + counts[state], flags[state], 0))
            at += counts[state]
        self.tables.append(STATE, np.array(states, np.int32))
        if edges:
            self.tables.append(EDGE, np.array([(kind, x, r + base) for _, kind, x, r in edges], np.int32))
        if self.tables.view(WORK).size < at + 64:
            self.tables.grow(WORK, at + 64)
        if self.tables.view(FOUND).size < base + nfa.size:
            self.tables.grow(FOUND, base + nfa.size)
        self.base[rule] = base

        def first_place(block: np.ndarray) -> int:
            block[block[WORK]] = base
            return intern_place(block, 1, rule)

        self.tables.view(RULE)[4 * rule : 4 * rule + 2] = [self.run(first_place), base]
