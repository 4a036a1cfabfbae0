"""Rows of recall against what they say of themselves, evaluation of right and wrong models, a run that goes on."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from pertoken.core.errors import BadRequest
from pertoken.zoo import corpus, model_path
from pertoken.zoo.recall import TASKS, Recall, accuracies, answered, forced, stepwise
from pertoken.zoo.recalling import JUMPS, look_back, skipping
from pertoken.zoo.recipe import RECIPES, Recipe, Shape
from pertoken.zoo.train import Run

torch.set_num_threads(1)
QUIET = Console(quiet=True)
TOKENIZER = Tokenizer.from_file(str(model_path("code-target") / "tokenizer.json"))
LINES = [f"def f{i}(a, b):\n    return a * {i} + b[{i % 7}]\n\n" for i in range(400)]
TINY = Recipe(
    Shape(layers=4, width=16, heads=2, kv_heads=1, ffn=24, positions=512),
    objective="recall",
    steps=6,
    batch=2,
    length=128,
    lengths=((32, 0.4), (64, 0.7)),
    warmup=2,
    evaluate_every=100,
    save_every=100,
)


@pytest.fixture(scope="module")
def made():
    return Recall(TOKENIZER, corpus.token_stream(TOKENIZER, LINES))


@pytest.fixture
def small_corpus(monkeypatch):
    texts = {"train": {"t.py": "".join(LINES)}, "heldout": {"h.py": "".join(LINES[::-1])}}
    monkeypatch.setattr(corpus, "split_texts", lambda split, root=None: texts[split])


def answers(rows, row):
    """Positions of each question's answer."""
    found = {}
    for position, question in enumerate(rows.question[row].tolist()):
        if question >= 0:
            found.setdefault(question, []).append(position)
    return found


def lead(rows, row, positions):
    """The question before an answer: from the beginning of its line or pair on."""
    start = max(i for i in range(positions[0]) if rows.begins[row, i])
    return rows.ids[row, start : positions[0]].tolist()


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [256, 257, 1000, 2048])
def test_rows_ask_for_what_the_context_tells_once(made, task, length):
    rows = made.rows(task, length, 3, seed=5, questions=5)
    assert rows.ids.shape == rows.question.shape == rows.begins.shape == (3, length)
    assert bool((rows.ids[:, 0] == made.end).all())
    for row in range(3):
        ids, asked = rows.ids[row].tolist(), answers(rows, row)
        assert sorted(asked) == list(range(5)) and ids[-1] == ids[asked[4][-1]], "the row ends with the last answer"
        context = length - 5 * made.size(task)
        for question, positions in asked.items():
            before = lead(rows, row, positions)
            places = [i for i in range(1, context) if ids[i : i + len(before)] == before]
            assert len(places) == 1, "a key is told once"
            assert [ids[i] for i in positions] == ids[places[0] + len(before) :][: len(positions)]
            assert bool(rows.begins[row, places[0]])
            where = (places[0] - 1) / (context - 1 - made.size(task))
            assert float(rows.depth[row, question]) == pytest.approx(where)


def test_rows_are_fixed_by_their_seed(made):
    for task in TASKS:
        one, same, other = (made.rows(task, 300, 2, seed=seed) for seed in (3, 3, 4))
        assert torch.equal(one.ids, same.ids) and torch.equal(one.question, same.question)
        assert not torch.equal(one.ids, other.ids) and not torch.equal(one.ids[0], one.ids[1])


def test_rows_read_as_text(made):
    text = TOKENIZER.decode(made.rows("needles", 400, 1, questions=2).ids[0].tolist())
    assert text.count("MAGIC_") == 4 + 2 and "return a *" in text
    lines = TOKENIZER.decode(made.rows("lines", 256, 1).ids[0].tolist()).strip().split("\n")
    assert sum(line.count(": ") == 1 for line in lines) >= 46 + 4
    for task in ("needles", "lines"):
        ids = made.rows(task, 256, 1).ids[0, 1:].tolist()
        assert TOKENIZER.encode(TOKENIZER.decode(ids)).ids[-40:] == ids[-40:], "questions are tokens of their own text"


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("depth", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_what_is_asked_for_lies_as_deep_as_wanted(made, task, depth):
    rows = made.rows(task, 1024, 4, questions=1, depth=depth)
    assert rows.depth.shape == (4, 1)
    assert (rows.depth - depth).abs().max() < 0.05
    assert made.rows(task, 1024, 8, questions=1).depth.std() > 0.1, "without a wish they lie anywhere"


def test_pairs_and_questions_are_as_many_as_wanted(made):
    rows = made.rows("pairs", 512, 2, pairs=7, questions=7)
    keys = [rows.ids[0, positions[0] - 1].item() for positions in answers(rows, 0).values()]
    assert len(set(keys)) == 7 and rows.answer.sum() == 14
    assert made.most("pairs", 32_768, 4) == (4096 - 1) // 2 and made.most("needles", 256, 4) == 24
    for task in TASKS:
        assert made.rows(task, 32_768, 1).ids.shape == (1, 32_768)


@pytest.mark.parametrize(
    "form, said",
    [
        ({"task": "poem"}, "lines, pairs, needles"),
        ({"depth": 1.5}, "depth=1.5"),
        ({"questions": 0}, "at least one question"),
        ({"pairs": 2}, "2 pairs and 4 questions"),
        ({"length": 40}, "do not fit into 40 tokens"),
    ],
)
def test_what_cannot_be_made_is_refused(made, form, said):
    with pytest.raises(BadRequest, match=said):
        made.rows(**({"task": "needles", "length": 256, "count": 1} | form))


# ------------------------------------------------------------------------------------------------- evaluation


def oracle(ids, positions):
    return ids[:, positions + 1]


def test_an_oracle_is_right_and_another_is_wrong_where_it_errs(made):
    for task in TASKS:
        rows = made.rows(task, 300, 4, questions=3)
        assert bool(answered(oracle, rows).all())
        assert not answered(lambda ids, positions: oracle(ids, positions) + 1, rows).any()
        last = max(answers(rows, 1)[2])

        def errs(ids, positions, last=last):
            found = oracle(ids, positions).clone()
            found[1, positions == last - 1] += 1
            return found

        right = answered(errs, rows)
        assert not right[1, 2] and right.sum() == 11, "one wrong token spoils its answer, and no other"


class Copier(torch.nn.Module):
    """A model that does what is asked: it finds the last `window` tokens before and says what came then."""

    def __init__(self, window):
        super().__init__()
        self.window, self.calls = window, []

    def forward(self, input_ids, past_key_values=None, use_cache=True, logits_to_keep=0):
        before = past_key_values if past_key_values is not None else input_ids[:, :0]
        self.calls.append(input_ids.shape[1])
        ids = torch.cat([before, input_ids], 1)
        logits = torch.zeros(*ids.shape, 4096)
        for row, tokens in enumerate(ids.tolist()):
            seen = {}
            for i in range(self.window, len(tokens) + 1):
                now = tuple(tokens[i - self.window : i])
                logits[row, i - 1, seen.get(now, 0)] = 1
                seen[now] = tokens[i] if i < len(tokens) else 0
        logits = logits[:, before.shape[1] :]
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        return SimpleNamespace(logits=logits if isinstance(keep, int) else logits[:, keep], past_key_values=ids)


@pytest.mark.parametrize("read", [forced, stepwise])
@pytest.mark.parametrize("task, window, wrong", [("lines", 3, 1), ("pairs", 1, None), ("needles", 6, 1)])
def test_a_model_that_can_copy_is_right_to_the_last_question(made, read, task, window, wrong):
    rows = made.rows(task, 256, 3, pairs=8, questions=3)
    model = Copier(window)
    assert bool(answered(read(model, batch=2), rows).all())
    if wrong is not None:
        assert not answered(read(Copier(wrong)), rows).all(), "one that looks back too little is not"
    if read is stepwise:
        tail = int(rows.answer[0].byte().argmax())
        assert model.calls[0] == tail and set(model.calls[1 : 256 - tail]) == {1}


def test_both_ways_of_reading_agree_on_a_transformer(made):
    torch.manual_seed(0)
    model = LlamaForCausalLM(TINY.shape.config(0)).eval()
    rows = made.rows("lines", 128, 3)
    positions = rows.answer[:, 1:].any(0).nonzero().flatten()
    with torch.inference_mode():
        one, other = (read(model, 2)(rows.ids, positions) for read in (forced, stepwise))
        whole = model(input_ids=rows.ids).logits.argmax(-1)[:, positions]
    assert one.shape == (3, 8) and torch.equal(one, whole) and torch.equal(other, whole)


def test_accuracies_are_told_by_task_and_length(made):
    found = accuracies(oracle, made, lengths=(256, 512), rows=2, questions=2)
    assert [(f["task"], f["length"]) for f in found] == [(t, n) for t in TASKS for n in (256, 512)]
    assert all(f["accuracy"] == 1.0 and f["n"] == 4 for f in found)
    deep = accuracies(oracle, made, ["needles"], [512], rows=2, questions=1, depth=0.25)
    assert deep[0]["n"] == 2


# --------------------------------------------------------------------------------------------------- training


def test_heads_of_the_first_layer_begin_by_looking_back():
    torch.manual_seed(0)
    model = LlamaForCausalLM(RECIPES["recall"].shape.config(0))
    look_back(model)
    model.config._attn_implementation = "eager"
    with torch.no_grad():
        weights = model(torch.randint(1, 4000, (2, 40)), output_attentions=True).attentions[0]
    for head in range(model.config.num_attention_heads):
        read = weights[:, head, 8:].argmax(-1)
        back = torch.arange(8, 40) - read
        assert (back - head - 1).float().mean().abs() < 0.2, f"head {head} looks {back.float().mean()} tokens back"


def test_positions_skip_where_lines_begin_and_nowhere_else():
    rng = np.random.default_rng(0)
    begins = np.arange(96) % 6 == 0
    rows = np.stack([skipping(begins, 4096, rng) for _ in range(200)])
    steps = np.diff(rows, axis=1)
    assert rows.min() >= 0 and rows.max() < 4096 and steps.min() == 1
    assert not (steps[:, ~begins[1:]] > 1).any()
    jumps = (steps > 1).sum(1)
    assert jumps.max() <= JUMPS and 0 < (jumps == 0).sum() < 120
    span = rows[:, -1] - rows[:, 0]
    assert span.max() > 2048 and (span == 95).any()


def start(directory, recipe=TINY):
    (directory / "tokenizer").mkdir(parents=True, exist_ok=True)
    shutil.copy(model_path("code-target") / "tokenizer.json", directory / "tokenizer")
    return Run("tiny", directory / "tiny", recipe, compile_model=False)


def test_rows_grow_with_the_steps_and_a_batch_does_not(small_corpus, tmp_path):
    run = start(tmp_path)
    lengths = []
    for step, batch in zip(range(6), run.batches(), strict=False):
        assert batch.size == 3 * TINY.batch * TINY.length and len(batch) == TINY.batch
        lengths.append(batch.shape[-1])
        _, positions, answer = np.moveaxis(batch.reshape(-1, 3, batch.shape[-1]), 1, 0)
        assert positions.max() < TINY.shape.positions and answer.any(1).all() and (answer <= 1).all()
        loss, plain = run.objective.loss(batch, step, torch.Generator())
        assert 8 < plain < 12 and torch.isfinite(loss)
    assert lengths == [32, 32, 32, 64, 64, 128]


def test_the_loss_is_that_of_the_answers_alone(small_corpus, tmp_path):
    run = start(tmp_path)
    batch = next(run.batches())
    ids, positions, answer = torch.from_numpy(batch.astype(np.int64)).flatten(0, 1).unbind(1)
    objective: Any = run.objective
    total = weights = 0.0
    with torch.no_grad():
        loss, _ = run.objective.loss(batch, 0, torch.Generator())
        for row, place, wanted in zip(ids, positions, answer, strict=True):
            hidden = objective.forward(row[None, :-1], place[None, :-1])
            logs = run.model.lm_head(hidden)[0].log_softmax(-1)
            found = wanted.nonzero().flatten().tolist()
            weights += len(found) ** 0.5
            total -= sum(float(logs[i - 1, row[i]]) for i in found) / len(found) ** 0.5
    assert float(loss) == pytest.approx(total / weights, rel=1e-4)


def test_an_interrupted_run_goes_on_bit_for_bit(small_corpus, tmp_path):
    whole = start(tmp_path / "whole")
    whole.train(QUIET)
    run = start(tmp_path / "parts")
    run.train(QUIET, until=3)
    again = start(tmp_path / "parts")
    assert again.resume() and again.step == 3
    again.train(QUIET)
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, again.model.state_dict()[name]), name
    assert whole.curve[-1].keys() >= {"heldout", "answered_lines", "answered_pairs", "answered_needles"}
    assert not (set(whole.tokenizer.get_vocab()) - set(TOKENIZER.get_vocab())), "no token is added"


def test_a_run_saved_before_a_setting_existed_goes_on(small_corpus, tmp_path):
    run = start(tmp_path, replace(TINY, steps=1))
    run.train(QUIET)
    path = run.directory / "state.safetensors"
    with safe_open(path, "pt") as file:
        about = file.metadata()
    text = json.loads(about["state"])
    del text["recipe"]["layers"], text["recipe"]["shape"]["rope_theta"]
    save_file(load_file(path), path, about | {"state": json.dumps(text)})
    assert start(tmp_path, replace(TINY, steps=1)).resume()


def test_the_recipe_is_small_grouped_and_deep():
    shape = RECIPES["recall"].shape
    parameters = sum(p.numel() for p in LlamaForCausalLM(shape.config(0)).parameters())
    assert shape.layers >= 4 and shape.kv_heads < shape.heads and 2 * parameters < 5e6
