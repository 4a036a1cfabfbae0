"""Kernels: positions of rules, a deterministic automaton of every rule built as far as it is visited.

A position is a set of automaton states, closed over empty edges, numbered once (`intern_place`). Its moves over bytes
are filled in when asked for, for all bytes that behave alike at once; a position that reads but one byte, as inside of
a literal, needs no row for them.
"""

from __future__ import annotations

from pertoken.decode.grammar.compiled import kernel
from pertoken.decode.grammar.nfa import EPSILON
from pertoken.decode.grammar.tables import (
    CALLING,
    CAPACITY,
    DEAD,
    EDGE,
    FAILED,
    FINAL,
    FOUND,
    MARKS,
    MOVE,
    NO_ROW,
    NO_SPLIT,
    PLACE,
    PLACE_HASH,
    READS,
    REASON,
    SET,
    STATE,
    UNKNOWN,
    USED,
    WORK,
)


@kernel
def full(block, table, more):
    """Whether so many more entries do not fit; leaves the reason."""
    if block[USED + table] + more > block[CAPACITY + table]:
        block[REASON] = table
        return True
    return False


@kernel
def mix(value, more):
    """Non-negative 31-bit hash of a hash and a number."""
    value = (value ^ more) * 0x9E3779B1
    value ^= (value >> 15) & 0x1FFFF
    return value & 0x7FFFFFFF


@kernel
def close_states(block, count):
    """Put the states that the first `count` in WORK reach over empty edges into FOUND, sorted, those without further
    edges or an end left out; how many there are."""
    states, edges, work, found = block[STATE], block[EDGE], block[WORK], block[FOUND]
    stamp = block[MARKS] + 1
    block[MARKS] = stamp
    top, size = 0, 0
    for i in range(count):
        state = block[work + i]
        if block[states + 4 * state + 3] != stamp:
            block[states + 4 * state + 3] = stamp
            block[work + top] = state
            top += 1
    while top > 0:
        top -= 1
        state = block[work + top]
        at = states + 4 * state
        if block[at + 2]:
            i = size
            while i > 0 and block[found + i - 1] > state:
                block[found + i] = block[found + i - 1]
                i -= 1
            block[found + i] = state
            size += 1
        for edge in range(block[at], block[at + 1]):
            if block[edges + 3 * edge] == EPSILON:
                after = block[edges + 3 * edge + 2]
                if block[states + 4 * after + 3] != stamp:
                    block[states + 4 * after + 3] = stamp
                    block[work + top] = after
                    top += 1
    return size


@kernel
def intern_place(block, count, rule):
    """Position of the first `count` states in WORK with all they reach over empty edges; DEAD for none."""
    size = close_states(block, count) if count else 0
    if size == 0:
        return DEAD
    found, value = block[FOUND], size
    for i in range(size):
        value = mix(value, block[found + i])
    table, slots = block[PLACE_HASH], block[CAPACITY + PLACE_HASH] - 1
    slot = value & slots
    while block[table + slot] > 0:
        place = block[table + slot] - 1
        at = block[PLACE] + 10 * place
        if block[at + 6] == value and block[at + 1] == size:
            same, first = True, block[SET] + block[at]
            for i in range(size):
                if block[first + i] != block[found + i]:
                    same = False
                    break
            if same:
                return place
        slot = (slot + 1) & slots
    if full(block, PLACE, 1) or full(block, SET, size):
        return FAILED
    place, first = block[USED + PLACE], block[USED + SET]
    block[table + slot] = place + 1
    at = block[PLACE] + 10 * place
    flags, spans, row = 0, 0, NO_ROW
    for i in range(size):
        state = block[STATE] + 4 * block[found + i]
        flags |= block[state + 2]
        block[block[SET] + first + i] = block[found + i]
        for edge in range(block[state], block[state + 1]):
            here = block[EDGE] + 3 * edge
            if block[here] >= 0:
                spans += 1 if block[here] == block[here + 1] else 2
                row = -2 - block[here]
    block[at], block[at + 1], block[at + 2], block[at + 3], block[at + 4] = first, size, flags, 0, -1
    block[at + 5], block[at + 6], block[at + 7] = NO_SPLIT, value, rule
    block[at + 8], block[at + 9] = row if spans == 1 else NO_ROW, UNKNOWN
    block[USED + PLACE] += 1
    block[USED + SET] += size
    return place


@kernel
def mark_read(block, place, row):
    """Set the bytes that a position may read to UNKNOWN in the 256 numbers from `row` on."""
    at = block[PLACE] + 10 * place
    if block[at + 8] < NO_ROW:
        block[row - 2 - block[at + 8]] = UNKNOWN
        return
    for i in range(block[at], block[at] + block[at + 1]):
        state = block[STATE] + 4 * block[block[SET] + i]
        for edge in range(block[state], block[state + 1]):
            here = block[EDGE] + 3 * edge
            if block[here] >= 0:
                for byte in range(block[here], block[here + 1] + 1):
                    block[row + byte] = UNKNOWN


@kernel
def row_of_moves(block, place):
    """Row of MOVE that belongs to a position that reads; FAILED if there is no room."""
    at = block[PLACE] + 10 * place
    if block[at + 8] == NO_ROW:
        if full(block, MOVE, 1):
            return FAILED
        row = block[USED + MOVE]
        for i in range(256):
            block[block[MOVE] + 256 * row + i] = DEAD
        mark_read(block, place, block[MOVE] + 256 * row)
        block[USED + MOVE] += 1
        block[at + 8] = row
    return block[at + 8]


@kernel
def move(block, place, byte):
    """Position after a byte, or DEAD."""
    at = block[PLACE] + 10 * place
    if not block[at + 2] & READS:
        return DEAD
    row = row_of_moves(block, place)
    if row == FAILED:
        return FAILED
    if row < NO_ROW:
        known = block[at + 9] if byte == -2 - row else DEAD
    else:
        known = block[block[MOVE] + 256 * row + byte]
    if known != UNKNOWN:
        return known
    low, high, count = 0, 255, 0
    for i in range(block[at], block[at] + block[at + 1]):
        state = block[STATE] + 4 * block[block[SET] + i]
        for edge in range(block[state], block[state + 1]):
            here = block[EDGE] + 3 * edge
            first, last = block[here], block[here + 1]
            if first < 0:
                continue
            if byte < first:
                high = min(high, first - 1)
            elif byte > last:
                low = max(low, last + 1)
            else:
                low, high = max(low, first), min(high, last)
                block[block[WORK] + count] = block[here + 2]
                count += 1
    after = intern_place(block, count, block[at + 7])
    if after == FAILED:
        return FAILED
    if row < NO_ROW:
        block[at + 9] = after
    else:
        for other in range(low, high + 1):
            block[block[MOVE] + 256 * row + other] = after
    return after


@kernel
def alike_bytes(block, place, byte, low, high):
    """The largest span of bytes around one, within `low` to `high`, that all lead to the same as far as is known."""
    at = block[PLACE] + 10 * place
    row = block[at + 8]
    if row < NO_ROW:
        lone = -2 - row
        if byte == lone:
            return byte, byte
        return (low, min(high, lone - 1)) if byte < lone else (max(low, lone + 1), high)
    moves = block[MOVE] + 256 * row
    after, first, last = block[moves + byte], byte, byte
    while first > low and block[moves + first - 1] == after:
        first -= 1
    while last < high and block[moves + last + 1] == after:
        last += 1
    return first, last


@kernel
def is_tail(block, place):
    """Whether a rule at this position can only end."""
    return block[block[PLACE] + 10 * place + 2] & (FINAL | READS | CALLING) == FINAL
