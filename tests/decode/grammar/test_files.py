"""Grammars from files, and a comparison under one."""

import json

import pytest

from pertoken.bench.compare import Options, compare
from pertoken.bench.sides import parts_of
from pertoken.core.errors import BadRequest
from pertoken.decode.grammar.engine import Engine
from pertoken.decode.grammar.files import read_grammar, read_schema
from pertoken.decode.grammar.vocabulary import Vocabulary
from pertoken.methods import load_methods

BYTES = Vocabulary([bytes([b]) for b in range(256)])
SOURCES = {"g.gbnf": 'root ::= "ab"+', "g.ebnf": 'root ::= "ab"+', "g.lark": 'start: "ab"+', "g.regex": "(ab)+\n"}


@pytest.mark.parametrize("name", SOURCES)
def test_the_ending_of_the_name_says_the_notation(tmp_path, name):
    (tmp_path / name).write_text(SOURCES[name])
    engine = Engine(read_grammar(tmp_path / name), BYTES)
    assert engine.ends(engine.read_bytes(engine.start, b"abab")[0]) and engine.read_bytes(engine.start, b"b")[0] < 0


def test_what_is_no_grammar_file(tmp_path):
    with pytest.raises(BadRequest, match=r"grammar files end in \.gbnf"):
        read_grammar(tmp_path / "g.txt")
    (tmp_path / "s.json").write_text('{"type": "strin"}')
    with pytest.raises(BadRequest, match="is no type"):
        read_schema(tmp_path / "s.json")


def test_sums_with_xgrammar():
    load_methods()
    assert [one.name for one in parts_of("dyspec+xgrammar")] == ["dyspec"]
    assert [one.name for one in parts_of("xgrammar+skip_layers")] == ["xgrammar", "skip_layers"]
    with pytest.raises(ValueError, match="both choose the next token"):
        parts_of("dyspec+chain")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "names"), [("zoo:code-target", ["dyspec+xgrammar"]), ("zoo:code-diffusion", ["threshold"])]
)
def test_a_comparison_under_a_schema(tmp_path, model, names):
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}, "b": {"enum": [1, "x"]}},
        "required": ["a", "b"],
    }
    schema["additionalProperties"] = False
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(schema))
    options = Options(max_new_tokens=32, repeats=1, json_schema=str(path), dtype="fp32")
    found = compare(names, model, None, ["data = ", "x"], options)
    for texts in found.outputs.values():
        for text in texts:
            value = json.loads(text)
            assert isinstance(value.pop("a"), bool) and value.pop("b") in (1, "x") and not value
    if model == "zoo:code-target":
        assert all(run.identical for run in found.runs) and found.runs[-1].steps < found.runs[0].steps / 2
        with pytest.raises(ValueError, match="needs a grammar"):
            compare(names, model, None, ["x"], Options(max_new_tokens=4))
