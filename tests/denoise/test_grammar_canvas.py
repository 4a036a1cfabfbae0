"""A grammar on a canvas: masks against all fillings of it, and every step of the loop can still be completed."""

import itertools
import random

import numpy as np
import pytest
import torch

from pertoken.core.errors import BadRequest
from pertoken.decode.grammar.engine import Engine
from pertoken.decode.grammar.gbnf import gbnf
from pertoken.decode.grammar.json_schema import json_schema
from pertoken.decode.grammar.moves import Moves
from pertoken.decode.grammar.vocabulary import Vocabulary
from pertoken.denoise import COMMIT
from pertoken.denoise.grammar_canvas import GrammarCanvas, Search
from pertoken.denoise.loop import Denoise
from pertoken.denoise.random_commit import RandomCommit
from pertoken.denoise.threshold import Threshold
from tests.decode.grammar import naive
from tests.denoise.conftest import MASK, fill, prompts

GRAMMARS = [
    'root ::= "(" root ")" root | "a"?',
    'root ::= ("a" | "b" root "b"){1,3}',
    'root ::= "ab" ("(" [ab]* ")")?',
]
WORDS = [b"a", b"b", b"(", b")", b"ab", None, None]  # the last but one ends a text


def sentence(grammar, tokens):
    """Whether tokens spell a sentence up to the first end, with nothing but ends behind it."""
    text = tokens[: tokens.index(5)] if 5 in tokens else tokens
    if set(tokens[len(text) :]) - {5} or 6 in text:
        return False
    return naive.accepts(grammar, b"".join(WORDS[token] for token in text))


@pytest.mark.parametrize("source", GRAMMARS)
def test_masks_are_those_of_all_fillings(source):
    grammar = gbnf(source)
    search = Search(Moves(Engine(gbnf(source), Vocabulary(WORDS, ends=(5,)))), 1000)
    length, draw = 4, random.Random(0)
    good = [tokens for tokens in itertools.product(range(6), repeat=length) if sentence(grammar, tokens)]
    assert len(good) > 5
    found = 0
    for _ in range(60):
        some = draw.choice(good) if draw.random() < 0.8 else [draw.randrange(6) for _ in range(length)]
        tokens = [token if draw.random() < 0.4 else None for token in some]
        fitting = [f for f in good if all(t is None or t == g for t, g in zip(tokens, f, strict=True))]
        masks = search.masks(tokens)
        assert search.possible(tokens) == bool(fitting) == (masks is not None)
        if masks is None:
            continue
        for at, mask in masks.items():
            allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
            assert set(allowed) == {filling[at] for filling in fitting}, (tokens, at)
            found += 1
    assert found > 50


def test_fewer_states_forbid_more_and_never_less():
    moves = Moves(Engine(gbnf(GRAMMARS[0]), Vocabulary(WORDS, ends=(5,))))
    few, many = Search(moves, 3), Search(moves, 1000)
    draw, tokens = random.Random(1), [None] * 8
    while None in tokens:
        masks, all_masks = few.masks(tokens), many.masks(tokens)
        assert masks is not None, tokens  # what was allowed alone stays possible
        assert all(not np.any(mask & ~all_masks[at]) for at, mask in masks.items())
        at = draw.choice(list(masks))
        tokens[at] = int(draw.choice(np.flatnonzero(np.unpackbits(masks[at].view(np.uint8), bitorder="little"))))
    assert many.possible(tokens)


SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "array", "items": {"enum": [1, 12, True]}, "maxItems": 4}, "b": {"type": "boolean"}},
    "required": ["a"],
    "additionalProperties": False,
}
PIECES = [
    None,
    None,
    *(bytes([b]) for b in b'{}[]",:12abtruefls'),
    b'{"',
    b'":',
    b"true",
    b'":[',
    b",1",
    b"]}",
    b"false",
]
END = 1


@pytest.fixture(scope="module")
def language():
    return Moves(Engine(json_schema(SCHEMA), Vocabulary(PIECES, ends=(END,))))


def sentence_of(language, tokens):
    state = language.start
    for token in tokens[: tokens.index(END)] if END in tokens else tokens:
        state = language.read(state, token)
        if state < 0:
            return False
    return language.complete(state)


RULES = {
    "threshold": Threshold(0.02),
    "random": RandomCommit(),
    "schedule": None,
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("block", [24, 8])
def test_every_step_of_the_loop_can_be_completed(model, language, name, block):
    inputs = prompts(5, 3, 7)
    rules = {} if RULES[name] is None else {"commit": RULES[name]}
    decoder = Denoise(**rules, constraint=GrammarCanvas(language), block=block, steps=24 if name != "random" else 12)
    with decoder.record() as trace:
        out = fill(model, inputs, decoder, 24, eos_token_id=END, pad_token_id=0).tolist()
    for row in out:
        text = [token if token else END for token in row]
        assert sentence_of(language, text), row
    assert len({tuple(row) for row in out}) > 1
    search = Search(language, 1000, pad=0)
    tokens = {row: [None] * 24 for row in range(3)}
    steps = 0
    for step in trace.steps:
        if step.site != COMMIT:
            continue
        start = step.decision.valid.shape[1] - 24
        for at, row in enumerate(step.rows):
            columns = (step.decision.keep[at].nonzero().flatten() - start).tolist()
            for column, token in zip(columns, step.note["tokens"][at], strict=True):
                tokens[row][column] = token
            assert search.possible(tokens[row]), tokens[row]
            steps += 1
    assert steps > 6
    free = fill(model, inputs, Denoise(**rules, block=block), 24, eos_token_id=END, pad_token_id=0).tolist()
    assert not any(sentence_of(language, [token if token else END for token in row]) for row in free if MASK not in row)


def test_several_commits_at_once_are_admitted_as_far_as_they_fit_together(model, language):
    decoder = Denoise(commit=Threshold(0.0), constraint=GrammarCanvas(language), block=24)
    out = fill(model, prompts(4, 6), decoder, 24, eos_token_id=END, pad_token_id=0)
    assert all(sentence_of(language, [token if token else END for token in row]) for row in out.tolist())
    assert decoder.stats.steps > 1  # not all fitted at once


def test_sampling_and_a_row_alone(model, language):
    decoder = Denoise(constraint=GrammarCanvas(language), block=12, steps=12)
    torch.manual_seed(0)
    out = fill(model, prompts(5, 3), decoder, 24, eos_token_id=END, pad_token_id=0, do_sample=True, top_k=0)
    assert all(sentence_of(language, [token if token else END for token in row]) for row in out.tolist())


def test_bad_requests(model, language):
    with pytest.raises(BadRequest, match="no sentence of the grammar fits a canvas of 2 tokens"):
        fill(
            model, prompts(3), Denoise(constraint=GrammarCanvas(language), block=2), 2, eos_token_id=END, pad_token_id=0
        )
    with pytest.raises(BadRequest, match="keeps nothing"):
        GrammarCanvas(language, states=0)
    endless = Moves(Engine(json_schema(SCHEMA), Vocabulary(PIECES)))
    with pytest.raises(BadRequest, match="no id that ends a text"):
        fill(model, prompts(3), Denoise(constraint=GrammarCanvas(endless)), 32)
    wide = Moves(Engine(json_schema(SCHEMA), Vocabulary(PIECES, ends=(END,), size=5000)))
    with pytest.raises(BadRequest, match="has 5000 tokens"):
        fill(model, prompts(3), Denoise(constraint=GrammarCanvas(wide)), 32)
