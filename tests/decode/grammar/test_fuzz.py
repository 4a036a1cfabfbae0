"""Random grammars and texts: going back and forking change nothing; what is large or deep stays bounded."""

import random
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pertoken.core.errors import BadRequest
from pertoken.decode.grammar.engine import Engine
from pertoken.decode.grammar.gbnf import gbnf
from pertoken.decode.grammar.ir import Grammar, Lit, Ref, Repeat, alt, byte_set, seq
from pertoken.decode.grammar.json_schema import json_schema
from pertoken.decode.grammar.matcher import Matcher
from pertoken.decode.grammar.provider import bits
from pertoken.decode.grammar.tables import MASK
from pertoken.decode.grammar.vocabulary import Vocabulary
from tests.decode.grammar import naive
from tests.decode.grammar.test_engine import vocabulary

SMALL = vocabulary("ab", 3)
NAMES = ["root", "x", "y"]
LEAVES = st.one_of(
    st.sampled_from([b"a", b"b", b"ab", b""]).map(Lit), st.just(byte_set(b"ab")), st.sampled_from(NAMES).map(Ref)
)


def larger(inner):
    return st.one_of(
        st.lists(inner, min_size=2, max_size=3).map(lambda items: seq(*items)),
        st.lists(inner, min_size=2, max_size=3).map(lambda items: alt(*items)),
        st.tuples(inner, st.integers(0, 2), st.sampled_from([None, 2, 3, 60])).map(lambda t: Repeat(*t)),
    )


NODES = st.recursive(LEAVES, larger, max_leaves=6)
GRAMMARS = st.tuples(NODES, NODES, NODES).map(lambda nodes: Grammar(dict(zip(NAMES, nodes, strict=True))))


def allowed(matcher):
    return np.flatnonzero(bits(matcher.mask, matcher.engine.vocabulary.size)).tolist()


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(GRAMMARS, st.integers(0, 2**20))
def test_rollback_restores_masks_and_forks_are_independent(grammar, seed):
    try:
        engine = Engine(grammar, SMALL)
    except BadRequest:  # it matches nothing
        return
    try:
        follow(engine, grammar, seed)
    except BadRequest as error:
        assert "ways at once" in str(error)


def follow(engine, grammar, seed):
    draw, matcher = random.Random(seed), Matcher(engine)
    masks, twins = [allowed(matcher)], [matcher.fork()]
    for _ in range(8):
        if matcher.finished:
            break
        token = draw.choice(masks[-1])
        assert matcher.accept(token)
        if not matcher.finished:
            refused = sorted(set(range(SMALL.size)) - set(masks[-1]))
            assert not refused or not twins[-1].fork().accept(draw.choice(refused))
        masks.append([] if matcher.finished else allowed(matcher))
        twins.append(matcher.fork())
    if matcher.finished:
        text = b"".join(SMALL.spells(token) for token in matcher.tokens)
        assert naive.accepts(grammar, text)
    for back in range(len(masks)):
        again = matcher.fork()
        again.rollback(back)
        kept = len(masks) - 1 - back
        assert ([] if again.finished else allowed(again)) == masks[kept]
        assert again.tokens == twins[kept].tokens and again.parses == twins[kept].parses


def test_counts_that_no_token_can_exhaust_have_one_mask():
    engine = Engine(gbnf('root ::= ("b" [a]{3,5000} "b"){1,900} "ab"'), SMALL)
    matcher = Matcher(engine)
    fresh = {}
    for token in [SMALL.tokens.index(b"b"), *[SMALL.tokens.index(b"aaa")] * 1660]:
        assert matcher.accept(token)
        fresh[matcher.parses[-1]] = matcher.mask
    assert engine.tables.used(MASK) < 12 * SMALL.words < len(fresh) * SMALL.words
    bytes_ = Engine(gbnf('root ::= ("b" [a]{3,5000} "b"){1,900} "ab"'), vocabulary("ab", 1))
    for back in (0, 1, 2, 5, 1650, 1657, 1658, 1659):
        twin = matcher.fork()
        twin.rollback(back)
        parse, _ = bytes_.read_bytes(bytes_.start, b"".join(SMALL.spells(token) for token in twin.tokens))
        wanted = [i for i in range(SMALL.size) if SMALL.spells(i) and bytes_.read_bytes(parse, SMALL.spells(i))[0] >= 0]
        assert allowed(twin) == wanted


def test_dead_parses_are_freed():
    engine = Engine(gbnf('root ::= "a" root "b" root | "b" root "a" root | ""'), SMALL, memory=1 << 22)
    draw, keeper = random.Random(0), Matcher(engine)
    for token in (0, 0, 1, 1):
        assert keeper.accept(token)
    mask, begun = allowed(keeper), 0
    for _ in range(60):
        matcher, block = Matcher(engine), engine.tables
        for _ in range(300):
            assert matcher.accept(draw.randrange(2))
        begun += engine.tables is not block
    assert begun > 1 and allowed(keeper) == mask and keeper.accept(0)
    assert engine.tables.bytes() <= 1 << 22


def within(seconds, work):
    before = time.thread_time()
    found = work()
    assert time.thread_time() - before < seconds
    return found


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ('root ::= root "a" | root "b" | ""', b"ab" * 500_000),
        ('root ::= x*\nx ::= "a" | "b" | "ab" | "aba"', b"ab" * 500_000),
        ('root ::= "a"{0,1000000} "b"?', b"a" * 200_000),
    ],
)
def test_ambiguous_and_left_recursive_grammars_read_long_texts(source, text):
    engine = Engine(gbnf(source), SMALL)
    engine.read_bytes(engine.start, text[:10])
    parse, _ = within(20, lambda: engine.read_bytes(engine.start, text))
    assert engine.ends(parse) and engine.tables.bytes() < 1 << 28


def test_ambiguity_without_bound_is_refused_in_words():
    engine = Engine(gbnf('root ::= root root | "ab" | ""'), SMALL)
    engine.read_bytes(engine.start, b"abab")
    with pytest.raises(BadRequest, match="more than 512 ways"):
        within(20, lambda: engine.read_bytes(engine.start, b"ab" * 100_000))


def test_ten_megabytes_of_json():
    engine = Engine(json_schema(True), Vocabulary([bytes([b]) for b in range(256)]))
    item = b'{"name":"value \\"quoted\\"","list":[1,2.5,-3e4,null,true],"inner":{"a":{"b":{"c":[]}}}},'
    engine.read_bytes(engine.start, b"[" + item)
    text = b"[" + item * (10_000_000 // len(item)) + b"0]"
    parse, _ = within(30, lambda: engine.read_bytes(engine.start, text))
    assert engine.ends(parse) and engine.tables.bytes() < 1 << 24


def test_depth_without_end_is_refused_in_words():
    engine = Engine(json_schema(True), Vocabulary([bytes([b]) for b in range(256)]), memory=1 << 24)
    with pytest.raises(BadRequest, match="nested too deeply"):
        within(30, lambda: engine.read_bytes(engine.start, b"[" * 10_000_000))
