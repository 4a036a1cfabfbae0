"""Masks against reading every token byte by byte: inside of strings with bounds and patterns, names, enumerations."""

import random
import re

import numpy as np
import pytest
import torch

from pertoken.bench.schemas import schemas
from pertoken.core.errors import BadRequest
from pertoken.decode.grammar import loading
from pertoken.decode.grammar.engine import Engine
from pertoken.decode.grammar.gbnf import gbnf
from pertoken.decode.grammar.json_schema import json_schema
from pertoken.decode.grammar.json_text import compact
from pertoken.decode.grammar.matcher import Matcher
from pertoken.decode.grammar.provider import bits, new_bitmask
from pertoken.decode.grammar.tables import MASK, SPLIT, USED
from pertoken.decode.grammar.vocabulary import Vocabulary

BYTES = Vocabulary([bytes([b]) for b in range(256)] + [None], ends=(256,))


def words(texts, longest=9):
    """All pieces of texts, some of them twice, and all single bytes."""
    found = {bytes([b]) for b in range(256)}
    for text in texts:
        data = text.encode()
        for piece in re.finditer(rb"[a-z]+|[0-9]+|[^a-z0-9]+", data):
            start = piece.start()
            found |= {data[start : start + n] for n in range(2, longest)}
    return [*sorted(found), b"a", b'"', b'",', None]


def check(grammar, vocabulary, texts):
    """Masks at every place of texts; how many were compared."""
    engine, plain, checked = Engine(grammar, vocabulary), Engine(grammar, BYTES), set()
    for text in texts:
        for at in range(len(text) + 1):
            parse, same = (e.read_bytes(e.start, text[:at])[0] for e in (engine, plain))
            if parse < 0:
                break
            if parse in checked:
                continue
            checked.add(parse)
            wanted = {i for i, token in enumerate(vocabulary.tokens) if token and plain.read_bytes(same, token)[0] >= 0}
            wanted |= set(vocabulary.ends) if plain.ends(same) else set()
            if wanted:
                assert set(np.flatnonzero(bits(engine.mask(parse), vocabulary.size)).tolist()) == wanted, text[:at]
    return len(checked)


def test_masks_along_documents():
    made = schemas(20, seed=5)
    texts = [compact(document) for _, _, document in made]
    tokens = words([text[:60] for text in texts])
    vocabulary = Vocabulary(tokens, ends=(len(tokens) - 1,))
    checked = sum(
        check(json_schema(schema), vocabulary, [text[:120].encode()])
        for (_, schema, _), text in zip(made, texts, strict=True)
    )
    assert checked > 800 and len(vocabulary.shared) > 4


BOUNDS = [(0, 1), (0, 3), (1, 6), (3, 3), (4, 9), (2, 40), (0, 1000), (12, 500), (20, None)]


@pytest.mark.parametrize(("least", "most"), BOUNDS)
def test_masks_of_bounded_strings(least, most):
    letters = 'ab\u00e9\u65e5\n\\"'
    draw = random.Random(least)
    texts = ["".join(draw.choice(letters) for _ in range(n)) for n in (0, 2, 5, 9, 14, 24)]
    tokens = words([compact(text + "ab") for text in texts] + ['abab",b', 'a\\n\\u00e9"]'])
    vocabulary = Vocabulary(tokens, ends=(len(tokens) - 1,))
    schema = {"type": "array", "items": {"type": "string", "minLength": least}}
    if most is not None:
        schema["items"]["maxLength"] = most
    assert check(json_schema(schema), vocabulary, [f"[{compact(text)},".encode() for text in texts]) > 5


SOURCES = [
    'root ::= x "b"\nx ::= [a-c]{2,70} "." [a-c]{0,60}',  # what follows can be told apart
    'root ::= x "b"\nx ::= [a-c]{2,70} "a"',  # it cannot
    'root ::= x "b"\nx ::= ("a" | "ab" | "c"){2,70} "d"',  # one item begins another
    'root ::= ("a" [b-c]{3,60} "a"){1,60} "."?',
    'root ::= ([a-z] "."?){4,90} root?',
    "root ::= [^b]{1,60}",
    'root ::= "a" root{1,60} "b" | "c"',
]


@pytest.mark.parametrize("source", SOURCES)
def test_masks_of_repetitions(source):
    draw = random.Random(1)
    pieces = {"".join(draw.choices("abc.d", k=draw.randrange(1, 8))).encode() for _ in range(300)}
    vocabulary = Vocabulary([*sorted(pieces), None], ends=(len(pieces),))
    texts = ["".join(draw.choices(letters, k=30)).encode() for letters in ("abc", "aabbcc.", "ac", "c", "a.") * 3]
    texts += [b"abca" * 9 + b".", b"a" + b"bcb" * 9 + b"a", b"aaccb" * 6]
    assert check(gbnf(source), vocabulary, texts) > 10


def test_a_split_is_found_once_for_all_grammars_and_follows_what_comes_after():
    tokens = words(['"name","other":', "abcdefghijklmnop", 'xyz"]}'])
    vocabulary = Vocabulary(tokens, ends=(len(tokens) - 1,))
    text = b'"abc'
    for schema in ({"type": "string"}, {"type": ["string", "null"]}, {"anyOf": [{"type": "string"}, {"enum": [1]}]}):
        assert check(json_schema(schema), vocabulary, [text]) == 2
    assert len(vocabulary.shared) == 1
    assert check(json_schema({"type": "array", "items": {"type": "string"}}), vocabulary, [b'["abc']) == 3
    assert check(json_schema({"additionalProperties": True}), vocabulary, [b'{"abc":"x"']) > 3
    assert len(vocabulary.shared) == 1
    for names in (["abc"], ["name", "abd"]):
        inner = {name: {"type": "null"} for name in names}
        schema = {"properties": inner, "additionalProperties": {"type": "integer"}}
        check(json_schema(schema), vocabulary, [b'{"abd":', b'{"name":', b'{"abc":1'])
    assert len(vocabulary.shared) == 2  # names are written in one way only


def test_splits_and_masks_may_be_forgotten(monkeypatch):
    tokens = words(['"name","other":', "abcdefghijklmnop"])
    vocabulary = Vocabulary(tokens, ends=(len(tokens) - 1,))
    schema = {"properties": {"name": {"enum": ["abc", "abd", "b"]}, "other": {"type": "string", "maxLength": 70}}}
    monkeypatch.setattr("pertoken.decode.grammar.vocabulary.MOST_SHARED", 0)
    engine = Engine(json_schema(schema), vocabulary)
    monkeypatch.setattr(loading, "MOST", {table: engine.tables.view(table).size for table in (SPLIT, MASK)})
    texts = [b'{"name":"ab', b'{"other":"ab', b'{"o', b'{"name":"b","other":"', b'{"name":"']
    parses = [engine.read_bytes(engine.start, text)[0] for text in texts]
    before = [engine.mask(parse) for parse in parses]
    for table in (SPLIT, MASK):
        engine.tables.block[USED + table] = engine.tables.view(table).size
        loading.make_room(engine, table, False)
        assert engine.tables.used(table) == 0
        assert all(np.array_equal(engine.mask(parse), mask) for parse, mask in zip(parses, before, strict=True))
    size = engine.tables.view(MASK).size
    engine.tables.block[USED + MASK] = size
    loading.make_room(engine, MASK, True)
    assert engine.tables.view(MASK).size == 2 * size


def test_rows_that_a_bitmask_does_not_have():
    vocabulary = Vocabulary([b"a", None], ends=(1,))
    matcher = Matcher(Engine(gbnf('root ::= "a"*'), vocabulary))
    for row in (2, -1):
        with pytest.raises(BadRequest, match="none of the 2 rows"):
            matcher.fill(new_bitmask(2, 2), row)
    strange = [new_bitmask(2, 64), np.zeros((2, 1)), np.zeros(1, np.int32), np.zeros((2, 2), np.int32)[:, ::2]]
    for bitmask in strange:
        with pytest.raises(BadRequest, match="cannot hold masks of this vocabulary; give an int32 one of 1 words"):
            matcher.fill(bitmask)
    bitmask = torch.zeros(2, 1, dtype=torch.int32)
    matcher.fill(bitmask, 1)
    assert bitmask.tolist() == [[0], [3]]
