"""xgrammar and the engine agree, behind one interface."""

import json
import random

import numpy as np
import pytest

from pertoken.core.errors import BadRequest
from pertoken.decode.grammar.engine import Engine
from pertoken.decode.grammar.gbnf import gbnf
from pertoken.decode.grammar.json_schema import json_schema
from pertoken.decode.grammar.matcher import Matcher
from pertoken.decode.grammar.provider import bits, new_bitmask
from pertoken.decode.grammar.vocabulary import Vocabulary

pytest.importorskip("xgrammar")
from pertoken.decode.grammar.xgrammar_adapter import XGrammarMask, compiler_of

WORDS = [*(bytes([b]) for b in range(256)), b"((", b"1+", b"+(", b"12", b'":', b',"', b"true", b'{"', b"tr", b"}]"]
END = len(WORDS)
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "boolean"}, "b": {"type": "array", "items": {"enum": [1, "x", None]}}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
SOURCES = {
    "arithmetic": 'root ::= root [+*] term | term\nterm ::= [0-9]+ | "(" root ")"',
    "characters": 'root ::= ("日" | [a-zà-ÿ])+ "!"',
}


@pytest.fixture(scope="module")
def vocabulary():
    return Vocabulary([*WORDS, None, None], ends=(END,))


def both(vocabulary, name):
    compiler = compiler_of(vocabulary)
    if name == "schema":
        compiled = compiler.compile_json_schema(json.dumps(SCHEMA), any_whitespace=False, separators=(",", ":"))
        return Engine(json_schema(SCHEMA), vocabulary), compiled
    return Engine(gbnf(SOURCES[name]), vocabulary), compiler.compile_grammar(SOURCES[name])


@pytest.mark.parametrize("name", ["schema", *SOURCES])
def test_masks_are_equal_along_random_texts(vocabulary, name):
    engine, compiled = both(vocabulary, name)
    draw = random.Random(1)
    for _ in range(6):
        one, other = Matcher(engine), XGrammarMask(compiled, vocabulary)
        for _ in range(25):
            masks = new_bitmask(2, vocabulary.size)
            one.fill(masks, 0)
            other.fill(masks, 1)
            allowed = [set(np.flatnonzero(row).tolist()) for row in bits(masks, vocabulary.size)]
            assert allowed[0] == allowed[1]
            token = draw.choice(sorted(allowed[0]))
            assert one.only() == other.only() == (token if len(allowed[0]) == 1 else None)
            assert one.accept(token) and other.accept(token) and one.complete == other.complete
            if one.finished:
                break
        assert other.finished == one.finished and not other.accept(vocabulary.size - 1)
        one.rollback(1)
        other.rollback(1)
        twin, copy = one.fork(), other.fork()
        masks = new_bitmask(2, vocabulary.size)
        twin.fill(masks, 0)
        copy.fill(masks, 1)
        assert np.array_equal(*bits(masks, vocabulary.size))


def test_bad_requests(vocabulary):
    with pytest.raises(BadRequest, match="needs an id that ends"):
        compiler_of(Vocabulary(WORDS))
    _, compiled = both(vocabulary, "arithmetic")
    with pytest.raises(BadRequest, match="cannot take back 3"):
        XGrammarMask(compiled, vocabulary).rollback(3)
