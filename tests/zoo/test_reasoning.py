"""Reasoning problems: answers that can be checked, splits that do not meet, rows that mark answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pertoken.core.errors import BadRequest
from pertoken.zoo import corpus, reasoning
from pertoken.zoo.reasoning import KINDS, problems, right, rows, solve, split_of


@pytest.fixture(scope="module")
def tokenizer():
    return corpus.train_tokenizer([], corpus.BYTES)


def test_answers_follow_from_the_prompt():
    known = {
        "48+937=": "985\n",
        "812-455=": "357\n",
        "47*86=": "4042\n",
        "sort 5 31 9=": "5 9 31\n",
        "reverse 5 31 9=": "9 31 5\n",
        "unique 7 7 1 7=": "7 1\n",
        "evens 4 7 10=": "4 10\n",
        "evens 3 7=": "0\n",
        "max 5 31 9=": "31\n",
        "min 5 31 9=": "5\n",
        "second 5 31 9=": "9\n",
        "sum 5 31 9=": "45\n",
    }
    for prompt, answer in known.items():
        assert solve(prompt) == answer and right(prompt, answer + "more")
        assert not right(prompt, "1" + answer) and not right(prompt, answer[:-1])
    assert {kind for kind in KINDS if any(kind in prompt for prompt in known)} == set(KINDS)
    for text in ("2+2", "2+=", "sort a b=", "turn 1 2=", "1+2=3", ""):
        with pytest.raises(BadRequest, match="is no problem"):
            solve(text)


def test_problems_are_fixed_by_the_seed_and_splits_do_not_meet():
    train, heldout = problems(3000, 1), problems(600, 1, "heldout")
    assert train == problems(3000, 1) and train != problems(3000, 2)
    assert {one.kind for one in train} == {one.kind for one in heldout} == set(KINDS)
    assert not {one.prompt for one in train} & {one.prompt for one in heldout}
    assert all(split_of(one.prompt) == "heldout" for one in heldout)
    assert all(one.answer == solve(one.prompt) for one in train + heldout)
    assert {one.kind for one in problems(50, 1, kinds=("*", "sum"))} == {"*", "sum"}
    for bad in ({"split": "test"}, {"kinds": ("/",)}, {"kinds": ()}):
        with pytest.raises(BadRequest, match="are not all known"):
            problems(1, **bad)


def test_rows_mark_the_answers(tokenizer):
    made = rows(20, 96, tokenizer, 3)
    assert made.shape == (20, 2, 96) and np.array_equal(made, rows(20, 96, tokenizer, 3))
    for ids, answer in made:
        text = tokenizer.decode(ids.tolist())
        lines = text.splitlines(keepends=True)
        assert lines and all(right(*line.replace("=", "=|").split("|")) for line in lines)
        marked = "".join(tokenizer.decode([one]) for one, mark in zip(ids.tolist(), answer, strict=True) if mark)
        assert marked == "".join(line.split("=")[1] for line in lines)
    with pytest.raises(BadRequest, match="give at least 64"):
        rows(1, 32, tokenizer, 0)


def test_batches_go_on_where_they_are_asked_to(tokenizer, monkeypatch):
    monkeypatch.setattr(reasoning, "EPOCH", 3)
    whole = [part for part, _ in zip(reasoning.batches(2, 64, tokenizer, 5), range(8), strict=False)]
    later = [part for part, _ in zip(reasoning.batches(2, 64, tokenizer, 5, first=4), range(4), strict=False)]
    assert all(torch.equal(one, two) for one, two in zip(whole[4:], later, strict=True))
    assert whole[0].shape == (2, 2, 64) and not torch.equal(whole[0], whole[3])
