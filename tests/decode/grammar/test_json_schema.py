"""Schemas against a validator written from the specification, over random schemas and values; and the bad input."""

import json
import random
import re
from functools import reduce

import pytest

from pertoken.core.errors import BadRequest
from pertoken.decode.grammar.engine import Engine
from pertoken.decode.grammar.json_schema import Unsupported, json_schema
from pertoken.decode.grammar.vocabulary import Vocabulary
from tests.decode.grammar.validator import reordered, some_schema, some_value, valid

BYTES = Vocabulary([bytes([b]) for b in range(256)] + [None], ends=(256,))


def engine_of(schema, **options):
    return Engine(json_schema(schema, **options), BYTES)


def accepts(engine, value):
    text = value if isinstance(value, bytes) else json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()
    parse, _ = engine.read_bytes(engine.start, text)
    return parse >= 0 and engine.ends(parse)


def test_random_schemas_mean_what_the_specification_says():
    draw = random.Random(3)
    counts = {True: 0, False: 0}
    refused = set()
    for _ in range(250):
        schema = some_schema(draw)
        if isinstance(schema, dict):
            schema["$defs"] = {"d": {"anyOf": [{"type": "integer"}, {"properties": {"a": {"$ref": "#/$defs/d"}}}]}}
        values = [some_value(draw) for _ in range(60)]
        try:
            engine = engine_of(schema)
        except Unsupported as error:
            refused.add(error.keyword)
            continue
        except BadRequest as error:
            assert "allows no value" in str(error), schema
            assert not any(valid(schema, value, schema) for value in values), schema
            continue
        for value in values:
            wanted, found = valid(schema, value, schema), accepts(engine, value)
            counts[wanted] += 1
            if wanted and isinstance(value, (dict, list)) and not found:  # the order may be another one
                assert any(accepts(engine, other) for other in reordered(value)), (schema, value)
            else:
                assert found == wanted, (schema, value)
    assert min(counts.values()) > 2000
    assert refused <= {"oneOf", "minProperties", "additionalProperties", "patternProperties"}  # where they are negated


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": "integer", "minimum": -20, "maximum": 105}, [-20, -1, 0, 99, 105], [-21, 106, 1.5, b"007", b"1.0"]),
        ({"type": "number", "exclusiveMinimum": 1.25, "maximum": 3}, [1.26, 3, b"3.000"], [1.25, 3.01, b"3e0"]),
        ({"type": "string", "maxLength": 2}, ["", "é日", b'"\\u00e9\\ud83d\\ude00"'], ["abc", b'"\\ud83d"', b'"\n"']),
        ({"type": "string", "minLength": 2, "maxLength": 3, "pattern": "^[a-c]+$"}, ["ab", "abc"], ["a", "abca", "xy"]),
        ({"type": "string", "format": "date"}, ["2024-02-29", "1999-12-31"], ["1900-02-29", "2024-13-01"]),
        ({"type": "string", "format": "ipv6"}, ["::1", "1:2:3:4:5:6:7:8", "::ffff:1.2.3.4"], ["1::2::3", "12345::"]),
        ({"enum": [[1, {"a": "x"}], "y", 2, None]}, [[1, {"a": "x"}], "y", 2, None], [[1], {}, 1, False]),
        ({"type": "array", "uniqueItems": True, "items": {"enum": [1, "a", None]}}, [[], [1, "a"], ["a", None, 1]],
         [[1, 1], ["a", 1, "a"]]),
        ({"type": "array", "contains": {"const": 1}, "minContains": 2, "maxContains": 3}, [[1, 2, 1], [1, 1, 1]],
         [[1], [1, 1, 1, 1]]),
        ({"properties": {"a": {"type": "null"}}, "additionalProperties": {"type": "integer"}},
         [{}, {"a": None, "b": 1, "aa": 2}], [{"a": 1}, {"b": None}, b'{"a":1}', b'{"\\u0061":1}']),
        ({"properties": {"a": True, "b": True}, "required": ["b"], "minProperties": 2, "unevaluatedProperties": False},
         [{"a": 1, "b": 2}], [{"b": 2}, {"a": 1, "b": 2, "c": 3}]),
        ({"oneOf": [{"type": "object", "properties": {"k": {"const": "x"}}, "required": ["k"]},
                    {"type": "object", "properties": {"k": {"const": "y"}, "n": {"type": "integer"}},
                     "required": ["k", "n"]}]}, [{"k": "x", "n": "z"}, {"k": "y", "n": 1}], [{"k": "y"}, {"k": "z"}]),
    ],
)  # fmt: skip
def test_keywords(schema, good, bad):
    engine = engine_of(schema)
    assert [value for value in good if not accepts(engine, value)] == []
    assert [value for value in bad if accepts(engine, value)] == []


def test_members_come_in_the_order_of_properties_then_others():
    engine = engine_of({"properties": {"b": True, "a": True}, "required": ["c"]})
    assert accepts(engine, b'{"b":1,"a":2,"c":3,"z":4}') and accepts(engine, b'{"c":3}')
    assert not accepts(engine, b'{"a":2,"b":1,"c":3}') and not accepts(engine, b'{"z":4,"c":3}')


def test_blanks_only_if_asked_for():
    schema, text = {"type": "array", "items": {"type": "object"}}, b'[ {"a" : 1},\n  {} ]'
    assert accepts(engine_of(schema, blanks=True), text) and not accepts(engine_of(schema), text)


def test_recursion_and_references():
    tree = {"$ref": "#/$defs/tree", "$defs": {"tree": {"type": "object", "required": ["value"], "properties": {
        "value": {"type": "integer"}, "children": {"type": "array", "items": {"$ref": "#/$defs/tree"}}},
        "additionalProperties": False}}}  # fmt: skip
    engine = engine_of(tree)
    assert accepts(engine, {"value": 1, "children": [{"value": 2, "children": []}, {"value": 3}]})
    assert not accepts(engine, {"value": 1, "children": [{"children": []}]})
    with pytest.raises(BadRequest, match="no value at all"):
        json_schema({"type": "object", "required": ["a"], "properties": {"a": {"$ref": "#"}}})
    with pytest.raises(Unsupported, match="was not given"):
        json_schema({"$ref": "http://example.com/other"})
    others = {"http://example.com/other": {"type": "integer"}}
    assert accepts(engine_of({"$ref": "http://example.com/other"}, documents=others), 3)


def test_drafts_differ():
    old = {"items": [{"type": "integer"}], "additionalItems": False}
    assert accepts(engine_of(old, draft=7), [1]) and not accepts(engine_of(old, draft=7), [1, 2])
    assert accepts(engine_of({"$schema": "http://json-schema.org/draft-07/schema#", **old}), [1])
    with pytest.raises(Unsupported, match="prefixItems"):
        json_schema(old)


@pytest.mark.parametrize(
    ("schema", "keyword", "message"),
    [
        ({"properties": {"a": {"maxLenght": 3}}}, "maxLenght", "#/properties/a: it is not known"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems", "finitely many"),
        ({"pattern": "(?=a)b"}, "pattern", "look-around"),
        ({"format": "regex"}, "format", "known are date"),
        ({"minProperties": 2}, "minProperties", "written twice"),
        ({"multipleOf": 1e-7 * 1234567}, "multipleOf", "too many states"),
        ({"$schema": "http://json-schema.org/draft-04/schema#"}, "$schema", "not a dialect"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(schema, keyword, message):
    with pytest.raises(Unsupported, match=re.escape(message)) as refusal:
        json_schema(schema)
    assert refusal.value.keyword == keyword and "Supported are all types: type, enum" in str(refusal.value)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("{", "is not JSON"),
        ({"type": "int"}, "is no type; give one of"),
        ({"minLength": -1}, "is no count"),
        ({"items": 3}, "is no schema"),
        (reduce(lambda inner, _: {"items": inner}, range(500), {}), "nested more than 200 deep"),
        ('{"items":' * 20_000 + "{}" + "}" * 20_000, "cannot be read|nested more than|not JSON"),
        ({"allOf": [{"$ref": "#"}]}, "refers to itself"),
        ({"type": "string", "enum": [1]}, "allows no value"),
        (False, "allows no value"),
    ],
)
def test_what_is_no_schema(schema, message):
    with pytest.raises(BadRequest, match=message):
        json_schema(schema)
