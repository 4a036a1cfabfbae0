"""The engine's memory: one block of int32 that holds every table, so that a kernel takes one argument.

`block[t]` is where table t begins, `block[CAPACITY + t]` how many entries fit, `block[USED + t]` how many there are.
Kernels never allocate: one that finds a table full returns `FAILED` with the table's number in `block[REASON]`; the
table is made larger and the kernel called again. All tables only remember what follows from the grammar, so a second
call goes on where the first one stopped.

Tables (entries of so many ints):
STATE   4  automaton states: first edge, past the last edge, flags, mark
EDGE    3  first byte (or kind), last byte (or rule, repetition), target state
RULE    4  start position (-1: not built yet), start state, rank, 1 if it refers to no other rule
COUNTED 6  repetitions: rule, least, most (-1: no limit), position after them, first in REPEATS (-1), 0 if it has no
            splits of its own
PLACE  10  positions = sets of states: first in SET, number, flags, first in CALLS, number (-1: not looked at), split
            (NO_SPLIT), hash, rule, row in MOVE (NO_ROW; ~byte - 1 if it reads but this byte), position after that byte
SET     1  states of positions
MOVE    256  position after a byte; UNKNOWN, or DEAD
CALLS   2  calls of a position: rule (or ~repetition), position after it
NODE    4  stack nodes: first in LINK, number, parse after returning from it (UNKNOWN, DEAD), hash
LINK    3  return position (or ~repetition), parent node, times done
PARSE   6  parses = sets of (position, stack node): first in ITEM, number, flags, row in NEXT (-1), hash, where its mask
            is in MASK (NO_MASK)
ITEM    2  position, node
NEXT    256  parse after a byte
SPLIT   1  splits of positions, see `splits`
MASK    1  masks that took long to find
REPEATS 3  splits of repetitions: position, split, next of the same repetition (-1)

The hash tables hold numbers plus one.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from pertoken.core.errors import BadRequest
from pertoken.decode.grammar.compiled import kernel

(STATE, EDGE, RULE, COUNTED, PLACE, SET, MOVE, CALLS, NODE, LINK, PARSE, ITEM, NEXT, SPLIT, MASK, REPEATS) = range(16)
(PLACE_HASH, NODE_HASH, PARSE_HASH, WORK, FOUND, COLLECTED, PENDING, SEEN, PATH) = range(16, 25)
TABLES = 25
CAPACITY, USED, HEAD = 32, 64, 112
REASON, DETAIL, ABOUT, MARKS, STAMP, ITEMS, CALLED, LEFT, WALKED = range(96, 105)

WIDTH = {STATE: 4, EDGE: 3, RULE: 4, COUNTED: 6, PLACE: 10, MOVE: 256, CALLS: 2, NODE: 4, LINK: 3, PARSE: 6, ITEM: 2}
WIDTH |= {NEXT: 256, REPEATS: 3, PENDING: 5, COLLECTED: 2, SEEN: 2}
MOST_ITEMS = 512  # a parse of more alternatives than this is given up
STARTS = {STATE: 2048, EDGE: 4096, RULE: 256, COUNTED: 64, PLACE: 2048, SET: 4096, MOVE: 512, CALLS: 1024, NODE: 2048}
STARTS |= {LINK: 4096, PARSE: 2048, ITEM: 4096, NEXT: 1024, SPLIT: 1 << 16, MASK: 1 << 16, REPEATS: 64, WORK: 8192}
STARTS |= {PLACE_HASH: 4096, NODE_HASH: 4096, PARSE_HASH: 4096, FOUND: 4096, PENDING: 512, PATH: 1024}
FIXED = {COLLECTED: MOST_ITEMS, SEEN: 4 * MOST_ITEMS}
HASHED = {PLACE: PLACE_HASH, NODE: NODE_HASH, PARSE: PARSE_HASH}
HASHES = {PLACE: 6, NODE: 3, PARSE: 4}  # where in an entry its hash is

FAILED, DEAD, UNKNOWN = -9, -1, -2
NEEDS_RULE, AMBIGUOUS, NEEDS_SPLIT, NEEDS_REPEAT = 100, 101, 102, 103
FINAL, READS, CALLING = 1, 2, 4  # flags of states and positions
ENDS, LEAVES = 1, 2  # flags of parses: the sentence may end here; a parse from the inside of a rule may have left it
INSIDE, ROOT = 0, 1  # stack nodes: below a parse that knows only its rule; below the root rule
NO_ROW, NO_SPLIT, NO_MASK = -1, -1, -1
MOST_ROWS = 8192  # rows of NEXT; then all are forgotten
MOST_SPARE, LARGEST_SPARE = 4, 1 << 24  # blocks that are kept for the next grammar, and bytes of the largest of them
SPARE: list[np.ndarray] = []


class Tables:
    """Allocates and grows the block, or takes that of tables which are gone. limit: bytes it may take."""

    def __init__(self, limit: int = 1 << 28):
        self.limit, self.block = limit, np.zeros(0, np.int32)
        size, head = _empty(limit)
        self._refuse_above(size)
        if SPARE and 4 * SPARE[-1].nbytes <= limit:
            self.block = SPARE.pop()
            clear(self.block)
        else:
            self.block = np.zeros(size, np.int32)
            self.block[: len(head)] = head
        self.address = self.block.ctypes.data

    def __del__(self) -> None:
        if len(SPARE) < MOST_SPARE and 0 < self.block.nbytes <= LARGEST_SPARE:
            SPARE.append(self.block)

    def view(self, table: int) -> np.ndarray:
        """The whole table, flat."""
        start = self.block[table]
        return self.block[start : start + self.block[CAPACITY + table] * WIDTH.get(table, 1)]

    def used(self, table: int) -> int:
        return int(self.block[USED + table])

    def append(self, table: int, entries: np.ndarray) -> int:
        """Add entries `[entry, width]` and return the number of the first."""
        first = self.used(table)
        self.hold(table, first + len(entries))
        start = int(self.block[table]) + first * WIDTH.get(table, 1)
        self.block[start : start + entries.size] = entries.reshape(-1)
        self.block[USED + table] += len(entries)
        return first

    def hold(self, table: int, least: int) -> None:
        """Make a table at least so large."""
        size = int(self.block[CAPACITY + table])
        if size < least:
            while size < least:
                size *= 2
            self._resize(table, size)

    def grow(self, table: int) -> None:
        """Make a table twice as large."""
        self._resize(table, 2 * int(self.block[CAPACITY + table]))

    def _resize(self, table: int, size: int) -> None:
        sizes = self.block[CAPACITY : CAPACITY + TABLES].copy()
        sizes[table] = size
        for source, hashed in HASHED.items():
            while sizes[hashed] < 2 * sizes[source]:
                sizes[hashed] *= 2
        total = HEAD + int(sizes.astype(np.int64) @ _widths())
        self._refuse_above(total)
        old, self.block = self.block, np.zeros(total, np.int32)
        self.address = self.block.ctypes.data
        copy_tables(old, self.block, sizes, _widths())
        for source, hashed in HASHED.items():
            if sizes[hashed] > old[CAPACITY + hashed]:
                hashes = self.view(source)[: self.used(source) * WIDTH[source]].reshape(-1, WIDTH[source])
                refill(self.view(hashed), hashes[:, HASHES[source]], 2 if source == NODE else 0)

    def _refuse_above(self, size: int) -> None:
        if size * 4 > self.limit:
            raise BadRequest(
                f"parsing takes more than {self.limit >> 20} MB: the text is nested too deeply, or the grammar reads "
                "it in too many ways. Give a less ambiguous grammar, limit the nesting, or raise memory="
            )

    def bytes(self) -> int:
        """Memory that is in use."""
        return 4 * int(self.block[USED : USED + PLACE_HASH].astype(np.int64) @ _widths()[:PLACE_HASH]) + 4 * sum(
            int(self.block[CAPACITY + table]) * WIDTH.get(table, 1) for table in range(PLACE_HASH, TABLES)
        )


@cache
def _empty(limit: int) -> tuple[int, np.ndarray]:
    """Size of a new block, at most a quarter of a limit if it can be, and how it begins, up to the nodes INSIDE and
    ROOT: no links, nothing to return to."""
    sizes = STARTS | FIXED
    while 16 * _total(sizes) > limit and sizes[MOVE] > 64:
        sizes = {table: max(size // 2, 16) for table, size in sizes.items()} | FIXED
    head, start = np.zeros(HEAD, np.int32), HEAD
    for table in (NODE, *(t for t in range(TABLES) if t != NODE)):
        head[table], head[CAPACITY + table] = start, sizes[table]
        start += sizes[table] * WIDTH.get(table, 1)
    head[USED + NODE] = 2
    return start, np.concatenate([head, np.array([0, 0, DEAD, 0] * 2, np.int32)])


def _total(sizes: dict[int, int]) -> int:
    return HEAD + sum(size * WIDTH.get(table, 1) for table, size in sizes.items())


@cache
def _widths() -> np.ndarray:
    return np.array([WIDTH.get(table, 1) for table in range(TABLES)], np.int64)


@kernel
def clear(block):
    """Empty a block. What entries are made of is written with them, so that only numbers and hash tables are reset."""
    for table in range(PLACE_HASH):
        block[USED + table] = 0
    for table in (PLACE_HASH, NODE_HASH, PARSE_HASH):
        for i in range(block[CAPACITY + table]):
            block[block[table] + i] = 0
    for i in range(8):
        block[block[NODE] + i] = DEAD if i % 4 == 2 else 0
    block[USED + NODE] = 2
    block[MARKS] = 0
    if block[STAMP] > 1 << 30:
        block[STAMP] = 0
        for i in range(2 * block[CAPACITY + SEEN]):
            block[block[SEEN] + i] = 0


@kernel
def copy_tables(old, block, sizes, widths):
    """Copy what is used of all tables into a larger block of tables of these sizes; grown hash tables stay empty."""
    block[:HEAD] = old[:HEAD]
    start = HEAD
    for table in range(TABLES):
        count = old[USED + table] if table < PLACE_HASH else old[CAPACITY + table]
        if not PLACE_HASH <= table <= PARSE_HASH or count == sizes[table]:
            for i in range(count * widths[table]):
                block[start + i] = old[old[table] + i]
        block[table], block[CAPACITY + table] = start, sizes[table]
        start += sizes[table] * widths[table]


@kernel
def refill(table, hashes, first):
    """Put entries `first`, `first + 1`, ... with these hashes into an emptied table of a power of two."""
    size = len(table)
    for number in range(first, len(hashes)):
        slot = hashes[number] & (size - 1)
        while table[slot] > 0:
            slot = (slot + 1) & (size - 1)
        table[slot] = number + 1
