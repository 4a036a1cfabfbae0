"""What the claims of Think-at-Hard are made of: which answer a token belongs to."""

from __future__ import annotations

import pytest
import torch

from pertoken.bench.think_runs import InAnswers, Side, Text
from pertoken.depth.deciders import ByChance
from pertoken.depth.passes import PassView


def test_answers_are_numbered_and_right_as_a_whole():
    truth = torch.tensor([[-1, 4, 5, -1, 6], [7, 8, -1, -1, 9]])
    text = Text(torch.zeros_like(truth), truth, torch.zeros_like(truth).bool())
    assert text.answers.tolist() == [0, 0, 1, 2, 2, 3]
    logits = torch.nn.functional.one_hot(torch.tensor([4, 0, 6, 7, 8, 0]), 10).float()
    side = Side(logits, truth[truth >= 0], torch.tensor([1, 0, 0, 1, 0, 0]).bool(), 1.2)
    told = side.told(text)
    assert told["right"] == pytest.approx(4 / 6) and told["whole answers"] == 0.5
    assert told["answer tokens run again"] == pytest.approx(1 / 3)


def test_prompts_are_left_alone():
    truth, valid = torch.tensor([[-1, 4, 5, -1, 6]]), torch.ones(1, 5, dtype=torch.bool)
    view = PassView(valid, 2, positions=torch.arange(5)[None], passes=valid.long(), asked=valid)
    assert InAnswers(ByChance(1.0), truth).chances(view).tolist() == [0, 1, 1, 0, 1]
