"""DiffTester: what lines share, which tokens lie on it, groups, languages, and what it leaves alone."""

from __future__ import annotations

import inspect
import itertools
import random
import textwrap
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pertoken.core.errors import BadRequest
from pertoken.denoise import syntax
from pertoken.denoise.canvas import Canvas
from pertoken.denoise.difftester import DiffTester, shared
from pertoken.denoise.lines import IDLE
from pertoken.denoise.loop import Denoise
from pertoken.denoise.pieces import Pieces
from pertoken.denoise.rules import Guess
from pertoken.denoise.schedule import Schedule
from pertoken.denoise.syntax import LITERALS, STRING_TEXT, Node, parser_for, unparsed
from pertoken.denoise.threshold import Threshold
from pertoken.zoo.unit_tests import unit_tests
from tests.denoise import naive_difftester as naive
from tests.denoise.conftest import alone, bidirectional, fill, prompts

PARSERS = [("python", "ast"), ("python", "tree_sitter"), ("java", "tree_sitter"), ("cpp", "tree_sitter")]


@pytest.fixture(scope="session")
def tokenizer():
    """A small byte-level vocabulary, in which most characters outside ASCII are several tokens."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    inner.train_from_iterator((function + tests for function, tests in unit_tests(120, 3)), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>", pad_token="<|end|>")


@pytest.fixture(scope="session")
def spelling(tokenizer):
    """Bytes of every token, from the tokenizer's own decoder: a token alone may be part of a character."""
    whole = Pieces.of(tokenizer)
    return [whole.text(np.array([token]))[0].tobytes() for token in range(len(tokenizer))]


def situation(tokenizer, rows, prompt="", width=None):
    """A canvas of one block, and guesses, from rows of (text, decided) pieces."""
    ids, decided = [], []
    for row in rows:
        parts = [(tokenizer(text)["input_ids"], known) for text, known in row]
        ids.append([token for part, _ in parts for token in part])
        decided.append([known for part, known in parts for _ in part])
    return canvas_of(tokenizer, ids, decided, tokenizer(prompt)["input_ids"], width)


def canvas_of(tokenizer, ids, decided, prompt, width=None):
    width = width or max(map(len, ids))
    end = tokenizer.eos_token_id
    tokens = torch.tensor([row + [end] * (width - len(row)) for row in ids])
    known = torch.tensor([row + [False] * (width - len(row)) for row in decided])
    start = torch.tensor([prompt] * len(ids), dtype=torch.long).reshape(len(ids), len(prompt))
    canvas = Canvas.of(start, torch.ones_like(start), width, width, len(tokenizer))
    canvas.commit(torch.nn.functional.pad(known, (len(prompt), 0)), torch.cat([start, tokens], 1))
    scores = torch.full((*tokens.shape, len(tokenizer)), -9.0).scatter_(-1, tokens[..., None], 9.0)
    confidence = torch.full(tokens.shape, 0.9, dtype=torch.float64)
    masked = canvas.masked[:, len(prompt) :]
    return Guess(scores, tokens, confidence, masked, torch.zeros(len(ids), dtype=torch.long)), canvas


def committed(tokenizer, rows, prompt="", **options):
    """The texts of the tokens that a DiffTester without a base of its own commits, row by row."""
    guess, canvas = situation(tokenizer, rows, prompt)
    rule = DiffTester(tokenizer, Schedule(), share=None, threshold=0.5, **options)
    chosen = rule.choose(guess, canvas)
    return [tokenizer.batch_decode(row[kept][:, None]) for row, kept in zip(guess.tokens, chosen, strict=True)]


def rough(texts):
    """Tokens without their blanks, as one text."""
    return ["".join(text.strip() for text in row) for row in texts]


def lines_of(*texts):
    return [[(text, False)] for text in texts]


# ---- what lines share


@st.composite
def trees(draw, depth=0):
    kind = draw(st.sampled_from(["a", "b", "identifier", "integer", "ERROR", "my_identifier"]))
    children = draw(st.lists(trees(depth + 1), max_size=3)) if depth < 2 else []
    start = draw(st.integers(0, 20))
    return Node(kind, start, start + 3, tuple(children), b"" if children else draw(st.sampled_from([b"", b"x", b"y"])))


@settings(max_examples=120, deadline=None)
@given(st.lists(trees(), max_size=6))
def test_shared_bytes_equal_the_naive_twin(found):
    mine = [sorted(spans) for spans in shared(found, frozenset({"integer"}))]
    assert mine == [sorted(spans) for spans in naive.spans(found, {"integer"})]


@pytest.mark.parametrize(("language", "kind"), PARSERS)
def test_shared_bytes_of_real_lines_equal_the_naive_twin(language, kind):
    rng, parse, some = random.Random(1), parser_for(language, kind), 0
    for _, tests in unit_tests(60, 5, (language,)):
        lines = tests.encode().splitlines(keepends=True)
        lines += [bytes(rng.choice((byte, byte, byte, 40)) for byte in rng.choice(lines)) for _ in range(2)]
        found = [parse(line) for line in lines]
        mine = shared(found)
        some += sum(map(len, mine))
        assert [sorted(spans) for spans in mine] == [sorted(spans) for spans in naive.spans(found, LITERALS)]
    assert some > 500


@pytest.mark.parametrize("kind", ["ast", "tree_sitter"])
def test_python_lines_share_all_but_literals(tokenizer, kind):
    rows = lines_of("assert add(1, 22) == 23\n", "assert add(4, 5) == 9\n", "assert add(11, 5) == 16\n")
    assert set(rough(committed(tokenizer, rows, parser=kind))) == {"assertadd(,)=="}


def test_java_lines_share_all_but_literals(tokenizer):
    rows = lines_of("assertEquals(23, add(1, 22));\n", "assertEquals(9, add(4, 5));\n")
    assert set(rough(committed(tokenizer, rows, language="java"))) == {"assertEquals(,add(,));"}


def test_cpp_lines_share_all_but_literals(tokenizer):
    rows = lines_of("EXPECT_EQ(add(1, 22), 23);\n", "EXPECT_EQ(add(4, 5), 9);\n")
    found = committed(tokenizer, rows, language="cpp")
    assert set(rough(found)) <= {"EXPECT_EQ(add(,);", "EXPECT_EQ(add(,),);"}


def test_names_that_differ_are_left_alone_and_gaps_stay_aligned(tokenizer):
    rows = lines_of("assert add(a, 1, c)\n", "assert add(b, 2, c)\n", "assert add(d, 3, c)\n")
    assert set(rough(committed(tokenizer, rows))) == {"assertadd(,,c)"}


def test_one_row_shares_structure_between_its_own_lines(tokenizer):
    found = committed(tokenizer, lines_of("assert add(1, 2) == 3\nassert add(4, 4) == 8\nx = 3\n"))
    assert rough(found) == ["assertadd(,)==assertadd(,)=="]


def test_decided_lines_are_templates_only_if_asked_for(tokenizer):
    rows = [[("assert add(1, 2) == 3\n", True)], [("assert add(4, 4) == 8\n", False)]]
    assert rough(committed(tokenizer, rows)) == ["", ""]
    assert rough(committed(tokenizer, rows, templates="all")) == ["", "assertadd(,)=="]


def test_strings_are_protected_if_asked_for(tokenizer):
    rows = lines_of("assert up( 'ab' ) == 'x'\n", "assert up( 'kl' ) == 'x'\n")
    plain, safe = committed(tokenizer, rows), committed(tokenizer, rows, protected=LITERALS | STRING_TEXT)
    assert "ab" in rough(plain)[0] and "kl" in rough(plain)[1]
    assert rough(safe)[0] == rough(safe)[1] and "ab" not in rough(safe)[0] and "up" in rough(safe)[0]


def test_lines_without_letters_and_broken_lines_share_nothing(tokenizer):
    for text in ("(1, '2'),\n", "assert f( ==\n", "# a note\n"):
        assert rough(committed(tokenizer, lines_of(text, text))) == ["", ""]


def test_nothing_is_shared_between_groups(tokenizer):
    rows = lines_of("assert add(1, 2) == 3\n", "assert add(4, 4) == 8\n")
    assert rough(committed(tokenizer, rows, groups=(0, 1))) == ["", ""]
    assert rough(committed(tokenizer, rows, groups=(4, 4))) == ["assertadd(,)=="] * 2


# ---- where tokens lie


@pytest.mark.parametrize(("language", "kind"), PARSERS)
def test_decisions_equal_the_naive_twin(tokenizer, spelling, language, kind):
    rng, parse, some = random.Random(7), parser_for(language, kind), 0
    rule = DiffTester(tokenizer, Schedule(), threshold=0.0, language=language, parser=kind)
    for number, (function, tests) in enumerate(unit_tests(40, 11, (language,))):
        prompt = tokenizer(function + rng.choice(("", "x = 1; ", "é = ")))["input_ids"]
        ids, decided = [], []
        for _ in range(rng.choice((1, 2, 4))):
            row = tokenizer(mangled(tests, rng, number))["input_ids"]
            if rng.random() < 0.3:
                row.insert(rng.randrange(len(row)), tokenizer.eos_token_id)
            ids.append(row)
            decided.append([rng.random() < rng.choice((0.1, 0.7)) for _ in row])
        guess, canvas = canvas_of(tokenizer, ids, decided, prompt)
        chosen = rule.choose(guess, canvas)
        tokens = torch.cat([canvas.ids[:, : len(prompt)], guess.tokens], 1).tolist()
        rows = [list(zip(*both, strict=True)) for both in zip(tokens, canvas.masked.tolist(), strict=True)]
        wanted = naive.approved(rows, spelling, {tokenizer.eos_token_id}, len(prompt), parse, LITERALS, idle)
        for row, places in enumerate(wanted):
            assert set((chosen[row].nonzero().flatten() + len(prompt)).tolist()) == places
            some += len(places)
    assert some > 100


def idle(line):
    return not line.translate(None, IDLE)


def mangled(text, rng, number):
    """The text with some characters changed, some of them to others outside ASCII, and line ends lost or doubled."""
    if number % 3 == 0:
        return text
    swaps = {"a": "é", "'": '"', "\n": rng.choice(("\n", "\n\n", "\n  ", " ")), "(": rng.choice(("(", "[", "😀"))}
    return "".join(swaps.get(c, c) if rng.random() < 0.2 else c for c in text)


def test_characters_of_several_bytes_and_tokens_move_nothing(tokenizer):
    rows = lines_of("assert é(1, ü) == 2\n", "assert é(3, ü) == 4\n")
    guess, canvas = situation(tokenizer, rows)
    chosen = DiffTester(tokenizer, Schedule(), share=None, threshold=0.5).choose(guess, canvas)
    pieces = Pieces.of(tokenizer)
    texts = [pieces.text(row[kept].numpy())[0].tobytes() for row, kept in zip(guess.tokens, chosen, strict=True)]
    assert [text.replace(b" ", b"").decode() for text in texts] == ["asserté(,ü)=="] * 2
    assert b"\xc3" in [pieces.text(np.array([token]))[0].tobytes() for token in guess.tokens[0].tolist()]


def test_half_a_character_does_no_harm(tokenizer):
    half = tokenizer("é")["input_ids"][:1]
    ids = [half + tokenizer(f"assert add({n}, 2)\n")["input_ids"] + half for n in (1, 3)]
    for language, kind in PARSERS:
        guess, canvas = canvas_of(tokenizer, ids, [[False] * len(row) for row in ids], [])
        rule = DiffTester(tokenizer, Schedule(), threshold=0.0, language=language, parser=kind)
        assert not rule.choose(guess, canvas)[:, 0].any()


def test_a_token_over_a_line_end_needs_both_lines(tokenizer):
    wide = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))
    wide.add_special_tokens({"eos_token": "<|end|>"})
    wide.add_tokens([")\nassert"])
    rows = lines_of("assert f(1)\nassert g(2)\n", "assert f(3)\nassert h(4)\n", "assert f(5)\n= (6)\n")
    joined = next(token for token in range(len(wide)) if wide.decode([token]) == ")\nassert")
    guess, canvas = situation(wide, rows)
    assert (guess.tokens == joined).any(-1).tolist() == [True, True, False]
    chosen = DiffTester(wide, Schedule(), threshold=0.0, share=None).choose(guess, canvas)
    assert chosen[guess.tokens == joined].tolist() == [True, True]


def test_a_fence_limits_where_there_is_one(tokenizer):
    body = "assert add(1, 2) == 3\nassert add(4, 4) == 8\n"
    inside = committed(tokenizer, lines_of(f"assert add(1, 2) == 3\n```python\n{body}```\nassert add(5, 5) == 10\n"))
    assert rough(inside) == ["assertadd(,)==" * 2]
    assert rough(committed(tokenizer, lines_of(f"```java\n{body}```\n"))) == [""]
    assert rough(committed(tokenizer, lines_of(body + "```\n" + body), prompt="Tests:\n```python\n")) == [
        "assertadd(,)==" * 2
    ]
    done = "```python\ndef add(a, b):\n    return a + b\n```\n"
    assert rough(committed(tokenizer, lines_of(body), prompt=done)) == ["assertadd(,)==" * 2]


def test_the_last_line_of_the_prompt_begins_the_first_of_the_canvas(tokenizer):
    rows = lines_of("add(1, 2) == 3\n", "add(4, 4) == 8\n")
    assert set(rough(committed(tokenizer, rows, prompt="x = 2\nassert "))) == {"add(,)=="}


def test_text_ends_at_the_end_of_text(tokenizer):
    rows = lines_of("x = 1\n<|end|>assert add(1, 2)\n", "y = 2\n<|end|>assert add(2, 2)\n")
    assert rough(committed(tokenizer, rows)) == ["=", "="]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_bytes_are_survived_and_only_undecided_places_are_chosen(tokenizer, data):
    language, kind = data.draw(st.sampled_from(PARSERS))
    token = st.integers(0, len(tokenizer) + 3)
    rows = data.draw(st.integers(1, 3))
    width = data.draw(st.integers(1, 40))
    ids = [data.draw(st.lists(token, min_size=width, max_size=width)) for _ in range(rows)]
    decided = [data.draw(st.lists(st.booleans(), min_size=width, max_size=width)) for _ in range(rows)]
    prompt = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=5))
    tokens = torch.tensor(ids)
    guess, canvas = canvas_of(tokenizer, [[min(t, len(tokenizer) - 1) for t in row] for row in ids], decided, prompt)
    guess.tokens = tokens
    canvas.ids[:, len(prompt) :] = torch.where(canvas.masked[:, len(prompt) :], len(tokenizer), tokens)
    guess.sharpened = guess.confidence  # ids beyond the vocabulary have no score
    chosen = DiffTester(tokenizer, Schedule(), threshold=0.0, language=language, parser=kind).choose(guess, canvas)
    assert not (chosen & ~guess.masked).any()


@settings(max_examples=150, deadline=None)
@given(st.one_of(st.binary(max_size=60), st.text(max_size=40).map(lambda text: text.encode(errors="replace"))))
def test_parsers_survive_any_line(line):
    for language, kind in PARSERS:
        for _, leaf in naive.leaves(parser_for(language, kind)(line)):
            assert line[leaf.start : leaf.end] == leaf.text


@pytest.mark.parametrize("line", [b"(" * 3000, b"a" + b".a" * 3000, b"-" * 3000 + b"1", b"f(" * 300 + b")" * 300])
def test_deep_lines_are_not_read(line):
    for language, kind in PARSERS:
        assert sum(1 for _ in naive.leaves(parser_for(language, kind)(line))) >= 1
        assert (
            shared([parser_for(language, kind)(line)] * 2)[0] == shared([unparsed(line)] * 2)[0] == [] or kind != "ast"
        )


def test_python_trees_hold_every_character_of_a_line():
    read = 0
    for line in (inspect.getsource(textwrap) + inspect.getsource(random)).encode().splitlines(keepends=True):
        tree = parser_for("python", "ast")(line)
        if tree != unparsed(line):
            read += 1
            assert b"".join(leaf.text for _, leaf in naive.leaves(tree)).replace(b" ", b"") == b"".join(line.split())
    assert read > 300


def test_pieces_are_the_text_of_other_tokenizers_too():
    vocabulary = ["</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁asertdf(1,)=\n'", "▁a", "▁=", "(1"]
    merges = [("▁", "a"), ("▁", "="), ("(", "1")]
    inner = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, merges, byte_fallback=True))
    inner.normalizer = None
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fallback = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>")
    text = "a = adé(1, 'ü😀') == 1\n 1"
    ids = np.array(fallback(text)["input_ids"])
    data, ends = Pieces.of(fallback).text(ids)
    assert data.tobytes().decode().strip() == fallback.decode(ids).strip() == text
    assert ends[-1] == len(data) and len(ends) == len(ids)
    assert Pieces.of(fallback).special.nonzero()[0].tolist() == [0, 1]


# ---- in the loop


def flat(line, bytes=2):
    """Lines of the same first bytes are alike in all."""
    return Node("module", 0, len(line), (Node(str(line[:bytes]), 0, len(line), (), line),))


def never(line, number=itertools.count()):  # noqa: B008
    """No line is like another, not even one of the same text."""
    return Node("module", 0, len(line), (Node(str(next(number)), 0, len(line), (), line),))


@pytest.fixture(scope="module")
def letters():
    """A tokenizer of the tiny models' vocabulary: every token but the first two is a letter, some begin lines."""
    characters = [chr(c) for c in range(ord("A"), ord("A") + 56)]
    vocabulary = {"<pad>": 0, "<end>": 1, "a": 2, "Ċ": 3} | {c + "x": i + 4 for i, c in enumerate(characters[:20])}
    vocabulary |= {"Ċ" + c: i + 24 for i, c in enumerate(characters[:36])} | {"Ã": 60}
    inner = Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", pad_token="<pad>")


@pytest.mark.parametrize("base", [Schedule(), Schedule(alg_temp=0.2, sharpened=True), Threshold(0.3)])
@pytest.mark.parametrize("off", [{"threshold": 1.1}, {"parser": never, "threshold": 0.0}])
def test_without_common_structure_it_is_its_base(model, letters, base, off):
    inputs, outs = prompts(7, 3, 12), []
    for commit in (base, DiffTester(letters, base, **off)):
        decoder = Denoise(commit, block=None)
        torch.manual_seed(5)
        outs.append(fill(model, inputs, decoder, length=24, do_sample=True, temperature=1.3))
        steps = decoder.stats.steps
    assert outs[0].equal(outs[1])
    decoder = Denoise(base, block=None)
    torch.manual_seed(5)
    fill(model, inputs, decoder, length=24, do_sample=True, temperature=1.3)
    assert decoder.stats.steps == steps


def test_common_structure_saves_steps_at_every_second_one(model, letters):
    inputs = {name: value.expand(4, -1) for name, value in prompts(6).items()}
    rule = DiffTester(letters, Schedule(), threshold=0.0, parser=flat)
    decoder, plain = Denoise(rule, block=None), Denoise(Schedule(), block=None)
    torch.manual_seed(0)
    with decoder.record() as trace:
        fill(model, inputs, decoder, length=32, do_sample=True)
    fill(model, inputs, plain, length=32)
    counts = [step.decision.keep.sum(-1) for step in trace.at("denoise.commit")]
    assert max(int(count.max()) for count in counts[::2]) > 1
    assert all((count == 1).all() for count in counts[1::2])
    assert decoder.stats.steps < plain.stats.steps == 32
    extra = sum(int(count.sum()) - len(count) for count in counts)
    assert rule.stats.added == extra == rule.stats.approved and 0 < rule.stats.steps <= len(counts[::2])


@pytest.mark.parametrize(("block", "parser"), [(None, flat), (8, partial(flat, bytes=1))])
def test_a_row_depends_on_its_group_and_on_nothing_else(model, letters, block, parser):
    def run(part, groups=None):
        rule = DiffTester(letters, Schedule(), threshold=0.0, parser=parser, groups=groups)
        return fill(model, part, Denoise(rule, block=block), length=32).tolist()

    same = []
    for seed in range(6):
        inputs = prompts(7, 3, 12, 5, seed=seed)
        together = run(inputs, (0, 1, 0, 1))
        for rows in ([0, 2], [1, 3]):
            width = int(inputs["attention_mask"][rows].sum(-1).max())
            group = {name: value[rows][:, -width:] for name, value in inputs.items()}
            assert run(group, (0, 0)) == [together[row] for row in rows]
            same += [run(alone(inputs, row)) == [together[row]] for row in rows]
    assert not all(same), "a group must have mattered to some row"


def test_rows_of_the_same_prompt_are_a_group(model, letters):
    one, other = prompts(6, seed=1), prompts(6, seed=2)
    inputs = {name: torch.cat([one[name], other[name], one[name]]) for name in one}
    outs = []
    for groups in (None, (0, 1, 0)):
        torch.manual_seed(3)
        decoder = Denoise(DiffTester(letters, Schedule(), threshold=0.0, parser=flat, groups=groups), block=None)
        outs.append(fill(model, inputs, decoder, length=32, do_sample=True))
    assert outs[0].equal(outs[1])


def test_shares_add_up_to_one_over_the_undecided_places(tokenizer):
    guess, _ = situation(
        tokenizer, [[("assert add(1, 2)", False), (" == 3\n", True)], [("assert add(", True), ("1, 2)\n", False)]]
    )
    share = DiffTester(tokenizer).weight(guess)
    for row in range(2):
        c = [float(p) for p in guess.scores[row].double().softmax(-1).amax(-1)[guess.masked[row]]]
        total = sum(np.exp(x / 0.2) for x in c)
        assert share[row][guess.masked[row]].tolist() == pytest.approx([np.exp(x / 0.2) / total for x in c])
        assert share[row][~guess.masked[row]].abs().sum() == 0
    assert DiffTester(tokenizer, share=None).weight(guess).equal(guess.sharpened)


@pytest.mark.parametrize(("lines", "passes"), [(6, False), (4, True)])
def test_shares_let_nothing_pass_while_fifty_places_are_as_confident(tokenizer, lines, passes):
    rows = lines_of("assert add(1, 2) == 3\n" * lines)
    guess, canvas = situation(tokenizer, rows)
    assert (guess.masked.sum() >= 50) != passes
    assert bool(DiffTester(tokenizer, Schedule()).choose(guess, canvas).any()) == passes


def test_the_parser_of_python_does_without_tree_sitter(monkeypatch, tokenizer):
    monkeypatch.setattr(syntax, "find_spec", lambda name: None)
    syntax.parser_for.cache_clear()
    try:
        rows = lines_of("assert add(1, 2) == 3\n", "assert add(4, 4) == 8\n")
        assert rough(committed(tokenizer, rows)) == ["assertadd(,)=="] * 2
        with pytest.raises(BadRequest, match=r"java is parsed by tree_sitter and tree_sitter_java.*pertoken\[code\]"):
            committed(tokenizer, rows, language="java")
        with pytest.raises(BadRequest, match=r"tree_sitter_python.*parser='ast'"):
            committed(tokenizer, rows, parser="tree_sitter")
    finally:
        syntax.parser_for.cache_clear()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tokenizer": None}, "no tokenizer"),
        ({"tokenizer": "gpt2"}, "tokenizer=str cannot spell"),
        ({"groups": (0, 1)}, "groups has 2 numbers for 1 rows"),
        ({"language": "rust"}, "language='rust'"),
        ({"parser": "lark"}, "parser='lark'"),
        ({"parser": "ast", "language": "cpp"}, "reads Python, not cpp"),
        ({"every": 0}, "every=0"),
        ({"share": 0.0}, "share=0.0"),
        ({"templates": "some"}, "templates='some'"),
    ],
)
def test_bad_requests_say_what_is_wrong(model, letters, options, says):
    with pytest.raises(BadRequest, match=says):
        fill(model, prompts(5), Denoise(DiffTester(**{"tokenizer": letters, **options}), block=8))


def test_half_precision_works(letters):
    small = bidirectional("llama").bfloat16()
    inputs = {name: value.expand(2, -1) for name, value in prompts(6).items()}
    decoder = Denoise(DiffTester(letters, threshold=0.0, parser=flat), block=None)
    torch.manual_seed(1)
    assert fill(small, inputs, decoder, length=16, do_sample=True).shape == (2, 16)
    assert decoder.stats.steps < 16
