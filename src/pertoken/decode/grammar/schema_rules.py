"""Sets of JSON values as grammar rules: one rule for every set of schemas that a value must match."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

from pertoken.core.errors import BadRequest
from pertoken.decode.grammar.automaton import Automaton
from pertoken.decode.grammar.ir import EMPTY, Graph, Lit, Node, Ref, Repeat, alt, byte_set, literals, seq
from pertoken.decode.grammar.json_text import any_string, quoted, spelling, written
from pertoken.decode.grammar.nfa import spread
from pertoken.decode.grammar.regex import node_of
from pertoken.decode.grammar.regex_tree import Cat, Chars, Times, anchored
from pertoken.decode.grammar.schema_documents import Conj
from pertoken.decode.grammar.schema_meaning import Meaning
from pertoken.decode.grammar.schema_plans import Plan, array, members
from pertoken.decode.grammar.schema_shapes import EVERY_NAME, Names, Text
from pertoken.decode.grammar.schema_values import Values
from pertoken.decode.grammar.unicode import characters

NOTHING_SAID = Cat(())
MOST_RULES = 20_000
BLANKS = 32  # in a row, where blanks are allowed


class Rules:
    """rules: grammar rules of a schema and all it needs."""

    def __init__(self, meaning: Meaning, blanks: bool):
        self.meaning = meaning
        self.rules: dict[str, Node] = {}
        self.scalars: dict[Text | Names | Automaton, Node] = {}
        self.known: list[str] = []
        self.inline: dict[Conj, list[Node]] = {}
        self.gap: Node = Repeat(byte_set(b" \t\r\n"), 0, BLANKS) if blanks else Lit(b"")
        self.comma, self.colon = seq(self.gap, Lit(b","), self.gap), seq(self.gap, Lit(b":"), self.gap)
        self.plans: dict[Conj, list[tuple[bool, Plan]]] = {}
        self.names: dict[Conj, str] = {}

    def add(self, root: Conj) -> str:
        """Make the rules for values that match `root`; the name of the first. Raises `BadRequest` if there are none."""
        self._plan(root)
        alive = self._alive()
        if root not in alive:
            raise BadRequest("the schema allows no value at all: its keywords exclude each other; remove some")
        for conj, plans in self.plans.items():
            if conj in alive:
                self.rules[self._name(conj)] = alt(
                    *self._scalars(conj),
                    *(self._wrapped(is_object, plan, alive) for is_object, plan in plans),
                )
        return self._name(root)

    def _name(self, conj: Conj) -> str:
        if conj not in self.names:
            numbers = [number if sign else -number for number, sign in sorted(conj)]
            self.names[conj] = f"value {' '.join(map(str, numbers))}".strip()
        return self.names[conj]

    def _plan(self, root: Conj) -> None:
        """Plans of all values that `root` leads to."""
        waiting = [root]
        for conj in waiting:
            if conj in self.plans:
                continue
            if len(self.plans) >= MOST_RULES:
                raise BadRequest(f"the schema needs more than {MOST_RULES} rules; combine fewer schemas at one place")
            values = self.meaning.of(conj)
            plans = [(False, array(self.meaning, shape, self.comma)) for shape in values.arrays]
            for shape in values.objects:
                plans.append((True, members(self.meaning, shape, self._key, self.comma, self.colon)))
            self.plans[conj] = plans
            waiting += [step.conj for _, plan in plans for step in plan.steps if step.conj is not None]

    def _alive(self) -> set[Conj]:
        """Schemas that some finite value matches."""
        alive = {conj for conj in self.plans if self._scalars(conj)}
        changed = True
        while changed:
            changed = False
            for conj, plans in reversed(self.plans.items()):
                if conj not in alive and any(self._live(plan, alive) for _, plan in plans):
                    alive.add(conj)
                    changed = True
        return alive

    @staticmethod
    def _live(plan: Plan, alive: set[Conj]) -> set[int]:
        """States that are on a way from the start to an end."""
        pairs = [(step.at, step.to) for step in plan.steps if step.conj is None or step.conj in alive]
        live = spread(pairs, [0]) & spread([(to, at) for at, to in reversed(pairs)], plan.finals)
        return live if 0 in live else set()

    def _wrapped(self, is_object: bool, plan: Plan, alive: set[Conj]) -> Node:
        live = self._live(plan, alive)
        if not live:
            return EMPTY
        edges = []
        for step in plan.steps:
            if step.at in live and step.to in live and (step.conj is None or step.conj in alive):
                node = step.lead if step.conj is None else seq(step.lead, self._value(step.conj))
                if (step.least, step.most) != (1, 1):
                    node = Repeat(node, step.least, step.most)
                edges.append((step.at, node, step.to))
        inner = Graph(tuple(edges), tuple(state for state in plan.finals if state in live))
        opening, closing = (b"{", b"}") if is_object else (b"[", b"]")
        return seq(Lit(opening), self.gap, inner, self.gap, Lit(closing))

    def _value(self, conj: Conj) -> Node:
        """A value inside another: a scalar that is short to say stands there itself, any other is called."""
        if not self.plans[conj]:
            return alt(*self._scalars(conj))
        return Ref(self._name(conj))

    def _scalars(self, conj: Conj) -> list[Node]:
        """The scalars among the values that match."""
        found = self.inline.get(conj)
        if found is None:
            found = self.inline[conj] = list(self._written(self.meaning.of(conj)))
        return found

    def _written(self, values: Values) -> Iterator[Node]:
        if values.null:
            yield Lit(b"null")
        for value, text in ((True, b"true"), (False, b"false")):
            if value in values.booleans:
                yield Lit(text)
        if not values.numbers.empty:
            yield self._number(values.numbers)
        for text in values.strings:
            node = self._string(text)
            if node != EMPTY:
                yield node

    def _number(self, numbers: Automaton) -> Node:
        return number_node(numbers) if numbers.listed is not None else self._rule(numbers, number_node)

    def _string(self, text: Text) -> Node:
        """A few words stand where they are used, any other set of strings is a rule of its own: what its positions do
        to a vocabulary is then known for all schemas that have it."""
        if len(text.parts) == 1 and text.least == 0 and text.most is None:
            (part,) = text.parts
            if isinstance(part, Automaton) and part.listed is not None:
                return literals(map(spelling, part.listed))
        return self._rule(text, string_node)

    def _key(self, names: Names) -> Node:
        """A member's name out of a set, in quotes."""
        return self._string(Text()) if names == EVERY_NAME else self._rule(names, name_node)

    def _rule(self, texts: Text | Names | Automaton, make: Callable[[Any], Node]) -> Node:
        """A call of the rule of these texts; `EMPTY` if there are none."""
        if texts not in self.scalars:
            name, node = f"scalar {len(self.scalars)}", make(texts)
            self.scalars[texts] = EMPTY if node == EMPTY else Ref(name)
            self.rules[name] = node
            self.known.append(name)
        return self.scalars[texts]


@lru_cache(maxsize=1024)
def string_node(text: Text) -> Node:
    """Strings, in quotes."""
    if not text.parts:
        return any_string(text.least, text.most)
    part, free = text.parts[0], text.least == 0 and text.most is None
    if len(text.parts) == 1 and not isinstance(part, Automaton):
        if free and not anchored(part):
            return quoted(node_of(part, written))
        if isinstance(part, Cat) and len(part.items) == 3 and part.items[0] == part.items[2] == NOTHING_SAID:
            inner = part.items[1]
            if isinstance(inner, Times) and isinstance(inner.item, Chars):
                least = max(inner.least, text.least)
                most = min((n for n in (inner.most, text.most) if n is not None), default=None)
                ends = most is None or least <= most
                return quoted(Repeat(written(inner.item.ranges), least, most)) if ends else EMPTY
    return quoted(text.automaton.node(written))


@lru_cache(maxsize=1024)
def number_node(numbers: Automaton) -> Node:
    if numbers.listed is not None:
        return literals(text.encode() for text in numbers.listed)
    return numbers.node(characters)


@lru_cache(maxsize=1024)
def name_node(names: Names) -> Node:
    """Names of members, in quotes."""
    return quoted(names.automaton.node(written))
