"""Kernels: walks through the vocabulary's trie, to find which tokens can be read from a parse or a position.

What a walk finds it notes in the trie's SCRATCH: tokens, and *exits*, nodes at which the rule that the walk began in
can end, so that what is below them depends on the stack. The stack of a walk is PATH, with four numbers for each level.
"""

from __future__ import annotations

from pertoken.decode.grammar.calls import add, begin
from pertoken.decode.grammar.compiled import kernel
from pertoken.decode.grammar.parses import close, step
from pertoken.decode.grammar.positions import move
from pertoken.decode.grammar.tables import (
    CALLING,
    DEAD,
    FAILED,
    FINAL,
    INSIDE,
    LEAVES,
    LEFT,
    MOVE,
    NEXT,
    NO_ROW,
    PARSE,
    PATH,
    PLACE,
    READS,
    UNKNOWN,
)
from pertoken.decode.grammar.trie import FIRSTS, HEADS, NODES, SCRATCH, SIZE, child


@kernel
def walk(block, trie, parse, node, level, count, leaving):
    """Note the tokens below a trie node that can be read from a parse, and the parses after them, behind the `count`
    in the trie's SCRATCH; returns how many there are then. `leaving`: note exits too. PATH is used from `level` on."""
    heads, firsts, scratch, size = trie[HEADS], trie[FIRSTS], trie[SCRATCH], trie[SIZE]
    parses, rows, bottom = block[PARSE], block[NEXT], block[PATH] + 4 * level
    top, at, end, here = bottom, trie[firsts + node], trie[firsts + node + 1], parse
    row = block[parses + 6 * here + 3]
    while True:
        if at == end:
            if top == bottom:
                return count
            top -= 4
            here, at, end = block[top], block[top + 1], block[top + 2]
            row = block[parses + 6 * here + 3]
            continue
        head, after = trie[heads + at], UNKNOWN
        below, last = trie[firsts + at], trie[firsts + at + 1]
        at += 1
        if row >= 0:
            after = block[rows + 256 * row + (head & 255)]
        if after == UNKNOWN:
            after = step(block, here, head & 255)
            if after == FAILED:
                return FAILED
            row = block[parses + 6 * here + 3]
        if after == DEAD:
            continue
        if head > 255:
            trie[scratch + count], trie[scratch + size + count] = (head >> 8) - 1, after
            count += 1
        if below == last:
            continue
        info = parses + 6 * after
        if leaving and block[info + 2] & LEAVES:
            note_exit(block, trie, at - 1, 0)
        if block[info + 1]:
            block[top], block[top + 1], block[top + 2] = here, at, end
            top += 4
            here, at, end, row = after, below, last, block[info + 3]


@kernel
def note_exit(block, trie, node, times):
    """Note a trie node behind those in SCRATCH, with a number."""
    at = trie[SCRATCH] + 2 * trie[SIZE] + block[LEFT]
    trie[at], trie[at + trie[NODES]] = node, times
    block[LEFT] += 1


@kernel
def walk_rule(block, trie, place):
    """Note tokens and exits of a position in SCRATCH; the number of tokens, or FAILED."""
    heads, firsts, scratch = trie[HEADS], trie[FIRSTS], trie[SCRATCH]
    places, moves, bottom = block[PLACE], block[MOVE], block[PATH]
    top, at, end, here, count = bottom, trie[firsts], trie[firsts + 1], place, 0
    row = block[places + 10 * here + 8]
    block[LEFT] = 0
    while True:
        if at == end:
            if top == bottom:
                return count
            top -= 4
            here, at, end = block[top], block[top + 1], block[top + 2]
            row = block[places + 10 * here + 8]
            continue
        if row < NO_ROW:
            node = child(trie, at, end, -2 - row)
            at = end
            if node < 0:
                continue
        else:
            node = at
            at += 1
        head, after = trie[heads + node], UNKNOWN
        if row >= 0:
            after = block[moves + 256 * row + (head & 255)]
        if after == UNKNOWN:
            after = move(block, here, head & 255)
            if after == FAILED:
                return FAILED
            row = block[places + 10 * here + 8]
        if after == DEAD:
            continue
        if head > 255:
            trie[scratch + count] = (head >> 8) - 1
            count += 1
        below, last = trie[firsts + node], trie[firsts + node + 1]
        if below == last:
            continue
        flags = block[places + 10 * after + 2]
        if flags & CALLING:
            begin(block)
            if add(block, after, INSIDE) == FAILED:
                return FAILED
            parse = close(block)
            if parse == FAILED:
                return FAILED
            if parse != DEAD:
                if block[block[PARSE] + 6 * parse + 2] & LEAVES:
                    note_exit(block, trie, node, 0)
                count = walk(block, trie, parse, node, ((top - bottom) >> 2) + 1, count, True)
                if count == FAILED:
                    return FAILED
            continue
        if flags & FINAL:
            note_exit(block, trie, node, 0)
        if flags & READS:
            block[top], block[top + 1], block[top + 2] = here, at, end
            top += 4
            here, at, end, row = after, below, last, block[places + 10 * after + 8]


@kernel
def walk_both(block, trie, place, loop, exits):
    """Turn the bitmask of `loop` at the beginning of SCRATCH, and its exits behind that, into those of `place`; the
    number of exits, or FAILED. Goes on only where the two positions lead to different ones."""
    heads, firsts, places = trie[HEADS], trie[FIRSTS], block[PLACE]
    mask, bottom = trie[SCRATCH], block[PATH]
    left = mask + (trie[SIZE] + 31) // 32
    top, at, end, one, other = bottom, trie[firsts], trie[firsts + 1], place, loop
    while True:
        if at == end:
            if top == bottom:
                return exits
            top -= 4
            one, other, at, end = block[top], block[top + 1], block[top + 2], block[top + 3]
            continue
        head, node = trie[heads + at], at
        at += 1
        mine = move(block, one, head & 255) if one != DEAD else DEAD
        theirs = move(block, other, head & 255) if other != DEAD else DEAD
        if mine == FAILED or theirs == FAILED:
            return FAILED
        if mine == theirs:
            continue
        if head > 255:
            token = (head >> 8) - 1
            bit = 1 << (token & 31)
            trie[mask + (token >> 5)] = (trie[mask + (token >> 5)] & ~bit) | (bit if mine != DEAD else 0)
        below, last = trie[firsts + node], trie[firsts + node + 1]
        if below == last:
            continue
        leaves = False
        if mine != DEAD:
            leaves = block[places + 10 * mine + 2] & FINAL != 0
        bit, word = 1 << (node & 31), left + (node >> 5)
        exits += (1 if leaves else 0) - (1 if trie[word] & bit else 0)
        trie[word] = (trie[word] & ~bit) | (bit if leaves else 0)
        block[top], block[top + 1], block[top + 2], block[top + 3] = one, other, at, end
        top += 4
        one, other, at, end = mine, theirs, below, last
