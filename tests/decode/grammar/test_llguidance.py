"""llguidance and the engine agree, behind one interface."""

import random

import numpy as np
import pytest

from pertoken.decode.grammar.engine import Engine
from pertoken.decode.grammar.gbnf import gbnf
from pertoken.decode.grammar.matcher import Matcher
from pertoken.decode.grammar.provider import bits, new_bitmask
from pertoken.decode.grammar.vocabulary import Vocabulary

llguidance = pytest.importorskip("llguidance")
from pertoken.decode.grammar.llguidance_adapter import LLGuidance, tokenizer_of  # noqa: E402

WORDS = [bytes([b]) for b in range(256)] + [b"((", b"))", b"1+", b"+(", b")+1", b"12", b"1)*", b"* 1", b"  "]
PAIRS = {
    "arithmetic": (
        'root ::= root [+*] term | term\nterm ::= [0-9]+ | "(" root ")"',
        'start: start /[+*]/ term | term\nterm: /[0-9]+/ | "(" start ")"',
    ),
    "characters": ('root ::= ("é" | [^a-z])+ "!"', "start: /(é|[^a-z])+!/"),
}


@pytest.mark.parametrize("name", PAIRS)
def test_masks_are_equal_along_random_texts(name):
    vocabulary = Vocabulary([*WORDS, None], ends=(len(WORDS),))
    ours, theirs = PAIRS[name]
    engine, tokenizer = Engine(gbnf(ours), vocabulary), tokenizer_of(vocabulary)
    grammar = llguidance.LLMatcher.grammar_from_lark(theirs)
    draw = random.Random(1)
    for _ in range(6):
        one, other = Matcher(engine), LLGuidance(tokenizer, grammar, vocabulary)
        for _ in range(25):
            masks = new_bitmask(2, vocabulary.size)
            one.fill(masks, 0)
            other.fill(masks, 1)
            allowed = [set(np.flatnonzero(row).tolist()) for row in bits(masks, vocabulary.size)]
            assert allowed[0] == allowed[1]
            token = draw.choice(sorted(allowed[0]))
            assert one.accept(token) and other.accept(token) and one.complete == other.complete
            if one.finished:
                break
        assert other.finished == one.finished
        one.rollback(1)
        other.rollback(1)
        twin, copy = one.fork(), other.fork()
        masks = new_bitmask(2, vocabulary.size)
        twin.fill(masks, 0)
        copy.fill(masks, 1)
        assert np.array_equal(*bits(masks, vocabulary.size))
