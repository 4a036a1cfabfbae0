"""JSON Schema keywords that combine schemas or name values: references, `enum`, `allOf`, `oneOf`, `if` and so on.

Each function gets the whole schema and the sign that it is read with; see `schema_meaning`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import combinations
from typing import TYPE_CHECKING, Any

from pertoken.core.errors import BadRequest
from pertoken.decode.grammar.schema_applicators import opposite
from pertoken.decode.grammar.schema_documents import Unsupported
from pertoken.decode.grammar.schema_keywords import scalars
from pertoken.decode.grammar.schema_values import ANYTHING, NOTHING, Values, any_of

if TYPE_CHECKING:
    from pertoken.decode.grammar.schema_meaning import Meaning

MOST_COMBINED = 6
Schema = dict[str, Any]


def reference(meaning: Meaning, number: int, schema: Schema, sign: bool, track: bool) -> Values:
    conj = meaning.documents.resolve(number, schema["$ref"], "$ref")
    return meaning.of(conj if sign else opposite(conj), track)


def dynamic(meaning: Meaning, number: int, schema: Schema, sign: bool, track: bool) -> Values:
    name = schema["$dynamicRef"].partition("#")[2]
    if len(meaning.documents.dynamic.get(name, ())) > 1:
        raise Unsupported("$dynamicRef", meaning.documents.paths[number], f"several schemas are called {name!r}")
    conj = meaning.documents.resolve(number, schema["$dynamicRef"], "$dynamicRef")
    return meaning.of(conj if sign else opposite(conj), track)


def enumeration(meaning: Meaning, number: int, schema: Schema, sign: bool, track: bool) -> Values:
    given = schema["enum"]
    if not isinstance(given, list):
        raise BadRequest(f"{meaning.documents.paths[number]}/enum: {given!r} is no list of values")
    return _constants(meaning, number, given, sign)


def constant(meaning: Meaning, number: int, schema: Schema, sign: bool, track: bool) -> Values:
    return _constants(meaning, number, [schema["const"]], sign)


def _constants(meaning: Meaning, number: int, given: list[Any], sign: bool) -> Values:
    """These values, or all others; an array or object is a schema of its own that allows nothing else."""
    found = scalars((value for value in given if not isinstance(value, (list, dict))), sign)
    for value in given:
        if isinstance(value, (list, dict)):
            if id(value) not in meaning.made:
                meaning.made[id(value)] = (meaning.documents.enter(_literal(value), "", "#", 2020), value)
            part = meaning.schema(meaning.made[id(value)][0], sign, False)
            found = found.join(part) if sign else found.meet(part)
    return found


def all_of(meaning: Meaning, number: int, schema: Schema, sign: bool, track: bool) -> Values:
    parts = [meaning.signed(inner, number, sign, track) for inner in schema["allOf"]]
    return _meet(parts) if sign else any_of(parts)


def some_of(meaning: Meaning, number: int, schema: Schema, sign: bool, track: bool) -> Values:
    parts = [meaning.signed(inner, number, sign, track) for inner in schema["anyOf"]]
    if not sign:
        return _meet(parts)
    if not track:
        return any_of(parts)
    if len(parts) > MOST_COMBINED:
        raise Unsupported("anyOf", meaning.documents.paths[number],
                          f"beside unevaluated... it may have at most {MOST_COMBINED} alternatives")  # fmt: skip
    return any_of(_meet(c) for n in range(1, len(parts) + 1) for c in combinations(parts, n))


def one_of(meaning: Meaning, number: int, schema: Schema, sign: bool, track: bool) -> Values:
    parts = [meaning.signed(inner, number, True, track and sign) for inner in schema["oneOf"]]
    overlapping = [pair for pair in combinations(range(len(parts)), 2)
                   if not meaning.void(parts[pair[0]].meet(parts[pair[1]]), 3)]  # fmt: skip
    if not sign:
        none = _meet(meaning.signed(inner, number, False) for inner in schema["oneOf"])
        return none.join(any_of(parts[i].meet(parts[j]) for i, j in overlapping))
    found = []
    for i, part in enumerate(parts):
        others = [schema["oneOf"][a + b - i] for a, b in overlapping if i in (a, b)]
        try:
            found.append(_meet([part, *(meaning.signed(other, number, False) for other in others)]))
        except Unsupported as error:
            raise Unsupported(
                "oneOf",
                meaning.documents.paths[number],
                "alternatives overlap, and what matches only "
                f"one of them cannot be told ({error.keyword} would have to be negated)",
            ) from error
    return any_of(found)


def negation(meaning: Meaning, number: int, schema: Schema, sign: bool, track: bool) -> Values:
    return meaning.signed(schema["not"], number, not sign)


def condition(meaning: Meaning, number: int, schema: Schema, sign: bool, track: bool) -> Values:
    holds = meaning.signed(schema["if"], number, True, track)
    then = meaning.signed(schema.get("then", True), number, sign, track)
    other = meaning.signed(schema.get("else", True), number, sign, track)
    if holds == ANYTHING or schema["if"] is True:
        return then
    if other == NOTHING and then == NOTHING:
        return NOTHING
    if other == ANYTHING and then == ANYTHING and not track:
        return ANYTHING
    return holds.meet(then).join(meaning.signed(schema["if"], number, False).meet(other))


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


LOGIC: dict[str, Callable[[Meaning, int, Schema, bool, bool], Values]] = {
    "$ref": reference,
    "$dynamicRef": dynamic,
    "enum": enumeration,
    "const": constant,
    "allOf": all_of,
    "anyOf": some_of,
    "oneOf": one_of,
    "not": negation,
    "if": condition,
}
