"""Kernels: a position splits the vocabulary into tokens that are allowed whatever the stack is, tokens that depend on
the stack, and all others, which are refused.

A split is found by walking the vocabulary's trie from its position, knowing only the position's rule (`INSIDE` below
it): tokens read to their end are allowed; where the rule can end within a token, the trie node is kept as an *exit*,
and what is below it is walked with the real stack each time. It is kept as: number of tokens, or -1 for a bitmask;
number of exits; the tokens or words; the exits. Its number is where it is in SPLIT, or `-2 - where` in the vocabulary's
SHARED.

Most positions inside of a string differ from the loop that they lead to in a few tokens only. In a rule that refers to
no other, such a position begins with the split of that loop and walks both at once, but only while they differ.
"""

from __future__ import annotations

from pertoken.decode.grammar.compiled import kernel
from pertoken.decode.grammar.positions import full, move, row_of_moves
from pertoken.decode.grammar.tables import (
    DEAD,
    DETAIL,
    FAILED,
    LEFT,
    MOVE,
    NEEDS_SPLIT,
    NO_ROW,
    NO_SPLIT,
    PLACE,
    READS,
    REASON,
    RULE,
    SPLIT,
    UNKNOWN,
    USED,
)
from pertoken.decode.grammar.trie import NODES, SCRATCH, SHARED, SIZE, set_bits
from pertoken.decode.grammar.walks import walk_both, walk_rule

LEAST_RUN, LEAST_LOOP = 10, 24  # bytes in a row, and in all, that lead to a loop worth beginning with


@kernel
def all_moves(block, place):
    """Fill in the whole row of moves of a position that has one; its address, or FAILED."""
    row = row_of_moves(block, place)
    if row == FAILED:
        return FAILED
    first = block[MOVE] + 256 * row
    for byte in range(256):
        if block[first + byte] == UNKNOWN and move(block, place, byte) == FAILED:
            return FAILED
    return first


@kernel
def loop_of(block, place):
    """The position whose split a position's own begins with: a loop that most of its bytes lead to, the position itself
    if it is one; DEAD for none, or FAILED."""
    at = block[PLACE] + 10 * place
    if not block[at + 2] & READS or block[at + 8] < NO_ROW:
        return DEAD
    row = all_moves(block, place)
    if row == FAILED:
        return FAILED
    loop, longest, run = DEAD, 0, 0
    for byte in range(256):
        run = run + 1 if byte and block[row + byte] == block[row + byte - 1] else 1
        if run > longest and block[row + byte] != DEAD:
            loop, longest = block[row + byte], run
    if longest < LEAST_RUN:
        return DEAD
    if loop == place:
        other = row
    elif not block[block[PLACE] + 10 * loop + 2] & READS or block[block[PLACE] + 10 * loop + 8] < NO_ROW:
        return DEAD
    else:
        other = all_moves(block, loop)
        if other == FAILED:
            return FAILED
    back, live, same = 0, 0, 0
    for byte in range(256):
        after = block[other + byte]
        back += after == loop
        live += after != DEAD
        same += after != DEAD and after == block[row + byte]
    return loop if back >= LEAST_LOOP and 2 * same >= live else DEAD


@kernel
def make_split(block, trie, place):
    """Find the split of a position; its number, or FAILED."""
    at = block[PLACE] + 10 * place
    loop = loop_of(block, place) if block[block[RULE] + 4 * block[at + 7] + 3] else DEAD
    if loop == FAILED:
        return FAILED
    if loop == DEAD:
        return make_alone(block, trie, place)
    split = block[block[PLACE] + 10 * loop + 5]
    if split == NO_SPLIT:
        block[REASON], block[DETAIL] = NEEDS_SPLIT, loop
        return FAILED
    where = block[SPLIT] + split if split >= 0 else trie[SHARED] - 2 - split
    if (block[where] if split >= 0 else trie[where]) >= 0:
        return make_alone(block, trie, place)
    words, nodes = (trie[SIZE] + 31) // 32, (trie[NODES] + 31) // 32
    mask, left = trie[SCRATCH], trie[SCRATCH] + words
    for i in range(nodes):
        trie[left + i] = 0
    for i in range(words):
        trie[mask + i] = block[where + 2 + i] if split >= 0 else trie[where + 2 + i]
    exits = block[where + 1] if split >= 0 else trie[where + 1]
    for i in range(words, words + exits):
        node = block[where + 2 + i] if split >= 0 else trie[where + 2 + i]
        trie[left + (node >> 5)] |= 1 << (node & 31)
    exits = walk_both(block, trie, place, loop, exits)
    if exits == FAILED or full(block, SPLIT, 2 + words + exits):
        return FAILED
    split = block[USED + SPLIT]
    where = block[SPLIT] + split
    block[where], block[where + 1] = -1, exits
    for i in range(words):
        block[where + 2 + i] = trie[mask + i]
    where += 2 + words
    for i in range(nodes):
        bits = trie[left + i] & 0xFFFFFFFF
        for node in range(32 * i, 32 * i + 32):
            if bits == 0:
                break
            if bits & 1:
                block[where] = node
                where += 1
            bits >>= 1
    block[USED + SPLIT] += 2 + words + exits
    block[at + 5] = split
    return split


@kernel
def make_alone(block, trie, place):
    """Find a position's split by a walk of its own; its number, or FAILED."""
    count = walk_rule(block, trie, place)
    if count == FAILED:
        return FAILED
    scratch, exits, words = trie[SCRATCH], block[LEFT], (trie[SIZE] + 31) // 32
    wide = count > max(words // 8, 64)
    if full(block, SPLIT, 2 + (words if wide else count) + exits):
        return FAILED
    split = block[USED + SPLIT]
    at = block[SPLIT] + split
    block[at], block[at + 1] = -1 if wide else count, exits
    at += 2
    if wide:
        block[at : at + words] = 0
        set_bits(block[at : at + words], trie, scratch, count)
        at += words
    else:
        for i in range(count):
            block[at + i] = trie[scratch + i]
        at += count
    for i in range(exits):
        block[at + i] = trie[scratch + 2 * trie[SIZE] + i]
    block[USED + SPLIT] = at + exits - block[SPLIT]
    block[block[PLACE] + 10 * place + 5] = split
    return split
