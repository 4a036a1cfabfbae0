"""What the engine puts into its tables: automata of rules, when they are first called; room for splits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pertoken.decode.grammar.compiled import kernel
from pertoken.decode.grammar.nfa import EPSILON, Nfa
from pertoken.decode.grammar.positions import full, intern_place
from pertoken.decode.grammar.tables import (
    CALLING,
    CAPACITY,
    COUNTED,
    EDGE,
    FAILED,
    FINAL,
    FOUND,
    MASK,
    NO_MASK,
    NO_SPLIT,
    PARSE,
    PLACE,
    READS,
    REASON,
    REPEATS,
    RULE,
    SET,
    SPLIT,
    STATE,
    USED,
    WORK,
)

if TYPE_CHECKING:
    from pertoken.decode.grammar.engine import Engine

MOST = {SPLIT: 1 << 24, MASK: 1 << 24}  # int32; then they are forgotten


def make_room(engine: Engine, table: int, again: bool) -> None:
    """Room for more splits or masks. If they are too many, all are forgotten; but not again for the same mask."""
    tables, size = engine.tables, engine.tables.view(table).size
    fits = size < MOST[table] and 2 * (tables.bytes() + 4 * size) <= tables.limit
    if again or fits or 2 * tables.used(table) < size:
        tables.grow(table)
        return
    tables.block[USED + table] = 0
    if table == MASK:
        tables.view(PARSE).reshape(-1, 6)[:, 5] = NO_MASK
        return
    splits = tables.view(PLACE).reshape(-1, 10)[:, 5]
    splits[splits >= 0] = NO_SPLIT
    tables.view(COUNTED).reshape(-1, 6)[:, 4] = -1
    tables.block[USED + REPEATS] = 0


def load(engine: Engine, rule: int, nfa: Nfa) -> None:
    """Put a rule's automaton into the tables, and the rules and repetitions that the builder has named since."""
    builder, tables = engine.builder, engine.tables
    known = tables.used(RULE)
    if known < len(builder.names):
        rows = np.array([[-1, -1, 0, 0]], np.int32).repeat(len(builder.names) - known, axis=0)
        rows[:, 2] = engine.ranks[known : len(builder.names)] or 0
        tables.append(RULE, rows)
    counted = builder.counted[tables.used(COUNTED) :]
    if counted:
        entries = [(c.rule, c.least, -1 if c.most is None else c.most, -1, -1, 1) for c in counted]
        tables.append(COUNTED, np.array(entries, np.int32))
    edges = nfa.flat
    engine.run(lambda block: enter(block, edges, nfa.size, rule))


@kernel
def enter(block, edges, size, rule):
    """Enter an automaton of `size` states, with edges (state, first, last, state) in a row; FAILED, or 0."""
    count, base, first = len(edges) // 4, block[USED + STATE], block[USED + EDGE]
    if full(block, STATE, size) or full(block, EDGE, count) or full(block, PLACE, 1) or full(block, SET, size):
        return FAILED
    if block[CAPACITY + WORK] < first + count + 64 or block[CAPACITY + FOUND] < base + size:
        block[REASON] = WORK if block[CAPACITY + WORK] < first + count + 64 else FOUND
        return FAILED
    states = block[STATE] + 4 * base
    for i in range(4 * size):
        block[states + i] = 0
    block[states + 4 + 2] = FINAL
    calling = False
    for i in range(0, 4 * count, 4):
        kind, at = edges[i + 1], states + 4 * edges[i]
        block[at + 1] += 1
        if kind >= 0:
            block[at + 2] |= READS
        elif kind != EPSILON:
            block[at + 2] |= CALLING
            calling = True
    for state in range(states, states + 4 * size, 4):
        block[state] = first
        first += block[state + 1]
        block[state + 1] = block[state]
    for i in range(0, 4 * count, 4):
        at = states + 4 * edges[i]
        edge = block[EDGE] + 3 * block[at + 1]
        block[edge], block[edge + 1], block[edge + 2] = edges[i + 1], edges[i + 2], base + edges[i + 3]
        block[at + 1] += 1
    block[USED + STATE] += size
    block[USED + EDGE] += count
    block[block[WORK]] = base
    at = block[RULE] + 4 * rule
    block[at], block[at + 1], block[at + 3] = intern_place(block, 1, rule), base, 0 if calling else 1
    return 0
