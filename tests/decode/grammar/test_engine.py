"""Masks against brute force over all short sentences; the laws of going back and forking."""

import itertools
import random

import numpy as np
import pytest

from pertoken.core.errors import BadRequest
from pertoken.decode.grammar.engine import Engine
from pertoken.decode.grammar.gbnf import gbnf
from pertoken.decode.grammar.matcher import Matcher
from pertoken.decode.grammar.provider import bits
from pertoken.decode.grammar.tables import SPARE, STATE
from pertoken.decode.grammar.vocabulary import Vocabulary
from tests.decode.grammar import naive

GRAMMARS = {
    "left": ('root ::= root "+" term | term\nterm ::= "a" | "(" root "a"', "a+("),
    "mutual": ('root ::= x "a" | "b"\nx ::= root "a" | y\ny ::= x "b" | "a"', "ab"),
    "hidden": ('root ::= n root "a" | "b"\nn ::= "" | "a"', "ab"),
    "ambiguous": ('root ::= root root | "a" | ""', "a"),
    "right": ('root ::= "a" root | "b"', "ab"),
    "even": ('root ::= "a" root "a" | "b" root "b" | ""', "ab"),
    "counted": ('root ::= "b" x{1,60} "b" root?\nx ::= "a"', "ab"),
    "counts of rules": ('root ::= (x "b"){1,50}\nx ::= "a" | "b" x', "ab"),
    "cross": ('root ::= x y z\nx ::= "a"*\ny ::= "b" x | ""\nz ::= "a" | "ba"', "ab"),
}


def vocabulary(letters, longest=3):
    words = ["".join(w) for n in range(1, longest + 1) for w in itertools.product(letters, repeat=n)]
    return Vocabulary([w.encode() for w in words] + [None, None], ends=(len(words),))


def sentences(grammar, letters, longest):
    texts = (bytes(w) for n in range(longest + 1) for w in itertools.product(letters.encode(), repeat=n))
    return {text for text in texts if naive.accepts(grammar, text)}


def mask_of(matcher):
    return set(np.flatnonzero(bits(matcher.mask, matcher.engine.vocabulary.size)))


@pytest.mark.parametrize("name", GRAMMARS)
def test_masks_equal_brute_force(name):
    source, letters = GRAMMARS[name]
    longest = {1: 10, 2: 9, 3: 7}[len(letters)]
    vocab = vocabulary(letters, 2 if len(letters) > 2 else 3)
    language = sentences(gbnf(source), letters, longest)
    prefixes = {text[:n] for text in language for n in range(len(text) + 1)}
    engine = Engine(gbnf(source), vocab)
    checked = 0
    for n in range(2):  # with a token behind it, such a beginning still has an end among the sentences
        for word in itertools.product(letters.encode(), repeat=n):
            text = bytes(word)
            parse, _ = engine.read_bytes(engine.start, text)
            assert (parse >= 0) == (text in prefixes), text
            if parse < 0:
                continue
            allowed = set(np.flatnonzero(bits(engine.mask(parse), vocab.size)))
            wanted = {i for i, token in enumerate(vocab.tokens) if token and text + token in prefixes}
            wanted |= {vocab.ends[0]} if text in language else set()
            assert allowed == wanted, (text, [vocab.spells(i) for i in allowed ^ wanted])
            checked += 1
    assert checked > 1


def test_rollback_and_fork():
    engine = Engine(gbnf(GRAMMARS["left"][0]), vocabulary("a+(", 2))
    random.seed(0)
    for _ in range(20):
        matcher = Matcher(engine)
        masks = [mask_of(matcher)]
        for _ in range(12):
            allowed = sorted(mask_of(matcher))
            if not allowed or matcher.finished:
                break
            assert matcher.accept(int(random.choice(allowed)))
            masks.append(mask_of(matcher))
        twin = matcher.fork()
        for back in range(len(masks)):
            again = matcher.fork()
            again.rollback(back)
            assert mask_of(again) == masks[len(masks) - 1 - back]
        assert mask_of(twin) == mask_of(matcher) == masks[-1]
        with pytest.raises(BadRequest, match="at most"):
            matcher.rollback(len(masks))


def test_split_characters():
    pieces = ["é".encode()[:1], "é".encode()[1:], "日".encode()[:2], "日".encode()[2:], b"a", "é".encode()]
    vocab = Vocabulary(pieces)
    matcher = Matcher(Engine(gbnf('root ::= [^a] "日"'), vocab))
    assert mask_of(matcher) == {0, 2, 5}
    assert matcher.accept(0) and mask_of(matcher) == {1, 3}  # C3 A5 is another letter
    assert matcher.accept(1) and mask_of(matcher) == {2}
    assert not matcher.accept(0) and matcher.accept(2) and mask_of(matcher) == {3}
    assert matcher.accept(3) and matcher.complete


def test_bounded_on_long_input():
    vocab = vocabulary("ab")
    engine = Engine(gbnf('root ::= x*\nx ::= "a" x "b" | "ab"'), vocab)
    flat, _ = engine.read_bytes(engine.start, b"ab" * 500_000)
    size = engine.tables.bytes()
    assert engine.ends(flat) and size < 1 << 23
    with pytest.raises(BadRequest, match="nested too deeply"):
        deep = Engine(gbnf('root ::= "a" root "b" | "ab"'), vocab, memory=1 << 24)
        deep.read_bytes(deep.start, b"a" * 1_000_000)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ('root ::= "a', r"line 1, column 12: it ends"),
        ("root ::= (a\na ::= [b]", r"'\)' expected"),
        ('root ::= "a"\nx ::= "b"', "cannot be reached"),
        ("root ::= y", "'y' is not defined"),
        ('root ::= "a" root', "grammar is empty"),
        ("root ::= [z-a]", "runs backwards"),
        ('root ::= "a"{3,2}', "asks for more"),
        ("root ::= " + "(" * 200, "nested more than"),
    ],
)
def test_errors_say_where(source, message):
    with pytest.raises(BadRequest, match=message):
        Engine(gbnf(source), vocabulary("ab"))


def test_forced_text_is_tokenised_as_the_tokenizer_does():
    words = [b"o", b"order", b"Id", b"orderId", b"x", b" or", b"d", b"e", b"r"]

    def encode(text):
        ids, data = [], text.encode()
        while data:
            best = max((w for w in words if data.startswith(w)), key=len)
            ids.append(words.index(best))
            data = data[len(best) :]
        return ids

    vocab = Vocabulary(words, encode=encode)
    assert Matcher(Engine(gbnf('root ::= "order" ("x" | "d")'), vocab)).forced() == [1]
    assert Matcher(Engine(gbnf('root ::= "order" ("x" | "Id")'), vocab)).forced() == []
    assert Matcher(Engine(gbnf('root ::= "xorder" ("x" | "Id")'), vocab)).forced() == [4]


def test_vocabulary_that_cannot_spell_the_grammar():
    with pytest.raises(BadRequest, match="cannot spell"):
        _ = Matcher(Engine(gbnf('root ::= "c"'), vocabulary("ab"))).mask


def test_empty_text_only():
    matcher = Matcher(Engine(gbnf('root ::= ""'), vocabulary("a")))
    assert matcher.complete and mask_of(matcher) == set(matcher.engine.vocabulary.ends)


def test_counts_stay_small():
    vocab = vocabulary("ab")
    engine = Engine(gbnf('root ::= "b" [^b]{3,10000} "b"'), vocab)
    parse, _ = engine.read_bytes(engine.start, b"b" + b"a" * 9_999)
    assert engine.tables.used(STATE) < 50 and engine.read_bytes(parse, b"ab")[0] >= 0
    assert engine.read_bytes(parse, b"aa")[0] < 0 and engine.read_bytes(engine.start, b"baab")[0] < 0


def test_memory_of_engines_that_are_gone_is_used_again_without_a_trace():
    vocab = vocabulary("ab()+")
    sources = [GRAMMARS[name][0] for name in ("left", "counted", "cross", "counts of rules")]
    fresh = []
    for _ in range(2):
        for number, source in enumerate(sources):
            engine = Engine(gbnf(source), vocab)
            masks = []
            for text in (b"", b"a", b"b", b"ba", b"(a", b"bab"):
                parse, _ = engine.read_bytes(engine.start, text)
                masks.append(engine.mask(parse).tolist() if parse >= 0 else None)
            if len(fresh) < len(sources):
                fresh.append(masks)
            assert masks == fresh[number]
            address = engine.tables.address
            del engine
    assert SPARE and Engine(gbnf(sources[0]), vocab).tables.address == address
