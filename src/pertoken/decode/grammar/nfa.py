"""Rules as automata: bytes, calls of rules and counted repetitions on the edges.

`Builder` turns one node into an automaton with state 0 as its start and state 1 as its end. An edge is (state, first,
last, state): `first >= 0` reads a byte between first and last; `EPSILON` reads nothing; `CALL` reads what rule number
`last` matches; `COUNT` what repetition number `last` matches. `normal` makes rules fit for the engine: no rule matches
the empty text, none begins with itself, every state leads to the end.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from pertoken.decode.grammar.ir import Alt, Graph, Lit, Node, Ref, Repeat, Seq, Set, nullable, ranges, references

EPSILON, CALL, COUNT = -1, -2, -3
COPIES = 48  # a repetition is written out if that takes no more states than this
Edge = tuple[int, int, int, int]


@dataclass
class Nfa:
    """Automaton of one rule: `size` states, start 0, end 1."""

    edges: list[Edge] = field(default_factory=list)
    size: int = 2

    def state(self) -> int:
        self.size += 1
        return self.size - 1


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
    if isinstance(node, (Seq, Alt)):
        return sum(map(weight, node.items))
    if isinstance(node, Repeat):
        times = node.most if node.most is not None else node.least + 1
        size = weight(node.item)
        return size * times if size * times <= COPIES else size + 1
    return sum(weight(inner) for _, inner, _ in node.edges)


class Builder:
    """Numbers rules and repetitions while nodes become automata."""

    def __init__(self, rules: dict[str, Node], empty: dict[str, bool]):
        self.rules, self.empty = rules, empty
        self.numbers = {name: i for i, name in enumerate(rules)}
        self.names = list(rules)
        self.bodies: dict[Node, int] = {}
        self.counted: list[Counted] = []

    def build(self, node: Node) -> Nfa:
        nfa = Nfa()
        self._emit(nfa, node, 0, 1)
        return nfa

    def _body(self, node: Node) -> int:
        """Number of the rule made for the body of a repetition."""
        if isinstance(node, Ref):
            return self.numbers[node.name]
        if node not in self.bodies:
            name = f"repeated {len(self.bodies)}"
            self.bodies[node] = self.numbers[name] = len(self.names)
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
            for byte in data[:-1]:
                new = nfa.state()
                edges.append((at, byte, byte, new))
                at = new
            edges.append((at, data[-1], data[-1], after))
        elif isinstance(node, Set):
            edges.extend((at, low, high, after) for low, high in ranges(node.mask))
        elif isinstance(node, Ref):
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
