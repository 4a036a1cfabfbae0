"""JSON Schema keywords that look at a value itself, not at values inside it: the set of values that match, or do not.

Each function gets the keyword's argument, where it stands (for messages) and `sign`: True for the values that match,
False for those that do not. A keyword about one type lets all values of other types through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from decimal import Decimal
from functools import lru_cache
from typing import Any

from pertoken.core.errors import BadRequest
from pertoken.decode.grammar.automaton import ALL, NONE, Automaton, difference, union, words
from pertoken.decode.grammar.formats import FORMATS
from pertoken.decode.grammar.json_text import DECIMALS, INTEGERS, NUMBERS, WHOLE, bound, exactly, multiples, spelled
from pertoken.decode.grammar.regex_automaton import automaton
from pertoken.decode.grammar.regex_reader import parse
from pertoken.decode.grammar.regex_tree import Regex, search
from pertoken.decode.grammar.schema_documents import FALSE, Unsupported
from pertoken.decode.grammar.schema_shapes import Items, Members, Names, Text
from pertoken.decode.grammar.schema_values import ANYTHING, NOTHING, Values, anything

TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
BOTH = frozenset({True, False})


def either(sign: bool, matching: dict[str, Any], others: dict[str, Any]) -> Values:
    """Values of one type that match (and all of other types), or those that do not."""
    return anything(**matching) if sign else Values(**others)


def count(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value) or value < 0:
        raise BadRequest(f"{where}: {value!r} is no count; give a whole number of at least 0")
    return int(value)


def number(value: Any, where: str) -> Decimal:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BadRequest(f"{where}: {value!r} is no number")
    return Decimal(repr(value))


def names(value: Any, where: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise BadRequest(f"{where}: {value!r} is no list of names")
    return value


def types(value: Any, where: str, sign: bool) -> Values:
    wanted = [value] if isinstance(value, str) else value
    if not isinstance(wanted, list) or not wanted or any(kind not in TYPES for kind in wanted):
        raise BadRequest(f"{where}: {value!r} is no type; give one of {', '.join(TYPES)}, or a list of them")
    return _of_types(frozenset(wanted), sign)


@lru_cache(maxsize=256)
def _of_types(wanted: frozenset[str], sign: bool) -> Values:
    if sign:
        numbers = NUMBERS if "number" in wanted else INTEGERS if "integer" in wanted else NONE
    else:
        numbers = NONE if "number" in wanted else difference(DECIMALS, WHOLE) if "integer" in wanted else NUMBERS
    return Values(
        ("null" in wanted) == sign,
        BOTH if ("boolean" in wanted) == sign else frozenset(),
        numbers,
        ANYTHING.strings if ("string" in wanted) == sign else (),
        ANYTHING.arrays if ("array" in wanted) == sign else (),
        ANYTHING.objects if ("object" in wanted) == sign else (),
    )


def scalars(given: Iterable[Any], sign: bool) -> Values:
    """Exactly these scalar values, or all but these. An integer is written without a fraction."""
    given = list(given)
    strings = words(value for value in given if isinstance(value, str))
    kinds = {id(value) for value in given if value is None or isinstance(value, bool)}
    null = id(None) in kinds
    booleans = frozenset(value for value in (True, False) if id(value) in kinds)
    numbers = [value for value in given if isinstance(value, (int, float)) and not isinstance(value, bool)]
    if sign:
        whole = [int(value) for value in numbers if value == value // 1 and abs(value) < 1 << 53]
        found: Automaton = NONE
        for value in [*numbers, *whole]:
            found = union(found, spelled(value))
        return Values(null, booleans, found, () if strings.empty else (Text(parts=(strings,)),))
    found = NUMBERS
    if numbers:
        found = DECIMALS
        for value in numbers:
            found = difference(found, exactly(Decimal(repr(value))))
    others = (Text(),) if strings.empty else (Text(parts=(difference(ALL, strings),)),)
    return anything(null=not null, booleans=BOTH - booleans, numbers=found, strings=others)


def min_length(value: Any, where: str, sign: bool) -> Values:
    least = count(value, where)
    return either(sign, {"strings": (Text(least),)}, {"strings": (Text(0, least - 1),) if least else ()})


def max_length(value: Any, where: str, sign: bool) -> Values:
    most = count(value, where)
    return either(sign, {"strings": (Text(0, most),)}, {"strings": (Text(most + 1),)})


def _matching(pattern: Regex, sign: bool) -> Values:
    if sign:
        return anything(strings=(Text(parts=(pattern,)),))
    return Values(strings=(Text(parts=(difference(ALL, automaton(pattern)),)),))


def pattern(value: Any, where: str, sign: bool) -> Values:
    if not isinstance(value, str):
        raise BadRequest(f"{where}: {value!r} is no pattern; give a string")
    return _matching(read_pattern(value, "pattern", where), sign)


def read_pattern(value: str, keyword: str, where: str) -> Regex:
    """The strings that a pattern matches somewhere."""
    try:
        return search(parse(value))
    except BadRequest as error:
        raise Unsupported(keyword, where, str(error)) from error


def format_(value: Any, where: str, sign: bool) -> Values:
    if not isinstance(value, str) or value not in FORMATS:
        raise Unsupported("format", where, f"the format {value!r} is not known; known are {', '.join(FORMATS)}")
    return _matching(parse(FORMATS[value]), sign)


def _bound(above: bool, inclusive: bool) -> Callable[[Any, str, bool], Values]:
    def bounded(value: Any, where: str, sign: bool) -> Values:
        limit = number(value, where)
        if sign:
            return anything(numbers=bound(limit, above, inclusive))
        return Values(numbers=bound(limit, not above, not inclusive))

    return bounded


def multiple_of(value: Any, where: str, sign: bool) -> Values:
    divisor = number(value, where)
    if divisor <= 0:
        raise BadRequest(f"{where}: {value!r} must be above 0")
    try:
        found = multiples(divisor)
    except BadRequest as error:
        raise Unsupported("multipleOf", where, str(error)) from error
    return anything(numbers=found) if sign else Values(numbers=difference(DECIMALS, found))


def min_items(value: Any, where: str, sign: bool) -> Values:
    least = count(value, where)
    return either(sign, {"arrays": (Items(least=least),)}, {"arrays": (Items(most=least - 1),) if least else ()})


def max_items(value: Any, where: str, sign: bool) -> Values:
    most = count(value, where)
    return either(sign, {"arrays": (Items(most=most),)}, {"arrays": (Items(least=most + 1),)})


def unique_items(value: Any, where: str, sign: bool) -> Values:
    if value is False:
        return ANYTHING if sign else NOTHING
    if not sign:
        raise Unsupported("uniqueItems", where, "it cannot be negated")
    return anything(arrays=(Items(unique=True),))


def without(name: str) -> Members:
    """Objects without a member of this name."""
    return Members(((Names(frozenset({name})), FALSE),), (name,))


def holding(given: Iterable[str]) -> Members:
    """Objects with members of these names."""
    given = tuple(given)
    return Members(order=given, required=frozenset(given), least=len(set(given)))


def required(value: Any, where: str, sign: bool) -> Values:
    given = names(value, where)
    return either(sign, {"objects": (holding(given),)}, {"objects": tuple(without(name) for name in given)})


def min_properties(value: Any, where: str, sign: bool) -> Values:
    least = count(value, where)
    return either(sign, {"objects": (Members(least=least),)}, {"objects": (Members(most=least - 1),) if least else ()})


def max_properties(value: Any, where: str, sign: bool) -> Values:
    most = count(value, where)
    return either(sign, {"objects": (Members(most=most),)}, {"objects": (Members(least=most + 1),)})


PLAIN: dict[str, Callable[[Any, str, bool], Values]] = {
    "type": types,
    "minLength": min_length,
    "maxLength": max_length,
    "pattern": pattern,
    "format": format_,
    "minimum": _bound(above=True, inclusive=True),
    "maximum": _bound(above=False, inclusive=True),
    "exclusiveMinimum": _bound(above=True, inclusive=False),
    "exclusiveMaximum": _bound(above=False, inclusive=False),
    "multipleOf": multiple_of,
    "minItems": min_items,
    "maxItems": max_items,
    "uniqueItems": unique_items,
    "required": required,
    "minProperties": min_properties,
    "maxProperties": max_properties,
}
