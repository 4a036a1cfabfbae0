"""JSON Schema keywords that say what items and members must match: shapes of arrays and objects.

Each function gets the whole schema, because these keywords look at their neighbours; see `schema_meaning`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pertoken.core.errors import BadRequest
from pertoken.decode.grammar.automaton import ALL, NONE, difference, union
from pertoken.decode.grammar.regex_automaton import automaton
from pertoken.decode.grammar.schema_documents import FALSE, TRUE, Conj, Unsupported
from pertoken.decode.grammar.schema_keywords import count, either, holding, names, read_pattern, without
from pertoken.decode.grammar.schema_shapes import EVERY, EVERY_NAME, Items, Members, Names
from pertoken.decode.grammar.schema_values import ANYTHING, NOTHING, Values, any_of, anything

if TYPE_CHECKING:
    from pertoken.decode.grammar.schema_meaning import Meaning

Schema = dict[str, Any]


def opposite(conj: Conj) -> Conj:
    """Not this schema (one, or none)."""
    if not conj:
        return FALSE
    ((number, sign),) = conj
    return TRUE if number == 0 else frozenset({(number, not sign)})


def _table(meaning: Meaning, number: int, schema: Schema, keyword: str) -> Schema:
    found = schema.get(keyword, {})
    if not isinstance(found, dict):
        raise BadRequest(f"{meaning.documents.paths[number]}/{keyword}: {found!r} is no object")
    return found


def properties(meaning: Meaning, number: int, schema: Schema, sign: bool, track: bool) -> Values:
    given = {name: meaning.documents.conj(inner, number) for name, inner in
             _table(meaning, number, schema, "properties").items()}  # fmt: skip
    if sign:
        rules = tuple((Names(frozenset({name})), conj) for name, conj in given.items())
        shape = Members(rules, tuple(given), seen=(Names(frozenset(given)),) if track else ())
        return anything(objects=(shape,))
    broken = []
    for name, conj in given.items():
        rules = ((Names(frozenset({name})), opposite(conj)),)
        broken.append(Members(rules, (name,), frozenset({name}), 1))
    return Values(objects=tuple(broken))


def _patterns(meaning: Meaning, number: int, schema: Schema) -> list[tuple[Names, Conj]]:
    where = f"{meaning.documents.paths[number] or '#'}/patternProperties"
    return [
        (
            Names(other=automaton(read_pattern(pattern, "patternProperties", where))),
            meaning.documents.conj(inner, number),
        )
        for pattern, inner in _table(meaning, number, schema, "patternProperties").items()
    ]


def pattern_properties(meaning: Meaning, number: int, schema: Schema, sign: bool, track: bool) -> Values:
    given = _patterns(meaning, number, schema)
    if sign:
        return anything(objects=(Members(tuple(given), seen=tuple(name for name, _ in given) if track else ()),))
    return any_of(_breaking(meaning, number, rule, "patternProperties") for rule in given)


def _breaking(meaning: Meaning, number: int, rule: tuple[Names, Conj], keyword: str) -> Values:
    """Objects with a member whose name is in a set and whose value does not match.

    Only where such a value is any value: a name may be written twice, and then the last value is the one that counts.
    """
    name, conj = rule
    if conj == TRUE:
        return NOTHING
    if not meaning.empty(conj):
        raise Unsupported(keyword, meaning.documents.paths[number], "it can be negated only where its schema is false")
    return Values(objects=(Members(least=1, some=(name,)),))


def additional_properties(meaning: Meaning, number: int, schema: Schema, sign: bool, track: bool) -> Values:
    left = Names(frozenset(_table(meaning, number, schema, "properties")), inverted=True)
    for name, _ in _patterns(meaning, number, schema):
        left = left.without(name)
    conj = meaning.documents.conj(schema["additionalProperties"], number)
    if sign:
        return anything(objects=(Members(((left, conj),), seen=(EVERY_NAME,) if track else ()),))
    return _breaking(meaning, number, (left, conj), "additionalProperties")


def property_names(meaning: Meaning, number: int, schema: Schema, sign: bool, track: bool) -> Values:
    allowed = NONE
    for text in meaning.of(meaning.documents.conj(schema["propertyNames"], number)).strings:
        allowed = ALL if text.automaton is ALL else union(allowed, text.automaton)
    if allowed is ALL:
        return ANYTHING if sign else NOTHING
    others = Names(other=difference(ALL, allowed))
    if sign:
        return anything(objects=(Members(((others, FALSE),)),))
    return Values(objects=(Members(least=1, some=(others,)),))


def dependencies(keyword: str) -> Callable[[Meaning, int, Schema, bool, bool], Values]:
    """`dependentRequired`, `dependentSchemas`, and draft 7's `dependencies`, which is both."""

    def dependent(meaning: Meaning, number: int, schema: Schema, sign: bool, track: bool) -> Values:
        parts = []
        for name, needed in _table(meaning, number, schema, keyword).items():
            holds = Values(objects=(holding([name]),))
            if isinstance(needed, list):
                where = f"{meaning.documents.paths[number]}/{keyword}"
                all_there = Values(objects=(holding(names(needed, where)),))
                some_missing = Values(objects=tuple(without(other) for other in needed))
                then = all_there if sign else some_missing
            else:
                then = meaning.signed(needed, number, sign, track)
            both = holds.meet(then)
            parts.append(either(True, {"objects": (without(name),)}, {}).join(both) if sign else both)
        if not sign:
            return any_of(parts)
        found = ANYTHING
        for part in parts:
            found = found.meet(part)
        return found

    return dependent


def _array(sign: bool, shape: Items, broken: list[Items]) -> Values:
    return either(sign, {"arrays": (shape,)}, {"arrays": tuple(broken)})


def prefix_items(meaning: Meaning, number: int, schema: Schema, sign: bool, track: bool) -> Values:
    return _prefix(meaning, number, schema["prefixItems"], sign)


def _prefix(meaning: Meaning, number: int, given: Any, sign: bool) -> Values:
    if not isinstance(given, list):
        raise BadRequest(f"{meaning.documents.paths[number]}: {given!r} is no list of schemas")
    conjs = tuple(meaning.documents.conj(inner, number) for inner in given)
    broken = [Items((TRUE,) * i + (opposite(conj),), least=i + 1) for i, conj in enumerate(conjs)]
    return _array(sign, Items(conjs, seen=len(conjs)), broken)


def _rest(meaning: Meaning, number: int, given: Any, first: int, sign: bool) -> Values:
    """Items from the `first` on."""
    conj = meaning.documents.conj(given, number)
    broken = [] if conj == TRUE else [Items(contains=((first, opposite(conj), 1, None),), least=first + 1)]
    return _array(sign, Items((TRUE,) * first, conj, seen=EVERY), broken)


def items(meaning: Meaning, number: int, schema: Schema, sign: bool, track: bool) -> Values:
    given = schema["items"]
    if isinstance(given, list):
        if meaning.documents.drafts[number] != 7:
            raise Unsupported(
                "items", meaning.documents.paths[number], "a list of schemas is prefixItems since 2020-12"
            )
        return _prefix(meaning, number, given, sign)
    return _rest(meaning, number, given, len(schema.get("prefixItems", ())), sign)


def additional_items(meaning: Meaning, number: int, schema: Schema, sign: bool, track: bool) -> Values:
    if not isinstance(schema.get("items"), list):
        return ANYTHING if sign else NOTHING
    return _rest(meaning, number, schema["additionalItems"], len(schema["items"]), sign)


def contains(meaning: Meaning, number: int, schema: Schema, sign: bool, track: bool) -> Values:
    conj = meaning.documents.conj(schema["contains"], number)
    where = meaning.documents.paths[number] or "#"
    least = count(schema.get("minContains", 1), f"{where}/minContains")
    most = count(schema["maxContains"], f"{where}/maxContains") if "maxContains" in schema else None
    broken = []
    if least > 0:
        broken.append(Items(contains=((0, conj, 0, least - 1),)))
    if most is not None:
        broken.append(Items(contains=((0, conj, most + 1, None),), least=most + 1))
    if least == 0 and most is None and not track:
        return ANYTHING if sign else NOTHING
    if most is not None and least > most:
        return _array(sign, Items(least=1, most=0), [Items()]) if not sign else anything(arrays=())
    return _array(sign, Items(contains=((0, conj, least, most),), least=least), broken)


APPLICATORS: dict[str, Callable[[Meaning, int, Schema, bool, bool], Values]] = {
    "properties": properties,
    "patternProperties": pattern_properties,
    "additionalProperties": additional_properties,
    "propertyNames": property_names,
    "dependentRequired": dependencies("dependentRequired"),
    "dependentSchemas": dependencies("dependentSchemas"),
    "dependencies": dependencies("dependencies"),
    "prefixItems": prefix_items,
    "items": items,
    "additionalItems": additional_items,
    "contains": contains,
}
