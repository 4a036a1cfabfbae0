"""A grammar inside the shared loop: forced tokens, limited drafts, nothing changed but the number of steps."""

import pytest
import torch

from pertoken.decode import make
from pertoken.decode.grammar.engine import Engine
from pertoken.decode.grammar.gbnf import gbnf
from pertoken.decode.grammar.json_schema import json_schema
from pertoken.decode.grammar.matcher import Matcher
from pertoken.decode.grammar.processor import GrammarProcessor
from pertoken.decode.grammar.vocabulary import Vocabulary
from tests.decode.grammar.test_processor import END, PROMPT, model

WORDS = [b"{", b"}", b'"name"', b":", b"na", b'"', b",", b"me", b'":', None, None, b"1", b"2", b'"age"', b"ag", b"e"]

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "integer", "enum": [1, 2, 12, 21]}, "age": {"enum": [11, 22, 1212]}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def encode(text):
    """The longest word first, as a tokenizer would."""
    found, data = [], text.encode()
    while data:
        best = max((w for w in WORDS if w and data.startswith(w)), key=len, default=None)
        if best is None:
            break
        found.append(WORDS.index(best))
        data = data[len(best) :]
    return found


@pytest.fixture(scope="module")
def engine():
    return Engine(json_schema(SCHEMA), Vocabulary(WORDS, ends=(END,), encode=encode))


def processor(engine, canonical):
    return GrammarProcessor(lambda: Matcher(engine), engine.vocabulary.size, canonical)


MASK = (PROMPT != 10).long()


def generate(target, engine, canonical, decoder=None, **options):
    extra = {} if decoder is None else {"custom_generate": decoder}
    out = target.generate(
        PROMPT,
        attention_mask=MASK,
        max_new_tokens=30,
        logits_processor=[processor(engine, canonical)],
        **extra,
        **options,
    )
    return out[:, PROMPT.shape[1] :]


def drafting(name):
    """A draft of the kind that a decoder needs; the one that fills in may propose nothing but words."""
    made = model(2)
    if name == "diffuspec":
        made.config.is_causal, made.config.mask_token_id, made.config.prediction_shift = False, 10, 1
    return made


@pytest.mark.parametrize("canonical", [False, True])
@pytest.mark.parametrize("name", ["xgrammar", "dyspec", "chain", "prompt_lookup", "del", "diffuspec", "full"])
def test_every_decoder_writes_what_plain_decoding_writes(engine, name, canonical):
    target = model(1, 2)
    plain = generate(target, engine, canonical)
    decoder = make(name, draft=drafting(name))
    assert torch.equal(generate(target, engine, canonical, decoder), plain)
    for row in plain.tolist():
        text = b"".join(WORDS[token] or b"" for token in row)
        assert text.startswith(b'{"name":') and text.endswith(b"}")


def test_forced_tokens_take_no_step_and_are_in_the_trace(engine):
    target = model(1, 2)
    decoder = make("xgrammar")
    with decoder.record() as trace:
        out = generate(target, engine, True, decoder)
    lengths = [row.index(END) + 1 for row in out.tolist()]
    # choices: after a first digit there may be a second one; all else is forced
    assert decoder.stats.forced >= sum(lengths) - 8 * len(lengths)
    assert decoder.stats.steps <= 8 < max(lengths)
    sources = sum(int((step.decision.accepted & (step.decision.source == 3)).sum()) for step in trace.steps)
    assert sources == decoder.stats.forced > 0
    plain = make("full")
    generate(target, engine, True, plain)
    assert plain.stats.steps == max(lengths) and plain.stats.forced == 0


def test_sampling_keeps_the_constrained_law():
    """Sampled trees under a grammar: the first two tokens have the law of plain constrained sampling."""
    words = [b"a", b"b", b"c", b"d", b"ab", b"cd", *[None] * 10]
    engine = Engine(gbnf('root ::= [ab] [cd]? "a" | "ab" "cd"'), Vocabulary(words, ends=(END,)))
    target, draft = model(5, 2), model(6)
    prompt = PROMPT[1:2].repeat(64, 1)
    counts = {}
    for name in (None, "dyspec"):
        torch.manual_seed(0)
        found = {}
        for _ in range(12):
            extra = {} if name is None else {"custom_generate": make(name, draft=draft, economy=False, size=6)}
            guide = GrammarProcessor(lambda: Matcher(engine), 16)
            out = target.generate(prompt, max_new_tokens=2, do_sample=True, top_k=0, logits_processor=[guide], **extra)
            for row in out[:, prompt.shape[1] :].tolist():
                found[tuple(row)] = found.get(tuple(row), 0) + 1
        counts[name] = found
    total = 64 * 12
    kinds = sorted(set(counts[None]) | set(counts["dyspec"]))
    assert len(kinds) >= 5
    one, other = ([counts[name].get(kind, 0) for kind in kinds] for name in (None, "dyspec"))
    statistic = sum((a - b) ** 2 / (a + b) for a, b in zip(one, other, strict=True))
    assert statistic < len(kinds) - 1 + 4 * (2 * (len(kinds) - 1)) ** 0.5, (one, other, total)


def test_drafts_stay_in_the_grammar(engine):
    decoder = make("dyspec", draft=model(2), economy=False, size=12)
    with decoder.record() as trace:
        out = generate(model(1, 2), engine, False, decoder)
    texts = [[] for _ in out]
    for step in trace.steps:
        decision = step.decision
        for at, row in enumerate(step.rows):
            for node in range(int(decision.valid[at].sum())):
                path, here = [], node
                while here >= 0:
                    path.append(int(decision.tokens[at, here]))
                    here = int(decision.parents[at, here])
                matcher = Matcher(engine)
                assert all(matcher.accept(token) for token in [*texts[row], *reversed(path)])
            texts[row] += decision.committed[at, : int(decision.count[at])].tolist()
