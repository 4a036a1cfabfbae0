"""The Lark subset: languages against an independent recogniser, and errors."""

import pytest

from pertoken.core.errors import BadRequest
from pertoken.decode.grammar.engine import Engine
from pertoken.decode.grammar.lark import lark
from pertoken.decode.grammar.vocabulary import Vocabulary
from tests.decode.grammar import naive

BYTES = Vocabulary([bytes([b]) for b in range(256)])
SUM = """
// a sum
?start: start "+" term -> add
      | term
term: NUMBER | "(" start ")"
NUMBER.2: /[0-9]+/
%ignore / +/
"""


def accepts(source, text):
    grammar = lark(source)
    engine = Engine(grammar, BYTES)
    parse, _ = engine.read_bytes(engine.start, text.encode())
    found = parse >= 0 and engine.ends(parse)
    assert found == naive.accepts(grammar, text.encode())
    return found


@pytest.mark.parametrize(
    ("source", "good", "bad"),
    [
        (SUM, ["1", "1+(2 + 34 )", "  7 "], ["", "1+", "(1", "1 2"]),
        ('start: "a"~2..3 [x] | /b+/i\nx: "c".."e"', ["aa", "aaad", "BbB"], ["a", "aaaa", "aaf"]),
        ('start: "Ab"i WORD?\n%import common.WORD', ["ab", "aBxy"], ["a", "ab1"]),
        ("start: (CNAME\n  | INT)+\n%import common.CNAME\n%import common.INT -> INT", ["a1", "1a"], [""]),
        (r'start: /a.b/s "\n\"\u00e9"' + "\n", ['a\nb\n"é'], ["ab"]),
        ('start: a\n\n  | "x"\na: "y"', ["x", "y"], ["xy"]),
    ],
)
def test_languages(source, good, bad):
    assert [text for text in good if not accepts(source, text)] == []
    assert [text for text in bad if accepts(source, text)] == []


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ('start: "a', "line 1, column 10: it ends"),
        ('start: "a"\n\nother: (start', r"line 3, column 14: '\)' expected"),
        ("start: b", "'b' is not defined"),
        ('start: "a"\nb{x}: x', "templates"),
        ('%declare A\nstart: "a"', "%declare is not supported"),
        ("%import common.FOO\nstart: FOO", "common.FOO is not known"),
        ("start: /a(?=b)/", "line 1: pattern, line 1, column 2: look-around"),
        ("start: /a/x", "flags x are not supported"),
        ('start: "a"\nstart: "b"', "defined twice"),
        ('begin: "a"', "no rule 'start'"),
        ('start: "a"~3..2', "asks for more"),
        ('start "a"', "':' expected"),
    ],
)
def test_errors_say_where(source, message):
    with pytest.raises(BadRequest, match=message):
        lark(source)
