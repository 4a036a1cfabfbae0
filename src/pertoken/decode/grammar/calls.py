"""Kernels: which rules and repetitions are called at a position, and what is being collected for the next parse.

The items of a parse, (position, stack node), are collected in COLLECTED, each once; rules that they call wait in
PENDING until all ways to call them at this place of the text are known.
"""

from __future__ import annotations

from pertoken.decode.grammar.compiled import kernel
from pertoken.decode.grammar.nfa import CALL, COUNT
from pertoken.decode.grammar.positions import full, intern_place, mix
from pertoken.decode.grammar.tables import (
    AMBIGUOUS,
    CALLED,
    CALLS,
    CAPACITY,
    COLLECTED,
    COUNTED,
    EDGE,
    FAILED,
    ITEMS,
    LINK,
    MOST_ITEMS,
    NODE,
    PENDING,
    PLACE,
    REASON,
    SEEN,
    SET,
    STAMP,
    STATE,
    USED,
    WORK,
)


@kernel
def look_up_calls(block, place):
    """Fill in which rules and repetitions are called at a position, and where each goes on; FAILED or 0."""
    at = block[PLACE] + 10 * place
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
            block[block[COUNTED] + 6 * ~code + 3] = after
    block[USED + CALLS] += number
    block[at + 3], block[at + 4] = first, number
    return 0


@kernel
def begin(block):
    """Start collecting the items of a parse (in COLLECTED)."""
    block[STAMP] += 1
    block[ITEMS] = 0
    block[CALLED] = 0


@kernel
def add(block, place, node):
    """Collect an item once; FAILED if there are too many."""
    slots, seen, items = block[CAPACITY + SEEN] - 1, block[SEEN], block[COLLECTED]
    stamp = block[STAMP]
    slot = mix(mix(7, place), node) & slots
    while block[seen + 2 * slot] == stamp:
        other = block[seen + 2 * slot + 1]
        if block[items + 2 * other] == place and block[items + 2 * other + 1] == node:
            return 0
        slot = (slot + 1) & slots
    count = block[ITEMS]
    if count >= MOST_ITEMS or 2 * count > slots:
        block[REASON] = AMBIGUOUS
        return FAILED
    block[seen + 2 * slot], block[seen + 2 * slot + 1] = stamp, count
    block[items + 2 * count], block[items + 2 * count + 1] = place, node
    block[ITEMS] = count + 1
    return 0


@kernel
def call(block, rule, code, node, times):
    """Note that a rule is called with this link."""
    count = block[CALLED]
    if count >= block[CAPACITY + PENDING]:
        if count >= 8 * MOST_ITEMS:
            block[REASON] = AMBIGUOUS
        else:
            block[REASON] = PENDING
        return FAILED
    at = block[PENDING] + 5 * count
    block[at], block[at + 1], block[at + 2], block[at + 3], block[at + 4] = rule, code, node, times, 0
    block[CALLED] = count + 1
    return 0


@kernel
def come_back(block, node):
    """Collect what follows when the rule that was called at a node has been read."""
    at = block[NODE] + 4 * node
    for link in range(block[at], block[at] + block[at + 1]):
        here = block[LINK] + 3 * link
        code, parent, times = block[here], block[here + 1], block[here + 2]
        if code >= 0:
            if add(block, code, parent) == FAILED:
                return FAILED
            continue
        counted = block[COUNTED] + 6 * ~code
        least, most = block[counted + 1], block[counted + 2]
        times += 1
        if (most < 0 or times < most) and call(
            block, block[counted], code, parent, times if most >= 0 else min(times, least)
        ) == FAILED:
            return FAILED
        if times >= least and add(block, block[counted + 3], parent) == FAILED:
            return FAILED
    return 0
