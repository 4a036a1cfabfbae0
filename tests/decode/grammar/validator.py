"""A JSON Schema validator written from the specification, keyword by keyword, and random schemas and values for it.

Integers have no fraction here (1.0 is none), as in the grammars. Shares no code with them.
"""

import re
from itertools import permutations, product


def equal(one, other):
    return type(one) is type(other) and one == other


def valid(schema, value, root):
    """Whether a value matches a schema of the document `root`."""
    if isinstance(schema, bool):
        return schema
    return all(holds(keyword, argument, schema, value, root) for keyword, argument in schema.items())


def holds(keyword, argument, schema, value, root):
    def good(inner, inside=value):
        return valid(inner, inside, root)

    kinds = {
        "null": value is None,
        "boolean": isinstance(value, bool),
        "string": isinstance(value, str),
        "integer": type(value) is int,
        "number": type(value) in (int, float),
        "array": isinstance(value, list),
        "object": isinstance(value, dict),
    }
    rules = {
        "type": lambda: any(kinds[kind] for kind in ([argument] if isinstance(argument, str) else argument)),
        "enum": lambda: any(equal(value, item) for item in argument),
        "const": lambda: equal(value, argument),
        "$ref": lambda: good(root if argument == "#" else root["$defs"][argument.rpartition("/")[2]]),
        "allOf": lambda: all(map(good, argument)),
        "anyOf": lambda: any(map(good, argument)),
        "oneOf": lambda: sum(map(good, argument)) == 1,
        "not": lambda: not good(argument),
        "if": lambda: good(schema.get("then" if good(argument) else "else", True)),
    }
    if kinds["string"]:
        rules |= {
            "minLength": lambda: len(value) >= argument,
            "maxLength": lambda: len(value) <= argument,
            "pattern": lambda: bool(re.search(argument, value)),
        }
    elif kinds["number"]:
        rules |= {
            "minimum": lambda: value >= argument,
            "exclusiveMaximum": lambda: value < argument,
            "multipleOf": lambda: value % argument == 0,
        }
    elif kinds["array"]:
        first = len(schema.get("prefixItems", ()))
        rules |= {
            "minItems": lambda: len(value) >= argument,
            "maxItems": lambda: len(value) <= argument,
            "prefixItems": lambda: all(good(s, v) for s, v in zip(argument, value, strict=False)),
            "items": lambda: all(good(argument, v) for v in value[first:]),
            "contains": lambda: any(good(argument, v) for v in value),
        }
    elif kinds["object"]:
        known, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
        extra = [k for k in value if k not in known and not any(re.search(p, k) for p in patterns)]
        rules |= {
            "required": lambda: set(argument) <= set(value),
            "maxProperties": lambda: len(value) <= argument,
            "properties": lambda: all(good(s, value[k]) for k, s in argument.items() if k in value),
            "patternProperties": lambda: all(
                good(s, v) for p, s in argument.items() for k, v in value.items() if re.search(p, k)
            ),
            "additionalProperties": lambda: all(good(argument, value[k]) for k in extra),
            "propertyNames": lambda: all(good(argument, k) for k in value),
            "dependentRequired": lambda: all(set(n) <= set(value) for k, n in argument.items() if k in value),
        }
    return rules.get(keyword, lambda: True)()


def some_value(draw, depth=2):
    """A random value, of few kinds so that schemas and values meet often."""
    kind = draw.randrange(8 if depth else 5)
    if kind < 5:
        return draw.choice([None, True, False, 0, 1, 2, 3, -4, 12, 0.5, 2.25, "", "a", "b", "ab", "aab", "é\n", 'q"\\'])
    if kind == 5:
        return [some_value(draw, depth - 1) for _ in range(draw.randrange(4))]
    return {k: some_value(draw, depth - 1) for k in ("a", "b", "ab", "c") if draw.random() < 0.5}


TYPES = ["null", "boolean", "integer", "number", "string", "array", "object"]


def some_schema(draw, depth=3):
    """A random schema that may refer to `#/$defs/d`."""

    def inner():
        return some_schema(draw, depth - 1)

    def several(least, most):
        return [inner() for _ in range(draw.randrange(least, most + 1))]

    makers = {
        "type": lambda: draw.choice([*TYPES, ["string", "integer"], ["object", "null"], ["array", "number"]]),
        "enum": lambda: [some_value(draw, 1) for _ in range(draw.randrange(1, 4))],
        "const": lambda: some_value(draw, 1),
        "minLength": lambda: draw.randrange(4),
        "maxLength": lambda: draw.randrange(4),
        "pattern": lambda: draw.choice(["^a", "b$", "a.?b", "^(a|b)*$", "[^a]", "^$|a{2}"]),
        "minimum": lambda: draw.choice([-4, 0, 1, 2.25, 0.5, 12]),
        "exclusiveMaximum": lambda: draw.choice([-4, 0, 1, 2.25, 3, 13]),
        "multipleOf": lambda: draw.choice([1, 2, 3, 0.5, 0.25]),
        "minItems": lambda: draw.randrange(3),
        "maxItems": lambda: draw.randrange(4),
        "required": lambda: draw.sample(["a", "b", "c"], draw.randrange(3)),
        "maxProperties": lambda: draw.randrange(4),
        "dependentRequired": lambda: {draw.choice("abc"): draw.sample(["a", "b", "c"], draw.randrange(3))},
    }
    if depth:
        makers |= dict.fromkeys(("not", "if", "then", "else", "items", "contains"), inner)
        makers |= {
            "$ref": lambda: "#/$defs/d",
            "allOf": lambda: several(1, 2),
            "anyOf": lambda: several(1, 3),
            "oneOf": lambda: several(1, 2),
            "prefixItems": lambda: several(1, 2),
            "properties": lambda: {k: inner() for k in ("a", "b", "ab") if draw.random() < 0.5},
            "patternProperties": lambda: {draw.choice(["^a", "b", "c$"]): inner()},
            "additionalProperties": lambda: draw.choice([False, inner()]),
            "propertyNames": lambda: draw.choice([{"maxLength": 1}, {"pattern": "a"}, {"enum": ["a", "ab"]}]),
        }
    chosen = draw.sample(sorted(makers), draw.randrange(1, 4))
    if draw.random() < 0.1:
        return draw.random() < 0.7
    return {keyword: makers[keyword]() for keyword in chosen}


def reordered(value):
    """The same value with its members in every order, at all depths."""
    if isinstance(value, list):
        return (list(items) for items in product(*map(reordered, value)))
    if isinstance(value, dict):
        return (
            dict(zip(names, items, strict=True))
            for names in permutations(value)
            for items in product(*(list(reordered(value[name])) for name in names))
        )
    return iter([value])
