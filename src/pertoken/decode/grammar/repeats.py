"""Kernels: splits of counted repetitions, by how often a token repeats.

Inside of a string of 3 to 64 characters, what a token may be depends on how many came before. If its characters can be
told apart without doubt (none begins another, nor what follows the repetition), the tokens that read on are the same
for all counts and all bounds, each with the number of characters that it takes. So they are found once, sorted by that
number, and every count takes those that fit: `fill` needs no walk.

Such a split is kept as: L, most repetitions in a token; how many tokens end inside, and how many behind the
repetition; how many exits; for each of these three how many have a number less than 0, 1, ..., L + 1; the tokens and
exits, by their numbers; a bitmask of all tokens that end inside. The number of a token that ends inside is that of the
repetitions it touches, of the others that of the repetitions it completes, the one that it begins in included.
"""

from __future__ import annotations

from pertoken.decode.grammar.compiled import kernel
from pertoken.decode.grammar.positions import full, move
from pertoken.decode.grammar.tables import (
    CALLING,
    COUNTED,
    DEAD,
    FAILED,
    FINAL,
    LEFT,
    LINK,
    NODE,
    PATH,
    PLACE,
    READS,
    ROOT,
    RULE,
    SPLIT,
    USED,
)
from pertoken.decode.grammar.trie import FIRSTS, HEADS, LONGEST, NODES, SCRATCH, SIZE, set_bits
from pertoken.decode.grammar.walks import note_exit

BETWEEN = -3  # between two repetitions
UNSUITED = -4  # the repetition has no splits of its own


@kernel
def repetition(block, node):
    """The repetition that a stack node is in, if it is in but one that may have splits of its own; -1 otherwise."""
    at = block[NODE] + 4 * node
    if node <= ROOT or block[at + 1] != 1:
        return -1
    code = block[block[LINK] + 3 * block[at]]
    return ~code if code < 0 and block[block[COUNTED] + 6 * ~code + 5] else -1


@kernel
def walk_repeats(block, trie, counted, place):
    """Note in SCRATCH the tokens that can be read from a position inside of a repetition, each with twice its number,
    plus one if it ends behind the repetition, and the exits with theirs; how many tokens, UNSUITED, or FAILED.

    The state of the walk is a position inside, or ~position behind the repetition, minus 4, or BETWEEN."""
    heads, firsts, scratch, size = trie[HEADS], trie[FIRSTS], trie[SCRATCH], trie[SIZE]
    places, at = block[PLACE], block[COUNTED] + 6 * counted
    start, behind = block[block[RULE] + 4 * block[at]], block[at + 3]
    leaving, begun = block[places + 10 * behind + 2], block[places + 10 * place + 2]
    if (leaving | begun | block[places + 10 * start + 2]) & CALLING or begun & FINAL:
        return UNSUITED
    bottom, count = block[PATH], 0
    top, at, end, here, done = bottom, trie[firsts], trie[firsts + 1], place, 0
    block[LEFT] = 0
    while True:
        if at == end:
            if top == bottom:
                return count
            top -= 4
            here, done, at, end = block[top], block[top + 1], block[top + 2], block[top + 3]
            continue
        node, byte = at, trie[heads + at] & 255
        at += 1
        inside, outside = DEAD, DEAD
        if here == BETWEEN:
            inside, outside = move(block, start, byte), move(block, behind, byte)
        elif here >= 0:
            inside = move(block, here, byte)
        else:
            outside = move(block, -5 - here, byte)
        if inside == FAILED or outside == FAILED:
            return FAILED
        if inside != DEAD and outside != DEAD:
            return UNSUITED
        after, times, leaves = inside, done, False
        if inside != DEAD:
            flags = block[places + 10 * inside + 2]
            if flags & CALLING or (flags & FINAL and flags & READS):
                return UNSUITED
            if flags & FINAL:
                after, times = BETWEEN, done + 1
                leaves = leaving & FINAL != 0
        elif outside != DEAD:
            flags = block[places + 10 * outside + 2]
            if flags & CALLING:
                return UNSUITED
            after = -5 - outside
            leaves = flags & FINAL != 0
        else:
            continue
        if trie[heads + node] > 255:
            trie[scratch + count] = (trie[heads + node] >> 8) - 1
            trie[scratch + size + count] = 2 * (times + (1 if after >= 0 else 0)) + (1 if after < BETWEEN else 0)
            count += 1
        below, last = trie[firsts + node], trie[firsts + node + 1]
        if below == last:
            continue
        if leaves:
            note_exit(block, trie, node, times)
        block[top], block[top + 1], block[top + 2], block[top + 3] = here, done, at, end
        top += 4
        here, done, at, end = after, times, below, last


@kernel
def make_repeat(block, trie, counted, place):
    """Find the split of a position inside of a repetition; its number, UNSUITED or FAILED."""
    count = walk_repeats(block, trie, counted, place)
    if count in (FAILED, UNSUITED):
        return count
    scratch, size, words, most = trie[SCRATCH], trie[SIZE], (trie[SIZE] + 31) // 32, trie[LONGEST]
    exits, left = block[LEFT], trie[SCRATCH] + 2 * trie[SIZE]
    if full(block, SPLIT, 4 + 3 * (most + 2) + count + exits + words):
        return FAILED
    split = block[USED + SPLIT]
    at = block[SPLIT] + split
    sums = at + 4
    first = sums + 3 * (most + 2)
    for i in range(first - at):
        block[at + i] = 0
    block[at], block[at + 3] = most, exits
    for i in range(count):
        times = trie[scratch + size + i]
        block[at + 1 + (times & 1)] += 1
        block[sums + (times & 1) * (most + 2) + (times >> 1) + 1] += 1
    for i in range(exits):
        block[sums + 2 * (most + 2) + trie[left + trie[NODES] + i] + 1] += 1
    for kind in range(3):
        for i in range(most + 1):
            block[sums + kind * (most + 2) + i + 1] += block[sums + kind * (most + 2) + i]
    for i in range(count):  # every sum is now where the next of its number goes
        times = trie[scratch + size + i]
        slot = sums + (times & 1) * (most + 2) + (times >> 1)
        block[first + (times & 1) * block[at + 1] + block[slot]] = trie[scratch + i]
        block[slot] += 1
    for i in range(exits):
        slot = sums + 2 * (most + 2) + trie[left + trie[NODES] + i]
        block[first + count + block[slot]] = trie[left + i]
        block[slot] += 1
    for kind in range(3):  # and of the next number: back by one place
        for i in range(most + 1, 0, -1):
            block[sums + kind * (most + 2) + i] = block[sums + kind * (most + 2) + i - 1]
        block[sums + kind * (most + 2)] = 0
    mask = first + count + exits
    block[mask : mask + words] = 0
    set_bits(block[mask : mask + words], block, first, block[at + 1])
    block[USED + SPLIT] = mask + words - block[SPLIT]
    return split
