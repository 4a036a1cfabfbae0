"""What schemas mean: `Meaning.of` gives the set of values that match schemas, or do not.

Keywords are taken together by intersection, and their negations by union, so that `not`, `oneOf`, `if` and
`dependentSchemas` follow from the same functions read with the other sign. Schemas at the same place (`$ref`, `allOf`,
...) are worked out at once, those of inner values only named. `unevaluated...` looks at which items and members the
shapes have `seen`; where it does, the alternatives of `anyOf` are taken in every combination.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import combinations
from typing import Any

from pertoken.core.errors import BadRequest
from pertoken.decode.grammar.schema_applicators import APPLICATORS, opposite
from pertoken.decode.grammar.schema_documents import KNOWN, TRUE, Conj, Documents, Unsupported
from pertoken.decode.grammar.schema_keywords import PLAIN, scalars
from pertoken.decode.grammar.schema_values import (
    ANYTHING,
    EVERY,
    EVERY_NAME,
    NOTHING,
    Values,
    any_of,
    barred,
)

MOST_COMBINED = 6


class Meaning:
    """formats: whether `format` is asserted (else it is a note, as the specification has it)."""

    def __init__(self, documents: Documents, formats: bool):
        self.documents, self.formats = documents, formats
        self.known: dict[tuple[int, bool, bool], Values] = {}
        self.working: list[tuple[int, bool, bool]] = []
        self.made: dict[int, Any] = {}

    def of(self, conj: Conj, track: bool = False) -> Values:
        """Values that match all schemas of `conj`."""
        if barred(conj):
            return NOTHING
        found = ANYTHING
        for number, sign in sorted(conj):
            found = found.meet(self._schema(number, sign, track))
        return found

    def signed(self, schema: Any, near: int, sign: bool, track: bool = False) -> Values:
        """Values that match a schema, or do not."""
        conj = self.documents.conj(schema, near)
        return self.of(conj, track) if sign else self.of(opposite(conj), track)

    def empty(self, conj: Conj, depth: int = 3) -> bool:
        """Whether schemas provably allow nothing; looks only so deep into values."""
        return barred(conj) or void(self, self.of(conj), depth)

    def _schema(self, number: int, sign: bool, track: bool) -> Values:
        key = (number, sign, track)
        if key not in self.known:
            if key in self.working:
                raise BadRequest(
                    f"the schema at {self.documents.paths[number] or '#'} refers to itself without going into a value, "
                    "so that it says nothing; remove that reference"
                )
            self.working.append(key)
            self.known[key] = self._keywords(number, sign, track)
            self.working.pop()
        return self.known[key]

    def _keywords(self, number: int, sign: bool, track: bool) -> Values:
        if number == 0:
            return ANYTHING if sign else NOTHING
        schema = self.documents.schemas[number]
        old = self.documents.drafts[number] == 7
        if old and "$ref" in schema:
            schema = {"$ref": schema["$ref"]}
        for keyword in schema:
            if keyword not in KNOWN:
                raise Unsupported(keyword, self.documents.paths[number], "it is not known here")
        late = [keyword for keyword in ("unevaluatedItems", "unevaluatedProperties") if keyword in schema and not old]
        sees = sign and (track or bool(late))
        found: list[Values] = []
        for keyword, argument in sorted(schema.items(), key=lambda entry: entry[0] != "properties"):
            where = f"{self.documents.paths[number] or '#'}/{keyword}"
            if keyword in PLAIN:
                if keyword != "format" or self.formats:
                    found.append(PLAIN[keyword](argument, where, sign))
            elif keyword in INSIDE:
                if keyword in (NEWER if old else OLDER):
                    raise Unsupported(keyword, self.documents.paths[number], "another draft has this keyword")
                found.append(INSIDE[keyword](self, number, schema, sign, sees))
        if not sign:
            if late:
                raise Unsupported(late[0], self.documents.paths[number], "it cannot be negated")
            return any_of(found)
        whole = ANYTHING
        for values in found:
            whole = whole.meet(values)
        if late:
            whole = self._unevaluated(number, schema, whole, late)
        return whole if track else whole.plain()

    def _unevaluated(self, number: int, schema: dict[str, Any], values: Values, late: list[str]) -> Values:
        """`values` with the items and members that no keyword of this schema has seen held to a schema."""
        if "unevaluatedItems" in late:
            rest = self.documents.conj(schema["unevaluatedItems"], number)
            arrays = []
            for shape in values.arrays:
                if shape.contains and shape.seen < EVERY and rest != TRUE:
                    raise Unsupported("unevaluatedItems", self.documents.paths[number], "not beside contains")
                size = max(len(shape.prefix), min(shape.seen, EVERY - 1) if shape.seen < EVERY else 0)
                prefix = tuple(shape.at(i) | (rest if i >= shape.seen else TRUE) for i in range(size))
                after = shape.rest | (rest if shape.seen < EVERY else TRUE)
                arrays.append(replace(shape, prefix=prefix, rest=after, seen=EVERY))
            values = replace(values, arrays=tuple(arrays))
        if "unevaluatedProperties" in late:
            rest = self.documents.conj(schema["unevaluatedProperties"], number)
            objects = []
            for shape in values.objects:
                left = EVERY_NAME
                for seen in shape.seen:
                    left = left.without(seen)
                objects.append(replace(shape, rules=(*shape.rules, (left, rest)), seen=(EVERY_NAME,)))
            values = replace(values, objects=tuple(objects))
        return values

    def reference(self, number: int, schema: dict[str, Any], sign: bool, track: bool) -> Values:
        conj = self.documents.resolve(number, schema["$ref"], "$ref")
        return self.of(conj if sign else opposite(conj), track)

    def dynamic(self, number: int, schema: dict[str, Any], sign: bool, track: bool) -> Values:
        name = schema["$dynamicRef"].partition("#")[2]
        if len(self.documents.dynamic.get(name, ())) > 1:
            raise Unsupported("$dynamicRef", self.documents.paths[number], f"several schemas are called {name!r}")
        conj = self.documents.resolve(number, schema["$dynamicRef"], "$dynamicRef")
        return self.of(conj if sign else opposite(conj), track)

    def enumeration(self, number: int, schema: dict[str, Any], sign: bool, track: bool) -> Values:
        given = schema["enum"]
        if not isinstance(given, list):
            raise BadRequest(f"{self.documents.paths[number]}/enum: {given!r} is no list of values")
        return self._constants(number, given, sign)

    def constant(self, number: int, schema: dict[str, Any], sign: bool, track: bool) -> Values:
        return self._constants(number, [schema["const"]], sign)

    def _constants(self, number: int, given: list[Any], sign: bool) -> Values:
        """These values, or all others; an array or object is a schema of its own that allows nothing else."""
        found = scalars((value for value in given if not isinstance(value, (list, dict))), sign)
        for value in given:
            if isinstance(value, (list, dict)):
                if id(value) not in self.made:
                    self.made[id(value)] = (self.documents.enter(_literal(value), "", "#", 2020), value)
                part = self._schema(self.made[id(value)][0], sign, False)
                found = found.join(part) if sign else found.meet(part)
        return found

    def all_of(self, number: int, schema: dict[str, Any], sign: bool, track: bool) -> Values:
        parts = [self.signed(inner, number, sign, track) for inner in schema["allOf"]]
        return _meet(parts) if sign else any_of(parts)

    def some_of(self, number: int, schema: dict[str, Any], sign: bool, track: bool) -> Values:
        parts = [self.signed(inner, number, sign, track) for inner in schema["anyOf"]]
        if not sign:
            return _meet(parts)
        if not track:
            return any_of(parts)
        if len(parts) > MOST_COMBINED:
            raise Unsupported("anyOf", self.documents.paths[number],
                              f"beside unevaluated... it may have at most {MOST_COMBINED} alternatives")  # fmt: skip
        return any_of(_meet(c) for n in range(1, len(parts) + 1) for c in combinations(parts, n))

    def one_of(self, number: int, schema: dict[str, Any], sign: bool, track: bool) -> Values:
        parts = [self.signed(inner, number, True, track and sign) for inner in schema["oneOf"]]
        overlapping = [pair for pair in combinations(range(len(parts)), 2)
                       if not void(self, parts[pair[0]].meet(parts[pair[1]]), 3)]  # fmt: skip
        if not sign:
            none = _meet(self.signed(inner, number, False) for inner in schema["oneOf"])
            return none.join(any_of(parts[i].meet(parts[j]) for i, j in overlapping))
        found = []
        for i, part in enumerate(parts):
            others = [schema["oneOf"][a + b - i] for a, b in overlapping if i in (a, b)]
            try:
                found.append(_meet([part, *(self.signed(other, number, False) for other in others)]))
            except Unsupported as error:
                raise Unsupported(
                    "oneOf",
                    self.documents.paths[number],
                    "alternatives overlap, and what matches only "
                    f"one of them cannot be told ({error.keyword} would have to be negated)",
                ) from error
        return any_of(found)

    def negation(self, number: int, schema: dict[str, Any], sign: bool, track: bool) -> Values:
        return self.signed(schema["not"], number, not sign)

    def condition(self, number: int, schema: dict[str, Any], sign: bool, track: bool) -> Values:
        holds = self.signed(schema["if"], number, True, track)
        then = self.signed(schema.get("then", True), number, sign, track)
        other = self.signed(schema.get("else", True), number, sign, track)
        if holds == ANYTHING or schema["if"] is True:
            return then
        if other == NOTHING and then == NOTHING:
            return NOTHING
        if other == ANYTHING and then == ANYTHING and not track:
            return ANYTHING
        return holds.meet(then).join(self.signed(schema["if"], number, False).meet(other))


def _meet(sets: Iterable[Values]) -> Values:
    found = ANYTHING
    for values in sets:
        found = found.meet(values)
    return found


def _literal(value: Any) -> dict[str, Any]:
    """A schema of exactly this array or object."""
    if isinstance(value, list):
        return {"type": "array", "prefixItems": [{"const": item} for item in value], "minItems": len(value),
                "maxItems": len(value)}  # fmt: skip
    return {"type": "object", "properties": {name: {"const": item} for name, item in value.items()},
            "required": list(value), "additionalProperties": False}  # fmt: skip


def void(meaning: Meaning, values: Values, depth: int) -> bool:
    """Whether a set of values is provably empty."""
    if values.null or values.booleans or not values.numbers.empty:
        return False
    if not all(text.parts and text.automaton.empty for text in values.strings):
        return False
    if depth == 0:
        return not values.arrays and not values.objects
    for items in values.arrays:
        if not any(meaning.empty(items.at(i), depth - 1) for i in range(min(items.least, len(items.prefix) + 1))):
            return False
    for members in values.objects:
        if not any(meaning.empty(members.of(name), depth - 1) for name in members.order if name in members.required):
            return False
    return True


NEWER = {"prefixItems", "dependentRequired", "dependentSchemas", "$dynamicRef", "minContains", "maxContains"}
OLDER = {"additionalItems"}
INSIDE: dict[str, Callable[[Meaning, int, dict[str, Any], bool, bool], Values]] = {
    "$ref": Meaning.reference,
    "$dynamicRef": Meaning.dynamic,
    "enum": Meaning.enumeration,
    "const": Meaning.constant,
    "allOf": Meaning.all_of,
    "anyOf": Meaning.some_of,
    "oneOf": Meaning.one_of,
    "not": Meaning.negation,
    "if": Meaning.condition,
    **APPLICATORS,
}
