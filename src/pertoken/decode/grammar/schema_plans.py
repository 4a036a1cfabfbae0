"""Shapes of arrays and objects as graphs whose edges name the schemas of the values on them.

A graph's states count what has to be counted and no more: the place in a prefix, members that must follow in order,
matches of `contains`, values used of `uniqueItems`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from itertools import product as every

from pertoken.decode.grammar.ir import Lit, Node, seq
from pertoken.decode.grammar.json_text import spelling
from pertoken.decode.grammar.schema_applicators import opposite
from pertoken.decode.grammar.schema_documents import TRUE, Conj, Unsupported
from pertoken.decode.grammar.schema_meaning import Meaning
from pertoken.decode.grammar.schema_shapes import Items, Members, Names
from pertoken.decode.grammar.schema_values import barred

MOST_STATES = 4096
COMMA, COLON = Lit(b","), Lit(b":")


@dataclass(frozen=True)
class Step:
    """An edge: texts before a value, the value's schemas (None: no value), how often (None: no limit)."""

    at: int
    lead: Node
    conj: Conj | None
    to: int
    least: int = 1
    most: int | None = 1


@dataclass
class Plan:
    """A graph from state 0 to its finals. It may be that nothing matches."""

    steps: list[Step] = field(default_factory=list)
    finals: list[int] = field(default_factory=list)
    numbers: dict[Hashable, int] = field(default_factory=dict)
    waiting: list[Hashable] = field(default_factory=list)

    def state(self, key: Hashable, keyword: str = "minItems") -> int:
        """Number of a state; a new one is noted as waiting."""
        if key not in self.numbers:
            if len(self.numbers) >= MOST_STATES:
                raise Unsupported(keyword, "#", f"counting takes more than {MOST_STATES} states; give smaller bounds")
            self.numbers[key] = len(self.numbers)
            self.waiting.append(key)
        return self.numbers[key]


def array(meaning: Meaning, shape: Items, comma: Node = COMMA) -> Plan:
    """Between the brackets."""
    if shape.unique and (shape.most is None or shape.most > 1):
        return _unique(meaning, shape, comma)
    if shape.contains:
        return _containing(meaning, shape, comma)
    plan = Plan()
    size = max(len(shape.prefix), 1)
    if shape.most is not None:
        size = min(size, shape.most)
    for i in range(size):
        plan.steps.append(Step(i, comma if i else Lit(b""), shape.at(i), i + 1))
    plan.finals = list(range(min(shape.least, size), size + 1)) if shape.least <= size else []
    if shape.most is None or shape.most > size:
        least = max(shape.least - size, 1)
        most = None if shape.most is None else shape.most - size
        plan.steps.append(Step(size, comma, shape.rest, size + 1, least, most))
        plan.finals.append(size + 1)
    return plan


def _containing(meaning: Meaning, shape: Items, comma: Node) -> Plan:
    """Items count in how many of `contains` they match: every item either does or provably does not."""
    plan = Plan()
    bounds = [least if most is None else most + 1 for _, _, least, most in shape.contains]
    last = max(len(shape.prefix), shape.least, *(start for start, *_ in shape.contains), 1)
    last = last if shape.most is None else max(last, shape.most + 1)
    plan.state((0, (0,) * len(bounds)), "contains")
    for key in plan.waiting:
        i, counts = key  # type: ignore[misc]
        here = plan.numbers[key]
        fits = all(c >= least and (most is None or c <= most)
                   for c, (_, _, least, most) in zip(counts, shape.contains, strict=True))  # fmt: skip
        if fits and i >= shape.least and (shape.most is None or i <= shape.most):
            plan.finals.append(here)
        if shape.most is not None and i >= shape.most:
            continue
        looked = [k for k, (start, *_) in enumerate(shape.contains) if i >= start]
        for answer in every((True, False), repeat=len(looked)):
            conj, after = shape.at(i), list(counts)
            for k, match in zip(looked, answer, strict=True):
                wanted = shape.contains[k][1]
                conj = conj | (wanted if match else opposite(wanted))
                after[k] = min(after[k] + match, bounds[k])
            if any(most is not None and c > most for c, (_, _, _, most) in zip(after, shape.contains, strict=True)):
                continue
            if not meaning.empty(conj):
                to = plan.state((min(i + 1, last), tuple(after)), "contains")
                plan.steps.append(Step(here, comma if i else Lit(b""), conj, to))
    return plan


def _unique(meaning: Meaning, shape: Items, comma: Node) -> Plan:
    """Items that are all different, where each has finitely many values."""
    plan = Plan()
    if shape.contains:
        raise Unsupported("uniqueItems", "#", "not beside contains")
    size = len(shape.prefix)
    plan.state((0, frozenset()), "uniqueItems")
    for key in plan.waiting:
        i, used = key  # type: ignore[misc]
        if len(used) >= shape.least:
            plan.finals.append(plan.numbers[key])
        if (shape.most is not None and len(used) >= shape.most) or barred(shape.at(i)):
            continue
        texts = finite(meaning, shape.at(i))
        if texts is None:
            raise Unsupported("uniqueItems", "#", "only arrays of finitely many values, such as enumerations, can be "
                              "kept from repeating one")  # fmt: skip
        for text in texts - used:
            to = plan.state((min(i + 1, size), used | {text}), "uniqueItems")
            lead = seq(comma, Lit(text.encode())) if used else Lit(text.encode())
            plan.steps.append(Step(plan.numbers[key], lead, None, to))
    return plan


def finite(meaning: Meaning, conj: Conj, most: int = 12) -> frozenset[str] | None:
    """All values of a schema as they are written, if these are few scalars."""
    values = meaning.of(conj)
    found = {"null"} if values.null else set()
    found |= {"true" if value else "false" for value in values.booleans}
    texts = values.numbers.texts(most)
    strings = [text.automaton.texts(most) for text in values.strings]
    if values.arrays or values.objects or texts is None or None in strings:
        return None
    found |= texts | {json.dumps(text, ensure_ascii=False) for some in strings for text in some or ()}
    return frozenset(found) if len(found) <= most else None


def members(
    meaning: Meaning, shape: Members, key_of: Callable[[Names], Node], comma: Node = COMMA, colon: Node = COLON
) -> Plan:
    """Between the braces: named members in their order, each at most once, then those of other names."""
    plan, size = Plan(), len(shape.order)
    named = [(name, shape.of(name), _flags(shape, lambda names, name=name: names.has(name))) for name in shape.order]
    named = [(name, conj if not meaning.empty(conj, 1) else None, flags) for name, conj, flags in named]
    others = [(key_of(names), conj, flags) for names, conj, flags in _others(meaning, shape)]
    possible = sum(conj is not None for _, conj, _ in named)
    counting = shape.least > max(len(shape.required), 1) or (
        shape.most is not None and (others or shape.most < possible)
    )
    if others and shape.least > max(len(shape.required), 1):
        raise Unsupported("minProperties", "#", "above 1 it needs additionalProperties: false, because a name that is "
                          "written twice would count twice")  # fmt: skip
    top = (shape.least if shape.most is None else shape.most + 1) if counting else 1
    goal = (1 << len(shape.some)) - 1
    plan.state((0, 0, 0), "minProperties")
    for key in plan.waiting:
        i, count, flags = key  # type: ignore[misc]
        here = plan.numbers[key]
        lead = comma if count else Lit(b"")
        if counting and shape.most is not None and count > shape.most:
            continue
        if i == size:
            if count >= min(shape.least, top) and flags == goal:
                plan.finals.append(here)
            for name, conj, found in others:
                to = plan.state((i, min(count + 1, top), flags | found), "maxProperties")
                plan.steps.append(Step(here, seq(lead, name, colon), conj, to))
            continue
        name, conj, found = named[i]
        if name not in shape.required:
            plan.steps.append(Step(here, Lit(b""), None, plan.state((i + 1, count, flags))))
        if conj is not None:
            to = plan.state((i + 1, min(count + 1, top), flags | found))
            written = Lit(spelling(name))
            plan.steps.append(Step(here, seq(lead, written, colon), conj, to))
    return plan


def _flags(shape: Members, inside: Callable[[Names], bool]) -> int:
    return sum(1 << k for k, names in enumerate(shape.some) if inside(names))


def _others(meaning: Meaning, shape: Members) -> list[tuple[Names, Conj, int]]:
    """Names that are not listed, in classes of equal treatment: the names, their values' schemas, which of `some`."""
    named = frozenset(shape.order)
    classes: list[tuple[Names, Conj, int]] = [(Names(named, inverted=True), TRUE, 0)]
    wanted = [(names, conj, 0) for names, conj in shape.rules]
    wanted += [(names, TRUE, 1 << k) for k, names in enumerate(shape.some)]
    for names, conj, flag in wanted:
        if names.other is None and not names.inverted and names.texts <= named:
            continue
        split = []
        for left, known, flags in classes:
            inside = left.meet(names)
            split.append((inside, known | conj, flags | flag))
            if names.other is not None or not names.inverted or not names.texts <= named:
                split.append((left.without(names), known, flags))
        classes = [entry for entry in split if not barred(entry[1]) and not entry[0].empty]
    return [(names, conj, flags) for names, conj, flags in classes if not meaning.empty(conj, 1)]
