"""What the engine puts into its tables: automata of rules when they are first called, and masks of positions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pertoken.decode.grammar import masks as kernels
from pertoken.decode.grammar.nfa import EPSILON, Nfa
from pertoken.decode.grammar.positions import intern_place
from pertoken.decode.grammar.tables import (
    CALLING,
    COUNTED,
    EDGE,
    ENTRY,
    EXITS,
    FINAL,
    FOUND,
    PLACE,
    READS,
    RULE,
    SET,
    SLOTS,
    STATE,
    TOKENS,
    USED,
    WORK,
)

if TYPE_CHECKING:
    from pertoken.decode.grammar.engine import Engine

MOST_MASKS = 1 << 26  # bytes of bitmasks of positions


def more_slots(engine: Engine) -> None:
    """Room for more bitmasks of positions; if there are too many, all are forgotten."""
    if 2 * engine.pool.nbytes <= MOST_MASKS:
        engine.pool = np.concatenate([engine.pool, np.zeros_like(engine.pool)])
        return
    engine.tables.view(PLACE).reshape(-1, 8)[:, 5] = -1
    for table in (ENTRY, TOKENS, EXITS):
        engine.tables.block[USED + table] = 0
    engine.tables.block[SLOTS] = 0


def share(engine: Engine, place: int) -> None:
    """Entry of a position of a rule that many grammars have, from the vocabulary or for it."""
    row = engine.tables.view(PLACE)[8 * place : 8 * place + 8]
    rule = int(row[7])
    states = engine.tables.view(SET)[row[0] : row[0] + row[1]] - engine.base[rule]
    key = (engine.grammar.keys[engine.builder.names[rule]], states.tobytes())
    known = engine.vocabulary.shared.get(key)
    if known is None:
        entry = engine.run(lambda block: kernels.make_entry(block, engine.trie, engine.pool, place, engine.found))
        start, count, exits, leaving = engine.tables.view(ENTRY)[4 * entry : 4 * entry + 4].tolist()
        tokens = engine.tables.view(TOKENS)[start : start + count] if start >= 0 else engine.pool[~start]
        engine.vocabulary.shared[key] = (start < 0, tokens.copy(), engine.tables.view(EXITS)[exits:][:leaving].copy())
        return
    wide, tokens, leaving = known
    if wide and engine.tables.block[SLOTS] >= len(engine.pool):
        more_slots(engine)
    exits = engine.tables.append(EXITS, leaving)
    if wide:
        slot = int(engine.tables.block[SLOTS])
        engine.tables.block[SLOTS] += 1
        engine.pool[slot], start = tokens, ~slot
    else:
        start = engine.tables.append(TOKENS, tokens)
    entry = engine.tables.append(ENTRY, np.array([[start, len(tokens), exits, len(leaving)]], np.int32))
    engine.tables.view(PLACE)[8 * place + 5] = entry


def add_rules(engine: Engine, ranks: list[int]) -> None:
    """Enter rules that the builder has named since, and its repetitions."""
    fresh = engine.builder.names[len(engine.base) :]
    if fresh:
        first = len(engine.base)
        rows = np.array([[-1, -1, 0, int(name in engine.grammar.keys)] for name in fresh], np.int32)
        rows[:, 2] = ranks[first:] if ranks else 0
        engine.tables.append(RULE, rows)
        engine.base += [-1] * len(fresh)
    counted = engine.builder.counted[engine.tables.used(COUNTED) :]
    if counted:
        entries = [[c.rule, c.least, -1 if c.most is None else c.most, -1] for c in counted]
        engine.tables.append(COUNTED, np.array(entries, np.int32))


def load(engine: Engine, rule: int, nfa: Nfa) -> None:
    """Put a rule's automaton into the tables."""
    add_rules(engine, [])
    edges = sorted(nfa.edges)
    flags, counts = [0] * nfa.size, [0] * nfa.size
    flags[1] = FINAL
    for q, kind, _, _ in edges:
        counts[q] += 1
        flags[q] |= READS if kind >= 0 else 0 if kind == EPSILON else CALLING
    base, at = engine.tables.used(STATE), engine.tables.used(EDGE)
    states = []
    for state in range(nfa.size):
        states.append((at, at + counts[state], flags[state], 0))
        at += counts[state]
    engine.tables.append(STATE, np.array(states, np.int32))
    if edges:
        engine.tables.append(EDGE, np.array([(kind, x, r + base) for _, kind, x, r in edges], np.int32))
    if engine.tables.view(WORK).size < at + 64:
        engine.tables.grow(WORK, at + 64)
    if engine.tables.view(FOUND).size < base + nfa.size:
        engine.tables.grow(FOUND, base + nfa.size)
    engine.base[rule] = base

    def first_place(block: np.ndarray) -> int:
        block[block[WORK]] = base
        return intern_place(block, 1, rule)

    engine.tables.view(RULE)[4 * rule : 4 * rule + 2] = [engine.run(first_place), base]
