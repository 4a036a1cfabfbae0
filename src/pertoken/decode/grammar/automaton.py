"""Deterministic automata over characters: what regular expressions, lengths, names and numbers are intersected in.

An automaton starts in state 0; a state's edges (first character, last character, state) are sorted and disjoint, and
what has no edge is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from pertoken.core.errors import BadRequest
from pertoken.decode.grammar.ir import EMPTY, NOTHING, Graph, Node
from pertoken.decode.grammar.nfa import reached
from pertoken.decode.grammar.regex import Anchor, Cat, Chars, Or, Regex, Times
from pertoken.decode.grammar.unicode import TOP, Ranges, tidy

MOST_STATES = 20_000
Edges = list[list[tuple[int, int, int]]]


@dataclass(frozen=True, eq=False)
class Automaton:
    """edges: of each state; finals: where a text may end; listed: all texts, if it was made from a list of them."""

    edges: Edges
    finals: frozenset[int]
    listed: frozenset[str] | None = None

    @property
    def empty(self) -> bool:
        return not self.finals

    def has(self, text: str) -> bool:
        state = 0
        for letter in text:
            code = ord(letter)
            after = next((to for low, high, to in self.edges[state] if low <= code <= high), None)
            if after is None:
                return False
            state = after
        return state in self.finals

    def texts(self, most: int) -> set[str] | None:
        """All texts, if there are no more than so many."""
        found, paths = set(), [(0, "")]
        while paths:
            state, text = paths.pop()
            if state in self.finals:
                found.add(text)
            for low, high, to in self.edges[state]:
                if high - low >= most:
                    return None
                paths += [(to, text + chr(code)) for code in range(low, high + 1)]
            if len(found) > most or len(text) > len(self.edges):  # longer than without a circle
                return None
        return found

    def node(self, spell: Callable[[Ranges], Node]) -> Node:
        """As a grammar node, characters written as `spell` says."""
        if self.empty:
            return EMPTY
        found: list[tuple[int, Node, int]] = []
        for state, edges in enumerate(self.edges):
            targets: dict[int, list[tuple[int, int]]] = {}
            for low, high, to in edges:
                targets.setdefault(to, []).append((low, high))
            for to, ranges in targets.items():
                written = spell(tidy(ranges))
                if written != EMPTY:
                    found.append((state, written, to))
        return Graph(tuple(found), tuple(sorted(self.finals))) if found else NOTHING


NONE = Automaton([[]], frozenset())
ALL = Automaton([[(0, TOP, 0)]], frozenset({0}))


def trimmed(edges: Edges, finals: Iterable[int]) -> Automaton:
    """Without states that are not reached or lead to no end."""
    pairs = [(state, to) for state, row in enumerate(edges) for _, _, to in row]
    live = reached(pairs, [0]) & reached(((b, a) for a, b in pairs), finals)
    if 0 not in live:
        return NONE
    numbers = {state: i for i, state in enumerate(sorted(live))}
    kept = [[(low, high, numbers[to]) for low, high, to in edges[state] if to in live] for state in numbers]
    return Automaton(kept, frozenset(numbers[state] for state in finals if state in live))


def product(one: Automaton, other: Automaton, keep: Callable[[bool, bool], bool]) -> Automaton:
    """The texts for which `keep(in one, in other)` is true; `keep(False, False)` may be true too."""
    numbers, pairs, edges = {(0, 0): 0}, [(0, 0)], []
    for p, q in pairs:
        row, left = [], one.edges[p] if p >= 0 else []
        right = other.edges[q] if q >= 0 else []
        i = j = at = 0
        while at <= TOP:
            while i < len(left) and left[i][1] < at:
                i += 1
            while j < len(right) and right[j][1] < at:
                j += 1
            after, end = [], TOP
            for side, k in ((left, i), (right, j)):
                if k < len(side) and side[k][0] <= at:
                    after.append(side[k][2])
                    end = min(end, side[k][1])
                else:
                    after.append(-1)
                    end = min(end, side[k][0] - 1) if k < len(side) else end
            pair = (after[0], after[1])
            if any(keep(a, b) for a in {False, after[0] >= 0} for b in {False, after[1] >= 0}):
                if pair not in numbers:
                    if len(pairs) >= MOST_STATES:
                        raise BadRequest(
                            f"patterns, lengths and names together need more than {MOST_STATES} states; give simpler "
                            "patterns, smaller bounds, or fewer of them at one place"
                        )
                    numbers[pair] = len(pairs)
                    pairs.append(pair)
                if row and row[-1][2] == numbers[pair] and row[-1][1] == at - 1:
                    row[-1] = (row[-1][0], end, row[-1][2])
                else:
                    row.append((at, end, numbers[pair]))
            at = end + 1
        edges.append(row)
    return trimmed(edges, [n for n, (p, q) in enumerate(pairs) if keep(p in one.finals, q in other.finals)])


def intersection(one: Automaton, other: Automaton) -> Automaton:
    if one is ALL or other is ALL or one is other:
        return one if other is ALL else other
    return product(one, other, lambda a, b: a and b)


def difference(one: Automaton, other: Automaton) -> Automaton:
    return product(one, other, lambda a, b: a and not b)


def union(one: Automaton, other: Automaton) -> Automaton:
    if one is other or other.empty:
        return one
    return other if one.empty else product(one, other, lambda a, b: a or b)


def lengths(least: int, most: int | None) -> Automaton:
    """All texts of so many characters."""
    size = least if most is None else most
    if size > MOST_STATES:
        raise BadRequest(
            f"a length of {size} beside a pattern or format is too long; at most {MOST_STATES} are supported, or a "
            "length alone"
        )
    edges: Edges = [[(0, TOP, i + 1)] for i in range(size)]
    edges.append([(0, TOP, size)] if most is None else [])
    return Automaton(edges, frozenset(range(least, size + 1)))


def words(texts: Iterable[str]) -> Automaton:
    """These texts."""
    edges, finals, listed = [{}], set(), frozenset(texts)
    for text in sorted(listed):
        state = 0
        for letter in text:
            if ord(letter) not in edges[state]:
                edges[state][ord(letter)] = len(edges)
                edges.append({})
            state = edges[state][ord(letter)]
        finals.add(state)
    return Automaton(
        [[(code, code, to) for code, to in sorted(row.items())] for row in edges], frozenset(finals), listed
    )


@lru_cache(maxsize=1024)
def automaton(pattern: Regex) -> Automaton:
    """The texts that match a pattern as a whole; anchors hold at the ends of the text."""
    nfa = _Nfa()
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


class _Nfa:
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
