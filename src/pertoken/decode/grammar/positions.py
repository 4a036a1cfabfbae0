"""Kernels: positions of rules, a deterministic automaton of every rule built as far as it is visited.

A position is a set of automaton states, closed over empty edges, numbered once (`intern_place`). Its moves over bytes
are filled in when asked for, for all bytes that behave alike at once.
"""

from __future__ import annotations

from pertoken.decode.grammar.compiled import kernel
from pertoken.decode.grammar.nfa import CALL, COUNT, EPSILON
from pertoken.decode.grammar.tables import (
    CALLING,
    CALLS,
    CAPACITY,
    COUNTED,
    DEAD,
    EDGE,
    FAILED,
    FINAL,
    FOUND,
    MARKS,
    MOVE,
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
def refill(table, hashes, first):
    """Put entries `first`, `first + 1`, ... with these hashes into an emptied table of a power of two."""
    size = len(table)
    for number in range(first, len(hashes)):
        slot = hashes[number] & (size - 1)
        while table[slot] >= 0:
            slot = (slot + 1) & (size - 1)
        table[slot] = number


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
def intern_place(block, count, rule):
    """Position of the first `count` states in WORK with all they reach over empty edges; DEAD for none."""
    if count == 0:
        return DEAD
    states, edges, work, found = block[STATE], block[EDGE], block[WORK], block[FOUND]
    stamp = block[MARKS] + 1
    block[MARKS] = stamp
    top = 0
    for i in range(count):
        state = block[work + i]
        if block[states + 4 * state + 3] != stamp:
            block[states + 4 * state + 3] = stamp
            block[work + top] = state
            top += 1
    size, flags = 0, 0
    while top > 0:
        top -= 1
        state = block[work + top]
        at = states + 4 * state
        if block[at + 2]:
            flags |= block[at + 2]
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
    if size == 0:
        return DEAD
    value = size
    for i in range(size):
        value = mix(value, block[found + i])
    table, slots = block[PLACE_HASH], block[CAPACITY + PLACE_HASH] - 1
    slot = value & slots
    while block[table + slot] >= 0:
        place = block[table + slot]
        at = block[PLACE] + 8 * place
        if block[at + 6] == value and block[at + 1] == size:
            same, first = True, block[SET] + block[at]
            for i in range(size):
                if block[first + i] != block[found + i]:
                    same = False
                    break
            if same:
                return place
        slot = (slot + 1) & slots
    if full(block, PLACE, 1) or full(block, MOVE, 1) or full(block, SET, size):
        return FAILED
    place, first = block[USED + PLACE], block[USED + SET]
    block[table + slot] = place
    at = block[PLACE] + 8 * place
    block[at], block[at + 1], block[at + 2], block[at + 3] = first, size, flags, 0
    block[at + 4], block[at + 5], block[at + 6], block[at + 7] = -1, -1, value, rule
    for i in range(size):
        block[block[SET] + first + i] = block[found + i]
    for i in range(256):
        block[block[MOVE] + 256 * place + i] = UNKNOWN
    block[USED + PLACE] += 1
    block[USED + MOVE] += 1
    block[USED + SET] += size
    return place


@kernel
def move(block, place, byte):
    """Position after a byte, or DEAD."""
    known = block[block[MOVE] + 256 * place + byte]
    if known != UNKNOWN:
        return known
    at = block[PLACE] + 8 * place
    low, high, count = 0, 255, 0
    for i in range(block[at + 1]):
        state = block[STATE] + 4 * block[block[SET] + block[at] + i]
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
    if after != FAILED:
        for other in range(low, high + 1):
            block[block[MOVE] + 256 * place + other] = after
    return after


@kernel
def look_up_calls(block, place):
    """Fill in which rules and repetitions are called at a position, and where each goes on; FAILED or 0."""
    at = block[PLACE] + 8 * place
    if block[at + 4] >= 0:
        return 0
    if full(block, CALLS, 0):
        return FAILED
    first, number = block[USED + CALLS], 0
    for i in range(block[at + 1]):
        state = block[STATE] + 4 * block[block[SET] + block[at] + i]
        for edge in range(block[state], block[state + 1]):
            here = block[EDGE] + 3 * edge
            kind = block[here]
            if kind != CALL and kind != COUNT:
                continue
            code = block[here + 1] if kind == CALL else ~block[here + 1]
            known = False
            for k in range(number):
                known |= block[block[CALLS] + 2 * (first + k)] == code
            if known:
                continue
            if first + number >= block[CAPACITY + CALLS]:
                block[REASON] = CALLS
                return FAILED
            block[block[CALLS] + 2 * (first + number)] = code
            number += 1
    for k in range(number):
        code, count = block[block[CALLS] + 2 * (first + k)], 0
        for i in range(block[at + 1]):
            state = block[STATE] + 4 * block[block[SET] + block[at] + i]
            for edge in range(block[state], block[state + 1]):
                here = block[EDGE] + 3 * edge
                kind = block[here]
                if (kind == CALL and block[here + 1] == code) or (kind == COUNT and ~block[here + 1] == code):
                    block[block[WORK] + count] = block[here + 2]
                    count += 1
        after = intern_place(block, count, block[at + 7])
        if after == FAILED:
            return FAILED
        block[block[CALLS] + 2 * (first + k) + 1] = after
        if code < 0:
            block[block[COUNTED] + 4 * ~code + 3] = after
    block[USED + CALLS] += number
    block[at + 3], block[at + 4] = first, number
    return 0


@kernel
def is_tail(block, place):
    """Whether a rule at this position can only end."""
    return block[block[PLACE] + 8 * place + 2] & (FINAL | READS | CALLING) == FINAL
