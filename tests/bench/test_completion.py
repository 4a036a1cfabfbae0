"""The bench of completions: its tasks, what controls are given, and a run of two sides on a problem or two."""

from __future__ import annotations

import pytest
import torch

from pertoken.bench import completion
from pertoken.bench.claims import Bench, claims_of
from pertoken.bench.code_tasks import Problem
from pertoken.bench.completion import MEASURES, METHODS, NEW, SIDES, completed, measured, problems, row
from pertoken.bench.spending import layers_run
from pertoken.core.decision import Depth, Exit, Select
from pertoken.core.trace import Trace


def test_every_method_has_a_control_and_every_claim_its_sides():
    assert {part for name in METHODS for part in (SIDES[name].control, SIDES[name].dense)} <= set(SIDES)
    assert len(claims_of("code")) == 2 * len(METHODS) + 2


def test_originals_get_full_marks_and_wrong_answers_do_not():
    line = [Problem("x = so", "rted(items)")]
    assert measured("lines", line, ["rted(items)\nmore"]) == {"exact": [1.0], "edit similarity": [1.0]}
    assert measured("lines", line, ["me(items)"])["exact"] == [0.0]
    function = [Problem("def f(x):\n", "    return x\n")]
    assert measured("functions", function, ["    return x\nimport os"]) == {"ROUGE-L": [1.0], "parses": [1.0]}
    assert measured("functions", function, ["    return (\n"])["parses"] == [0.0]
    bench = Bench(quick=True)
    made = problems(bench, "made")[:2]
    assert measured("made", made, [one.original for one in made]) == {"passes": [1.0, 1.0]}
    assert measured("made", made, ["    return None\n", ""]) == {"passes": [0.0, 0.0]}


def test_layers_that_tokens_layers_run_are_those_of_their_last_decision():
    trace, one = Trace(), torch.ones(2, 1, dtype=torch.bool)
    trace.record("depth.exits.1", Exit(torch.ones(2, 3, dtype=torch.bool), torch.tensor([[1, 1, 1], [1, 1, 1]])))
    for first, last in (([[1], [4]], [[1], [2]]), ([[4], [4]], [[4], [-2]])):
        trace.record("depth.exits.1", Exit(one, torch.tensor(first)))
        trace.record("depth.exits.2", Exit(one, torch.tensor(last)))
    trace.record("depth.exits.1", Exit(torch.tensor([[True], [False]]), torch.tensor([[4], [1]])))
    assert layers_run(trace) == {1: 1, 2: 2, 4: 2}
    other = Trace()
    runs = torch.tensor([[[1, 0, 0, 1]], [[1, 1, 1, 1]]], dtype=torch.bool)
    other.record("depth.layers", Depth(one, runs))
    other.record("depth.layers", Depth(one.expand(-1, 2), runs.expand(-1, 2, -1)))
    assert layers_run(other) == {2: 1, 4: 1}
    reading = Trace()
    reading.record("attend.keys.0", Select(one, torch.zeros(2, 1, 1, 1, dtype=torch.long), torch.ones(2).long()))
    assert not layers_run(reading)


@pytest.mark.slow
def test_a_side_is_measured_and_its_control_spends_as_much(monkeypatch):
    monkeypatch.setattr(completion, "COUNTS", dict.fromkeys(NEW, (2, 2)))
    monkeypatch.setattr(completion, "NEW", dict.fromkeys(NEW, 8))
    bench = Bench(quick=True)
    found = row(bench, "stop_exit")
    assert set(MEASURES) < set(found) and 0 < found["operations"] < 1 and found["passes"] is None
    assert all(0 <= found[name] <= 1 for name, task in MEASURES.items() if task != "made")
    assert row(bench, "full")["same as full"] == 1 and row(bench, "full")["passes"] is not None
    mine, control = (completed(bench, name, "lines") for name in ("stop_exit", "random_exit"))
    assert mine.ran.total() == control.ran.total() == 2 * 7
    assert control.flops == pytest.approx(mine.flops, rel=0.2)
