"""Rules as automata: bytes, calls of rules and counted repetitions on the edges.

`Builder` turns one node into an automaton with state 0 as its start and state 1 as its end. An edge is (state, first,
last, state): `first >= 0` reads a byte between first and last; `EPSILON` reads nothing; `CALL` reads what rule number
`last` matches; `COUNT` what repetition number `last` matches. `normal` makes rules fit for the engine: no rule matches
the empty text, none begins with itself, every state leads to the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import chain

import numpy as np

from pertoken.decode.grammar.compiled import kernel
from pertoken.decode.grammar.ir import Alt, Graph, Lit, Node, Ref, Repeat, Seq, Set, Words, nullable, ranges, references
from pertoken.decode.grammar.trie import common

EPSILON, CALL, COUNT = -1, -2, -3
COPIES = 48  # a repetition is written out if that takes no more states than this
Edge = tuple[int, int, int, int]


@dataclass
class Nfa:
    """Automaton of one rule: `size` states, start 0, end 1; many: more edges, as arrays `[edge, 4]`."""

    edges: list[Edge] = field(default_factory=list)
    size: int = 2
    many: list[np.ndarray] = field(default_factory=list)

    def state(self) -> int:
        self.size += 1
        return self.size - 1

    def words(self, texts: Sequence[bytes], at: int, after: int) -> None:
        """Any of many sorted texts, by a tree."""
        lengths = np.fromiter(map(len, texts), np.int32, len(texts))
        edges = np.zeros((int(lengths.sum()) + len(texts), 4), np.int32)
        text = np.frombuffer(b"".join(texts), np.uint8)
        count, self.size = word_edges(text, lengths, at, after, self.size, edges)
        self.many.append(edges[:count])

    @cached_property
    def flat(self) -> np.ndarray:
        """All edges, their numbers in a row. To be asked for when there will be no more."""
        few = np.fromiter(chain.from_iterable(self.edges), np.int32, 4 * len(self.edges))
        return np.concatenate([few, *(edges.reshape(-1) for edges in self.many)]) if self.many else few

    def listed(self) -> Nfa:
        """The same with all edges in `edges`."""
        return Nfa(self.edges + [tuple(edge) for edges in self.many for edge in edges.tolist()], self.size)


@kernel
def word_edges(text, lengths, at, after, size, edges):
    """Put the edges of a tree of sorted texts, joined in `text`, between two states into `edges`; how many there are,
    and how many states with those that the tree has, `size` being there before."""
    path, start, before, count = [at] * (lengths.max() + 1), 0, 0, 0
    for i in range(len(lengths)):
        length = lengths[i]
        shared = common(text, start, length, before, lengths[i - 1]) if i > 0 else 0
        goes_on = i + 1 < len(lengths) and common(text, start, length, start + length, lengths[i + 1]) == length
        for depth in range(shared, length):
            target = after
            if goes_on or depth + 1 < length:
                target = size
                size += 1
            byte = text[start + depth]
            edges[count, 0], edges[count, 1], edges[count, 2], edges[count, 3] = path[depth], byte, byte, target
            path[depth + 1] = target
            count += 1
        if goes_on:
            edges[count, 0], edges[count, 1], edges[count, 2], edges[count, 3] = path[length], EPSILON, 0, after
            count += 1
        before = start
        start += length
    return count, size


@dataclass
class Counted:
    """A counted repetition: rule number, bounds (most None: no limit)."""

    rule: int
    least: int
    most: int | None


def weight(node: Node) -> int:
    """About how many states a node takes."""
    if isinstance(node, Lit):
        return len(node.data)
    if isinstance(node, (Set, Ref)):
        return 1
    if isinstance(node, Words):
        return sum(map(len, node.texts))
    if isinstance(node, (Seq, Alt)):
        return sum(map(weight, node.items))
    if isinstance(node, Repeat):
        times = node.most if node.most is not None else node.least + 1
        size = weight(node.item)
        return size * times if size * times <= COPIES else size + 1
    return sum(weight(inner) for _, inner, _ in node.edges)


class Builder:
    """Numbers rules and repetitions while nodes become automata. known: rules that other grammars may have too."""

    def __init__(self, rules: dict[str, Node], empty: dict[str, bool], known: Iterable[str] = ()):
        self.rules, self.empty, self.known = rules, empty, set(known)
        self.numbers = {name: i for i, name in enumerate(rules)}
        self.names = list(rules)
        self.inlined: set[str] = set()
        self.bodies: dict[Node, int] = {}
        self.counted: list[Counted] = []

    def build(self, node: Node) -> Nfa:
        nfa = Nfa()
        self._emit(nfa, node, 0, 1)
        return nfa

    def rule(self, number: int) -> Nfa:
        """The automaton of a rule."""
        name = self.names[number]
        nfa = ready(self.rules[name]) if name in self.known else None
        return nfa or self.build(self.rules[name])

    def _body(self, node: Node) -> int:
        """Number of the rule made for the body of a repetition."""
        if isinstance(node, Ref):
            return self.numbers[node.name]
        if node not in self.bodies:
            name = f"repeated {len(self.bodies)}"
            self.bodies[node] = self.numbers[name] = len(self.names)
            self.known.add(name)
            self.names.append(name)
            self.rules[name] = node
            self.empty[name] = False
        return self.bodies[node]

    def _emit(self, nfa: Nfa, node: Node, at: int, after: int) -> None:
        edges = nfa.edges
        if isinstance(node, Lit):
            data = node.data
            if not data:
                edges.append((at, EPSILON, 0, after))
                return
            for state, byte in enumerate(data[:-1], nfa.size):
                edges.append((at, byte, byte, state))
                at = state
            nfa.size += len(data) - 1
            edges.append((at, data[-1], data[-1], after))
        elif isinstance(node, Set):
            edges.extend((at, low, high, after) for low, high in ranges(node.mask))
        elif isinstance(node, Ref):
            if node.name in self.inlined:
                self._emit(nfa, self.rules[node.name], at, after)
            else:
                edges.append((at, CALL, self.numbers[node.name], after))
        elif isinstance(node, Seq):
            for item in node.items[:-1]:
                new = nfa.state()
                self._emit(nfa, item, at, new)
                at = new
            self._emit(nfa, node.items[-1], at, after)
        elif isinstance(node, Alt):
            for item in node.items:
                self._emit(nfa, item, at, after)
        elif isinstance(node, Words):
            nfa.words(node.texts, at, after)
        elif isinstance(node, Graph):
            states: dict[int, int] = {}
            edges.append((at, EPSILON, 0, states.setdefault(0, nfa.state())))
            for here, inner, there in node.edges:
                for state in (here, there):
                    if state not in states:
                        states[state] = nfa.state()
                self._emit(nfa, inner, states[here], states[there])
            edges.extend((states[state], EPSILON, 0, after) for state in node.finals if state in states)
        else:
            self._repeat(nfa, node, at, after)

    def _repeat(self, nfa: Nfa, node: Repeat, at: int, after: int) -> None:
        item, least, most = node.item, node.least, node.most
        if nullable(item, self.empty):  # fewer than least may take all the bytes, more than most may not
            least = 0
        if most == 0:
            nfa.edges.append((at, EPSILON, 0, after))
            return
        times = most if most is not None else least
        if times > 1 and weight(item) * times > COPIES:
            if least == 0:
                nfa.edges.append((at, EPSILON, 0, after))
            if any(True for _ in references(item)):  # the first one apart: it may begin with the rule that it stands in
                first = nfa.state()
                self._emit(nfa, item, at, first)
                if least <= 1:
                    nfa.edges.append((first, EPSILON, 0, after))
                at, least, most = first, least - 1, None if most is None else most - 1
            nfa.edges.append((at, COUNT, len(self.counted), after))
            self.counted.append(Counted(self._body(item), max(least, 1), most))
            return
        for _ in range(least):
            new = nfa.state()
            self._emit(nfa, item, at, new)
            at = new
        if most is None:
            loop = nfa.state()
            nfa.edges.append((at, EPSILON, 0, loop))
            self._emit(nfa, item, loop, loop)
            nfa.edges.append((loop, EPSILON, 0, after))
            return
        for _ in range(most - least):
            nfa.edges.append((at, EPSILON, 0, after))
            new = nfa.state()
            self._emit(nfa, item, at, new)
            at = new
        nfa.edges.append((at, EPSILON, 0, after))


@lru_cache(maxsize=1024)
def ready(node: Node) -> Nfa | None:
    """The automaton of a node that calls and counts nothing; None of any other."""
    if any(True for _ in references(node)):
        return None
    builder = Builder({}, {})
    nfa = builder.build(node)
    return None if builder.counted else nfa


def empty_rules(rules: dict[str, Node]) -> dict[str, bool]:
    """Which rules match the empty text."""
    found = dict.fromkeys(rules, False)
    users: dict[str, list[str]] = {name: [] for name in rules}
    for name, node in rules.items():
        for used in set(references(node)):
            users[used].append(name)
    waiting = list(rules)
    while waiting:
        name = waiting.pop()
        if not found[name] and nullable(rules[name], found):
            found[name] = True
            waiting.extend(users[name])
    return found


def spread(edges: list[tuple[int, int]], start: Iterable[int]) -> set[int]:
    """`reached`, sooner where most edges come after those that lead to them."""
    found = set(start)
    for _ in range(3):
        before = len(found)
        for here, there in edges:
            if here in found:
                found.add(there)
        if len(found) == before:
            return found
    return reached(edges, found)


def reached(edges: Iterable[tuple[int, int]], start: Iterable[int]) -> set[int]:
    """States that can be reached from `start` over edges (state, state)."""
    onward: dict[int, list[int]] = {}
    for here, there in edges:
        onward.setdefault(here, []).append(there)
    seen, stack = set(start), list(start)
    while stack:
        for there in onward.get(stack.pop(), ()):
            if there not in seen:
                seen.add(there)
                stack.append(there)
    return seen
