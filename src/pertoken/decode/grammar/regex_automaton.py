"""The automaton of a regular expression, by sets of states; anchors hold at the ends of the text."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from itertools import pairwise

from pertoken.core.errors import BadRequest
from pertoken.decode.grammar.automaton import MOST_STATES, Automaton, trimmed
from pertoken.decode.grammar.regex_tree import Anchor, Cat, Chars, Or, Regex, Times


@lru_cache(maxsize=1024)
def automaton(pattern: Regex) -> Automaton:
    """The texts that match a pattern as a whole."""
    nfa = _States()
    end = nfa.add(pattern, 0)
    first = nfa.close({0}, begin=True, end=False)
    numbers, sets, edges, finals = {(first, True): 0}, [(first, True)], [], []
    for states, begin in sets:
        spans = [span for state in states for span in nfa.spans[state]]
        cuts = sorted({low for low, _, _ in spans} | {high + 1 for _, high, _ in spans})
        row = []
        for low, after in pairwise(cuts):
            targets = {to for first_, last, to in spans if first_ <= low <= last}
            if not targets:
                continue
            key = (nfa.close(targets, begin=False, end=False), False)
            if key not in numbers:
                if len(sets) >= MOST_STATES:
                    raise BadRequest(f"a pattern needs more than {MOST_STATES} states; give a simpler one")
                numbers[key] = len(sets)
                sets.append(key)
            row.append((low, after - 1, numbers[key]))
        if end in nfa.close(states, begin=begin, end=True):
            finals.append(len(edges))
        edges.append(row)
    return trimmed(edges, finals)


class _States:
    """States with spans (first, last, state) and free moves; conditional ones hold at an end of the text."""

    def __init__(self) -> None:
        self.spans: list[list[tuple[int, int, int]]] = [[]]
        self.free: list[list[tuple[int, bool | None]]] = [[]]

    def state(self) -> int:
        if len(self.spans) >= 4 * MOST_STATES:
            raise BadRequest(f"a pattern needs more than {4 * MOST_STATES} states; give smaller repetitions")
        self.spans.append([])
        self.free.append([])
        return len(self.spans) - 1

    def add(self, pattern: Regex, at: int) -> int:
        """Add a pattern behind a state; the state after it."""
        if isinstance(pattern, Cat):
            for item in pattern.items:
                at = self.add(item, at)
            return at
        after = self.state()
        if isinstance(pattern, Chars):
            self.spans[at] += [(low, high, after) for low, high in pattern.ranges]
        elif isinstance(pattern, Anchor):
            self.free[at].append((after, pattern.end))
        elif isinstance(pattern, Or):
            for item in pattern.items:
                first = self.state()
                self.free[at].append((first, None))
                self.free[self.add(item, first)].append((after, None))
        else:
            assert isinstance(pattern, Times)
            for _ in range(pattern.least):
                at = self.add(pattern.item, at)
            if pattern.most is None:
                loop = self.state()
                self.free[at].append((loop, None))
                self.free[self.add(pattern.item, loop)].append((loop, None))
                at = loop
            else:
                for _ in range(pattern.most - pattern.least):
                    self.free[at].append((after, None))
                    first = self.state()
                    self.free[at].append((first, None))
                    at = self.add(pattern.item, first)
            self.free[at].append((after, None))
        return after

    def close(self, states: Iterable[int], begin: bool, end: bool) -> frozenset[int]:
        found, stack = set(states), list(states)
        while stack:
            for to, condition in self.free[stack.pop()]:
                if to not in found and (condition is None or (end if condition else begin)):
                    found.add(to)
                    stack.append(to)
        return frozenset(found)
