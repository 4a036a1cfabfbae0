"""The engine's memory: one block of int32 that holds every table, so that a kernel takes one argument.

`block[t]` is where table t begins, `block[CAPACITY + t]` how many entries fit, `block[USED + t]` how many there are.
Kernels never allocate: one that finds a table full returns `FAILED` with the table's number in `block[REASON]`; the
table is made larger and the kernel called again. All tables only remember what follows from the grammar, so a second
call goes on where the first one stopped.

Tables (entries of so many ints):
STATE   4  automaton states: first edge, past the last edge, flags, mark
EDGE    3  first byte (or kind), last byte (or rule, repetition), target state
RULE    4  start position (-1: not built yet), start state, rank, 1 if its masks are shared between grammars
COUNTED 4  repetitions: rule, least, most (-1: no limit), position after them
PLACE   8  positions = sets of states: first in SET, number, flags, first in CALLS, number (-1: not
            looked at), mask entry, hash, rule
SET     1  states of positions
MOVE    256  position after a byte; UNKNOWN, or DEAD
CALLS   2  calls of a position: rule (or ~repetition), position after it
NODE    4  stack nodes: first in LINK, number, parse after returning from it (UNKNOWN, DEAD), hash
LINK    3  return position (or ~repetition), parent node, times done
PARSE   5  parses = sets of (position, stack node): first in ITEM, number, flags, row in NEXT (-1), hash
ITEM    2  position, node
NEXT    256  parse after a byte
ENTRY   4  masks of positions: first in TOKENS (or ~slot of a bitmask), number, first in EXITS, number
"""

from __future__ import annotations

import numpy as np

from pertoken.core.errors import BadRequest

(STATE, EDGE, RULE, COUNTED, PLACE, SET, MOVE, CALLS, NODE, LINK, PARSE, ITEM, NEXT, ENTRY, TOKENS, EXITS) = range(16)
(PLACE_HASH, NODE_HASH, PARSE_HASH, WORK, FOUND, COLLECTED, PENDING, SEEN, PATH) = range(16, 25)
TABLES = 25
CAPACITY, USED, HEAD = 32, 64, 112
REASON, DETAIL, MARKS, STAMP, ITEMS, CALLED, SLOTS = range(96, 103)

WIDTH = {STATE: 4, EDGE: 3, RULE: 4, COUNTED: 4, PLACE: 8, MOVE: 256, CALLS: 2, NODE: 4, LINK: 3, PARSE: 5, ITEM: 2}
WIDTH |= {NEXT: 256, ENTRY: 4, PENDING: 5, COLLECTED: 2, SEEN: 2}
MOST_ITEMS = 512  # a parse of more alternatives than this is given up
STARTS = {STATE: 256, EDGE: 512, RULE: 64, COUNTED: 16, PLACE: 128, SET: 1024, MOVE: 128, CALLS: 256, NODE: 256}
STARTS |= {LINK: 512, PARSE: 512, ITEM: 1024, NEXT: 128, ENTRY: 64, TOKENS: 4096, EXITS: 1024, PLACE_HASH: 512}
STARTS |= {NODE_HASH: 1024, PARSE_HASH: 2048, WORK: 1024, FOUND: 1024, PENDING: 512, PATH: 512}
STARTS |= {COLLECTED: MOST_ITEMS, SEEN: 4 * MOST_ITEMS}
HASHED = {PLACE: PLACE_HASH, NODE: NODE_HASH, PARSE: PARSE_HASH}

FAILED, DEAD, UNKNOWN = -9, -1, -2
NEEDS_RULE, AMBIGUOUS, NEEDS_ENTRY, NEEDS_SLOT = 100, 101, 102, 103
FINAL, READS, CALLING = 1, 2, 4  # flags of states and positions
ENDS, LEAVES = 1, 2  # flags of parses: the sentence may end here; a parse from the inside of a rule may have left it
INSIDE, ROOT = 0, 1  # stack nodes: below a parse that knows only its rule; below the root rule
MOST_ROWS = 8192  # rows of NEXT; then all are forgotten


class Tables:
    """Allocates and grows the block. limit: bytes it may take."""

    def __init__(self, limit: int = 1 << 28):
        self.limit = limit
        self.block = np.zeros(HEAD, dtype=np.int32)
        self._lay_out(dict(STARTS))
        for table in (PLACE_HASH, NODE_HASH, PARSE_HASH):
            self.view(table)[:] = -1
        self.block[USED + NODE] = 2  # INSIDE, ROOT: no links, nothing to return to
        self.view(NODE)[:8] = [0, 0, DEAD, 0] * 2

    def view(self, table: int) -> np.ndarray:
        """The whole table, flat."""
        start = self.block[table]
        return self.block[start : start + self.block[CAPACITY + table] * WIDTH.get(table, 1)]

    def used(self, table: int) -> int:
        return int(self.block[USED + table])

    def append(self, table: int, entries: np.ndarray) -> int:
        """Add entries `[entry, width]` and return the number of the first."""
        first = self.used(table)
        while first + len(entries) > self.block[CAPACITY + table]:
            self.grow(table)
        width = WIDTH.get(table, 1)
        self.view(table)[first * width : (first + len(entries)) * width] = entries.reshape(-1)
        self.block[USED + table] += len(entries)
        return first

    def grow(self, table: int, least: int = 0) -> None:
        """Make a table twice as large (or hold `least` entries)."""
        sizes = {t: int(self.block[CAPACITY + t]) for t in range(TABLES)}
        sizes[table] = max(2 * sizes[table], least)
        for source, hashed in HASHED.items():
            while sizes[hashed] < 2 * sizes[source]:
                sizes[hashed] *= 2
        self._lay_out(sizes)

    def _lay_out(self, sizes: dict[int, int]) -> None:
        total = HEAD + sum(size * WIDTH.get(table, 1) for table, size in sizes.items())
        if total * 4 > self.limit:
            raise BadRequest(
                f"parsing takes more than {self.limit >> 20} MB: the text is nested too deeply, or the grammar reads "
                "it in too many ways. Give a less ambiguous grammar, limit the nesting, or raise memory="
            )
        old, block = self.block, np.zeros(total, dtype=np.int32)
        block[:HEAD] = old[:HEAD]
        start = HEAD
        for table, size in sizes.items():
            width, before = WIDTH.get(table, 1), int(old[CAPACITY + table])
            block[table], block[CAPACITY + table] = start, size
            if table in (PLACE_HASH, NODE_HASH, PARSE_HASH) and before and size > before:
                block[start : start + size] = -1
            elif before:
                block[start : start + before * width] = old[old[table] : old[table] + before * width]
            start += size * width
        self.block = block
        for source, hashed in HASHED.items():
            if old[CAPACITY + hashed] and old[CAPACITY + hashed] < sizes[hashed]:
                _rehash(self, source, hashed)

    def bytes(self) -> int:
        return self.block.nbytes


def _rehash(tables: Tables, source: int, hashed: int) -> None:
    """Fill an emptied hash table from the hashes that the entries keep."""
    width, used = WIDTH[source], tables.used(source)
    column = {PLACE: 6, NODE: 3, PARSE: 4}[source]
    hashes = tables.view(source)[: used * width].reshape(-1, width)[:, column]
    from pertoken.decode.grammar.positions import refill

    first = {NODE: 2}.get(source, 0)
    refill(tables.view(hashed), hashes, first)
