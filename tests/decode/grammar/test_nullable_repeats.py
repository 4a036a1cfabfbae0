"""Repetitions of what may be empty keep their upper bound."""

import itertools

import pytest

from pertoken.decode.grammar.engine import Engine
from pertoken.decode.grammar.ir import Grammar, Lit, Ref, Repeat, alt, seq
from pertoken.decode.grammar.matcher import Matcher
from tests.decode.grammar import naive
from tests.decode.grammar.test_engine import vocabulary

LETTERS = vocabulary("ab", 1)


def accepts(engine, text):
    matcher = Matcher(engine)
    tokens = {LETTERS.spells(token): token for token in range(LETTERS.size)}
    return all(matcher.accept(tokens[bytes([byte])]) for byte in text) and matcher.complete


@pytest.mark.parametrize("least", [0, 1, 2])
@pytest.mark.parametrize("most", [2, 3, None])
@pytest.mark.parametrize("by_name", [True, False])
def test_short_texts_are_those_of_the_definition(least, most, by_name):
    maybe = alt(Lit(b"a"), Lit(b""))
    item = Ref("y") if by_name else maybe
    grammar = Grammar({"root": seq(Lit(b"b"), Repeat(item, least, most)), "y": maybe})
    engine = Engine(grammar, LETTERS)
    for length in range(6):
        for text in map(bytes, itertools.product(b"ab", repeat=length)):
            assert accepts(engine, text) == naive.accepts(grammar, text), text


@pytest.mark.parametrize("times", [59, 60, 61])
def test_a_bound_that_is_counted_holds(times):
    grammar = Grammar({"root": Repeat(Ref("y"), 1, 60), "y": alt(Lit(b"ab"), seq(Repeat(Lit(b"b"), 0, 1)))})
    assert accepts(Engine(grammar, LETTERS), b"ab" * times) == (times <= 60)
