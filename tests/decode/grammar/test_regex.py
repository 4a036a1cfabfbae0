"""Patterns against Python's own, as grammars and as automata."""

import random
import re

import pytest

from pertoken.core.errors import BadRequest
from pertoken.decode.grammar.automaton import difference, intersection, lengths, union, words
from pertoken.decode.grammar.engine import Engine
from pertoken.decode.grammar.regex import regex
from pertoken.decode.grammar.regex_automaton import automaton
from pertoken.decode.grammar.regex_reader import parse
from pertoken.decode.grammar.regex_tree import search
from pertoken.decode.grammar.vocabulary import Vocabulary

BYTES = Vocabulary([bytes([b]) for b in range(256)])
PATTERNS = [
    r"a+b?", r"a|bc*", r"(ab|a)(c|bcd)", r"x{2,3}y{2}", r"[^a-c]é?", r"\d{2}-\w+", r"(a|b)*c", r"", r"a{0,60}b{70,}",
    r"(?:a|(?P<n>b))+?c", r"[\w.-]+@[\d]", r"\u00e9|\x41|[\b\-\]]", r"日.本", r"(a*)*",
]  # fmt: skip
ANCHORED = [r"^a", r"a$", r"^a+b?$", r"a|b$", r"(^a|b)c*", r"(a$|b)c?", r"^$", r"x^y|a", r"(^|,)a(,|$)", r"a$|^b"]
LETTERS = "aabbccdxy12-_.@é日本A,\n"


def texts(draw, count):
    return ["".join(draw.choice(LETTERS) for _ in range(draw.randrange(7))) for _ in range(count)]


def spells(engine, text):
    parse, _ = engine.read_bytes(engine.start, text.encode())
    return parse >= 0 and engine.ends(parse)


@pytest.mark.parametrize("pattern", PATTERNS + ANCHORED)
def test_whole_matches_are_those_of_re(pattern):
    draw = random.Random(1)
    samples = [*texts(draw, 300), "abcd", "xxyy", "xxxyy", "12-ab", "日x本", "aaaab", ""]
    if "60" in pattern:  # re takes exponential time on others
        samples += ["b" * 69, "b" * 70, "a" * 60 + "b" * 80, "a" * 61 + "b" * 80, "a" * 61]
    engine, machine = Engine(regex(pattern), BYTES), automaton(parse(pattern))
    for text in samples:
        wanted = re.fullmatch(pattern, text, re.ASCII) is not None
        wanted &= not (text.endswith("\n") and "$" in pattern)  # re lets $ stand before a last line break
        assert (spells(engine, text), machine.has(text)) == (wanted, wanted), text


@pytest.mark.parametrize("pattern", PATTERNS[:8] + ANCHORED)
def test_searches_are_those_of_re(pattern):
    machine = automaton(search(parse(pattern)))
    for text in texts(random.Random(2), 500):
        assert machine.has(text) == bool(re.search(pattern.replace("$", r"\Z"), text, re.ASCII)), text


def test_automata_are_closed_under_set_operations():
    one, other = automaton(search(parse("a"))), automaton(parse("[ab]*"))
    some = words(["a", "ab", "ba", ""])
    for text in [*texts(random.Random(3), 200), "a", "ab", "ba", "", "bb", "aaa"]:
        a, b, c = one.has(text), other.has(text), some.has(text)
        assert a == ("a" in text) and c == (text in ("a", "ab", "ba", ""))
        assert intersection(one, other).has(text) == (a and b)
        assert union(some, other).has(text) == (b or c)
        assert difference(other, some).has(text) == (b and not c)
        assert lengths(1, 2).has(text) == (1 <= len(text) <= 2)
    assert difference(some, other).empty and some.texts(4) == {"a", "ab", "ba", ""} and one.texts(9) is None


def test_unicode_properties():
    letters = automaton(parse(r"\p{Lu}\p{Letter}*\P{L}"))
    assert letters.has("Éa日!") and not letters.has("éa!") and not letters.has("Éaa")


@pytest.mark.parametrize(
    ("pattern", "column", "message"),
    [
        (r"a(?=b)", 2, "look-around"),
        (r"(a)\1", 4, "back references"),
        (r"a\b", 2, "word boundaries"),
        (r"a)", 2, r"'\)' without"),
        (r"(a", 3, r"'\)' expected"),
        (r"[b-a]", 2, "runs backwards"),
        (r"*a", 1, "nothing before it"),
        (r"a{2,1}", 3, "asks for more"),
        (r"[a", 3, "it ends where"),
        (r"\p{Klingon}", 1, "not known"),
        (r"a++", 1, "possessive"),
        (r"\ud800", 1, "no character"),
    ],
)
def test_errors_say_where(pattern, column, message):
    with pytest.raises(BadRequest, match=rf"pattern, line 1, column {column}: .*{message}"):
        regex(pattern)
