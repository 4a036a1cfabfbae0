"""Varied JSON Schemas with matching documents, made by program: what grammar engines are compared on.

Each of the families stresses one thing: nesting, enumerations of two or of hundreds of words, bounded strings, patterns
and formats, numbers with bounds, alternatives, recursion, members of any name. A document is made along with its schema
and has its members in the schema's order.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from typing import Any

WORDS = [
    "name", "id", "line", "module", "path", "value", "status", "author", "created_at", "tags", "items", "config",
    "size", "parent", "children", "type", "description", "enabled", "count", "version", "license", "email", "url",
    "arguments",
]  # fmt: skip
Made = tuple[Any, Any]  # a schema and a document that matches it


def text(draw: random.Random, most: int = 24) -> str:
    letters = string.ascii_letters + "     _-.,:/()" + 'éü日\n"\\'
    return "".join(draw.choice(letters) for _ in range(draw.randrange(most + 1)))


def scalar(draw: random.Random) -> Made:
    kind = draw.randrange(5)
    if kind == 0:
        return {"type": "string"}, text(draw)
    if kind == 1:
        return {"type": "integer"}, draw.randrange(-1000, 100_000)
    if kind == 2:
        return {"type": "number"}, round(draw.uniform(-50, 50), 2)
    if kind == 3:
        return {"type": "boolean"}, draw.random() < 0.5
    return {"type": ["string", "null"]}, draw.choice([None, text(draw)])


def record(draw: random.Random, inner: Callable[[random.Random], Made], least: int = 2, most: int = 6) -> Made:
    """An object of named members, some of them optional."""
    properties, value, required = {}, {}, []
    for name in draw.sample(WORDS, draw.randrange(least, most + 1)):
        properties[name], made = inner(draw)
        if draw.random() < 0.6:
            required.append(name)
        elif draw.random() < 0.3:
            continue
        value[name] = made
    schema = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return schema, value


def listed(draw: random.Random, inner: Callable[[random.Random], Made]) -> Made:
    schema, value = inner(draw)
    return {"type": "array", "items": schema}, [value] * draw.randrange(4)


def nested(draw: random.Random, depth: int = 3) -> Made:
    if depth == 0:
        return scalar(draw)
    make = draw.choice([record, listed])
    return make(draw, lambda again: nested(again, max(depth - again.choice([1, 1, 2]), 0)))


def enumeration(draw: random.Random, count: int) -> Made:
    words = sorted({"".join(draw.choice(string.ascii_lowercase + "-_") for _ in range(draw.randrange(3, 14)))
                    for _ in range(count)})  # fmt: skip
    return {"enum": words}, draw.choice(words)


def bounded(draw: random.Random) -> Made:
    most = draw.choice([5, 20, 64, 200, 1000, 10_000])
    value = text(draw, min(most, 60))
    least = draw.choice([0, 0, min(1, len(value)), len(value) // 2])
    return {"type": "string", "minLength": least, "maxLength": most}, value


PATTERNS = [
    (r"^[A-Z]{3}-[0-9]{4}$", lambda d: f"{''.join(d.choices(string.ascii_uppercase, k=3))}-{d.randrange(1000, 9999)}"),
    (r"^[a-z_][a-z0-9_]*$", lambda d: d.choice(WORDS)),
    (r"^(\+[0-9]{1,3} )?[0-9]{3}( [0-9]{2,4}){2}$", lambda d: f"+{d.randrange(1, 99)} {d.randrange(100, 999)} 12 3456"),
    (r"^#[0-9a-fA-F]{6}$", lambda d: f"#{d.randrange(1 << 24):06x}"),
    (r"^v[0-9]+\.[0-9]+(\.[0-9]+)?(-[a-z]+)?$", lambda d: f"v{d.randrange(9)}.{d.randrange(20)}-beta"),
]
FORMATS = [
    ("date", lambda d: f"20{d.randrange(10, 30)}-{d.randrange(1, 13):02}-{d.randrange(1, 29):02}"),
    ("date-time", lambda d: f"20{d.randrange(10, 30)}-03-{d.randrange(1, 29):02}T{d.randrange(24):02}:05:00Z"),
    ("uuid", lambda d: f"{d.getrandbits(32):08x}-{d.getrandbits(16):04x}-4abc-8def-{d.getrandbits(48):012x}"),
    ("email", lambda d: f"{d.choice(WORDS)}.{d.choice(WORDS)}@example.org"),
    ("ipv4", lambda d: ".".join(str(d.randrange(256)) for _ in range(4))),
]


def pattern(draw: random.Random) -> Made:
    if draw.random() < 0.5:
        source, make = draw.choice(PATTERNS)
        return {"type": "string", "pattern": source}, make(draw)
    name, make = draw.choice(FORMATS)
    return {"type": "string", "format": name}, make(draw)


def range_(draw: random.Random) -> Made:
    low = draw.randrange(-1000, 1000)
    high = low + draw.choice([1, 9, 255, 100_000])
    return {"type": "integer", "minimum": low, "maximum": high}, draw.randint(low, high)


def tagged(draw: random.Random) -> Made:
    """One of several objects, told apart by a constant."""
    options, values = [], []
    for tag in draw.sample(WORDS, draw.randrange(2, 6)):
        schema, value = record(draw, scalar, 1, 3)
        properties = {"kind": {"const": tag}} | schema["properties"]
        options.append(schema | {"properties": properties, "required": ["kind", *schema["required"]]})
        values.append({"kind": tag} | value)
    return {draw.choice(["oneOf", "anyOf"]): options}, draw.choice(values)


def recursive(draw: random.Random) -> Made:
    node: dict[str, Any] = {
        "type": "object",
        "properties": {"value": {"type": "integer"}, "children": {"type": "array", "items": {"$ref": "#/$defs/node"}}},
        "required": ["value", "children"],
        "additionalProperties": False,
    }

    def tree(depth: int) -> dict[str, Any]:
        below = draw.randrange(3) if depth else 0
        return {"value": draw.randrange(100), "children": [tree(depth - 1) for _ in range(below)]}

    return {"$defs": {"node": node}, "$ref": "#/$defs/node"}, tree(4)


def open_object(draw: random.Random) -> Made:
    schema, value = record(draw, scalar, 1, 4)
    more, made = scalar(draw)
    schema["additionalProperties"] = draw.choice([True, more])
    return schema, value | {f"x-{draw.choice(WORDS)}": made}


FAMILIES: dict[str, Callable[[random.Random], Made]] = {
    "flat": lambda draw: record(draw, scalar),
    "nested": nested,
    "enums": lambda draw: record(draw, lambda again: enumeration(again, again.randrange(2, 9))),
    "long enums": lambda draw: record(draw, lambda again: enumeration(again, again.randrange(100, 500)), 1, 3),
    "bounded strings": lambda draw: record(draw, bounded),
    "patterns": lambda draw: record(draw, pattern),
    "ranges": lambda draw: record(draw, range_),
    "alternatives": lambda draw: record(draw, tagged, 1, 3),
    "recursion": recursive,
    "open objects": open_object,
}


def schemas(count: int, seed: int = 0) -> list[tuple[str, Any, Any]]:
    """So many (family, schema, document), families in turn."""
    found = []
    for number in range(count):
        family = list(FAMILIES)[number % len(FAMILIES)]
        schema, value = FAMILIES[family](random.Random(f"{seed} {number}"))
        found.append((family, schema, value))
    return found
