"""Splits that several grammars have in common, kept with the vocabulary.

In a rule that refers to no other, what can be read from a position follows from the automaton that is left of the rule.
So its split can be kept under that automaton, as numbers: the mask inside of a JSON string, or of a name after a
pattern, is found once for all grammars and requests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from pertoken.decode.grammar.compiled import kernel
from pertoken.decode.grammar.nfa import EPSILON
from pertoken.decode.grammar.repeats import UNSUITED, make_repeat
from pertoken.decode.grammar.splits import make_alone
from pertoken.decode.grammar.tables import COUNTED, EDGE, PLACE, REPEATS, RULE, SET, SPLIT, STATE, USED, WORK
from pertoken.decode.grammar.trie import SCRATCH, SHARED

if TYPE_CHECKING:
    from pertoken.decode.grammar.engine import Engine

MOST_NUMBERS = 1 << 14  # of an automaton that a split is kept under


@kernel
def residue(block, trie, place, first):
    """Write what is left of a rule at a position into SCRATCH, from `first` on: its states as they are met, each with
    its flags, the number of its edges, and these. Returns where that ends; -1 if it calls anything or is too long."""
    states, edges, at = block[STATE], block[EDGE], block[PLACE] + 10 * place
    work, out, room = block[WORK], trie[SCRATCH], min(MOST_NUMBERS, trie[SHARED] - trie[SCRATCH])
    count, end, done = block[at + 1], first, 0
    for i in range(count):
        block[work + i] = block[block[SET] + block[at] + i]
        block[states + 4 * block[work + i] + 3] = -1 - i
    while done < count:
        state = states + 4 * block[work + done]
        done += 1
        size = block[state + 1] - block[state]
        if end < 0 or end + 2 + 3 * size > room:
            end = -1
            break
        trie[out + end], trie[out + end + 1] = block[state + 2], size
        end += 2
        for edge in range(edges + 3 * block[state], edges + 3 * block[state + 1], 3):
            target = states + 4 * block[edge + 2]
            if block[edge] < EPSILON:  # a call
                end = -1
                break
            if block[target + 3] >= 0:
                block[work + count] = block[edge + 2]
                block[target + 3] = -1 - count
                count += 1
            trie[out + end], trie[out + end + 1] = block[edge], block[edge + 1]
            trie[out + end + 2] = -1 - block[target + 3]
            end += 3
    for i in range(count):
        block[states + 4 * block[work + i] + 3] = 0
    return end


def share_split(engine: Engine, place: int) -> None:
    """The split of a position of a rule that refers to no other, from the vocabulary or for it."""
    split = _shared(engine, [place], lambda block, trie: make_alone(block, trie, place))
    engine.tables.view(PLACE)[10 * place + 5] = split


def share_repeat(engine: Engine, counted: int, place: int) -> None:
    """The split of a position inside of a repetition, or that the repetition has none."""
    tables = engine.tables
    rule, behind = tables.view(COUNTED)[6 * counted : 6 * counted + 4 : 3].tolist()
    start = int(tables.view(RULE)[4 * rule])
    split = _shared(engine, [place, start, behind], lambda block, trie: make_repeat(block, trie, counted, place))
    if split == UNSUITED:
        tables.view(COUNTED)[6 * counted + 5] = 0
        return
    link = tables.append(REPEATS, np.array([[place, split, tables.view(COUNTED)[6 * counted + 4]]], np.int32))
    tables.view(COUNTED)[6 * counted + 4] = link


def _shared(engine: Engine, places: list[int], make: Callable[[np.ndarray, np.ndarray], Any]) -> int:
    """A split under all that follows from positions."""
    vocabulary, ends = engine.vocabulary, [0]

    def made() -> int:
        return engine.run(lambda block: make(block, vocabulary.block))

    for place in places:
        ends.append(int(residue(engine.tables.block, vocabulary.block, place, ends[-1])))
        if ends[-1] < 0:
            return made()
    start = int(vocabulary.block[SCRATCH])
    key = np.array(ends, np.int32).tobytes() + vocabulary.block[start : start + ends[-1]].tobytes()
    split = vocabulary.shared.get(key)
    if split is None:
        split = made()
        if split != UNSUITED:
            table, used = engine.tables.view(SPLIT), engine.tables.used(SPLIT)
            kept = vocabulary.share(key, table[split:used])
            if kept is not None:
                engine.tables.block[USED + SPLIT] = split
                split = kept
    return split
