"""Deterministic automata over characters: what regular expressions, lengths, names and numbers are intersected in.

An automaton starts in state 0; a state's edges (first character, last character, state) are sorted and disjoint, and
what has no edge is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property

from pertoken.core.errors import BadRequest
from pertoken.decode.grammar.ir import EMPTY, NOTHING, Graph, Node
from pertoken.decode.grammar.nfa import reached
from pertoken.decode.grammar.unicode import TOP, Ranges, parted, tidy

MOST_STATES = 20_000
Edges = list[list[tuple[int, int, int]]]


class Automaton:
    """edges: of each state; finals: where a text may end; listed: all texts, if it was made from a list of them (its
    states are then made when they are asked for)."""

    def __init__(self, edges: Edges | None, finals: frozenset[int] = frozenset(), listed: frozenset[str] | None = None):
        self.given, self.listed = (edges, finals), listed

    @cached_property
    def made(self) -> tuple[Edges, frozenset[int]]:
        edges, finals = self.given
        return _tree(self.listed or ()) if edges is None else (edges, finals)

    @property
    def edges(self) -> Edges:
        return self.made[0]

    @property
    def finals(self) -> frozenset[int]:
        return self.made[1]

    @property
    def empty(self) -> bool:
        return not self.finals if self.listed is None else not self.listed

    def has(self, text: str) -> bool:
        if self.listed is not None:
            return text in self.listed
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
        if self.listed is not None:
            return set(self.listed) if len(self.listed) <= most else None
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
        """As a grammar node, characters written as `spell` says. Rarer characters, which take many states to write, are
        read from states of their own, one for all states that go on alike with them."""
        if self.empty:
            return EMPTY
        found: list[tuple[int, Node, int]] = []
        apart: dict[tuple[Ranges, int], int] = {}
        for state, edges in enumerate(self.edges):
            targets: dict[int, list[tuple[int, int]]] = {}
            for low, high, to in edges:
                targets.setdefault(to, []).append((low, high))
            for to, ranges in targets.items():
                common, rare = parted(tidy(ranges))
                if common:
                    found.append((state, spell(common), to))
                if rare and (rare, to) not in apart and (node := spell(rare)) != EMPTY:
                    apart[rare, to] = len(self.edges) + len(apart)
                    found.append((apart[rare, to], node, to))
                if (rare, to) in apart:
                    found.append((state, NOTHING, apart[rare, to]))
        return Graph(tuple(found), tuple(sorted(self.finals))) if found else NOTHING


NONE = Automaton([[]])
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
                _lead(row, at, end, _number(pair, numbers, pairs))
            at = end + 1
        edges.append(row)
    return trimmed(edges, [n for n, (p, q) in enumerate(pairs) if keep(p in one.finals, q in other.finals)])


def intersection(one: Automaton, other: Automaton) -> Automaton:
    if one is ALL or other is ALL or one is other:
        return one if other is ALL else other
    if one.listed is not None or other.listed is not None:
        few, test = (one, other) if one.listed is not None else (other, one)
        return words(text for text in few.listed or () if test.has(text))
    numbers, pairs, edges = {(0, 0): 0}, [(0, 0)], []
    for p, q in pairs:
        row, left, right, i, j = [], one.edges[p], other.edges[q], 0, 0
        while i < len(left) and j < len(right):
            low, high = max(left[i][0], right[j][0]), min(left[i][1], right[j][1])
            if low <= high:
                _lead(row, low, high, _number((left[i][2], right[j][2]), numbers, pairs))
            if left[i][1] < right[j][1]:
                i += 1
            else:
                j += 1
        edges.append(row)
    return trimmed(edges, [n for n, (p, q) in enumerate(pairs) if p in one.finals and q in other.finals])


def _number(pair: tuple[int, int], numbers: dict[tuple[int, int], int], pairs: list[tuple[int, int]]) -> int:
    """Number of a pair of states; a new one is entered."""
    if pair not in numbers:
        if len(pairs) >= MOST_STATES:
            raise BadRequest(
                f"patterns, lengths and names together need more than {MOST_STATES} states; give simpler patterns, "
                "smaller bounds, or fewer of them at one place"
            )
        numbers[pair] = len(pairs)
        pairs.append(pair)
    return numbers[pair]


def _lead(row: list[tuple[int, int, int]], low: int, high: int, to: int) -> None:
    """Add an edge behind the others, joined with the last one if that leads to the same state."""
    if row and row[-1][2] == to and row[-1][1] == low - 1:
        row[-1] = (row[-1][0], high, to)
    else:
        row.append((low, high, to))


def difference(one: Automaton, other: Automaton) -> Automaton:
    if one.listed is not None:
        return words(text for text in one.listed if not other.has(text))
    if one is ALL and other.listed is not None:
        return _all_but(other)
    return product(one, other, lambda a, b: a and not b)


def union(one: Automaton, other: Automaton) -> Automaton:
    if one is other or other.empty:
        return one
    if one.empty:
        return other
    if one.listed is not None and other.listed is not None:
        return words(one.listed | other.listed)
    return product(one, other, lambda a, b: a or b)


def _all_but(few: Automaton) -> Automaton:
    """All texts but those of a list: what leaves their tree is free."""
    edges, free = [], len(few.edges)
    for row in few.edges:
        filled, at = [], 0
        for low, high, to in row:
            if at < low:
                filled.append((at, low - 1, free))
            filled.append((low, high, to))
            at = high + 1
        filled.append((at, TOP, free))
        edges.append(filled)
    edges.append([(0, TOP, free)])
    return Automaton(edges, frozenset(range(free + 1)) - few.finals)


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
    return Automaton(None, listed=frozenset(texts))


def _tree(texts: Iterable[str]) -> tuple[Edges, frozenset[int]]:
    """Edges and final states of a list of texts."""
    edges: list[dict[int, int]] = [{}]
    finals = set()
    for text in sorted(texts):
        state = 0
        for letter in text:
            if ord(letter) not in edges[state]:
                edges[state][ord(letter)] = len(edges)
                edges.append({})
            state = edges[state][ord(letter)]
        finals.add(state)
    return [[(code, code, to) for code, to in sorted(row.items())] for row in edges], frozenset(finals)
