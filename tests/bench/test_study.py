"""The study's bench: settings that can be run, losses on long texts by the letter, and charts made from results."""

from __future__ import annotations

import json
from itertools import pairwise
from xml.etree import ElementTree

import pytest
import torch

from pertoken.bench import results, study_images
from pertoken.bench.claims import Bench, claims_of
from pertoken.bench.diffusion import Loaded
from pertoken.bench.study_runs import BASE, LONGEST, NAME, TAIL, grid, rows, window_losses
from pertoken.denoise.study import Outcome, Study
from pertoken.methods import load_methods
from tests.contract.conftest import FAMILIES
from tests.denoise.conftest import MASK, bidirectional


@pytest.mark.parametrize("task", BASE)
@pytest.mark.parametrize("quick", [False, True])
def test_every_setting_of_the_grid_can_be_run(task, quick):
    for name, found in grid(Bench(quick), task).items():
        assert found and len(set(found)) == len(found), name
        for setting in found:
            blocks, rest = divmod(setting.canvas, setting.block or setting.canvas)
            assert rest == 0 and setting.canvas <= LONGEST
            assert setting.autoregressive or (setting.steps or setting.canvas) % blocks == 0


def test_the_study_makes_claims_of_each_of_its_questions():
    load_methods()
    found = claims_of(NAME)
    assert len(found) >= 15 and sum(c.shown for c in found) <= 3
    words = " ".join(c.claim for c in found)
    for subject in ("random commits", "canvas", "temperature", "twin", "context", "steps", "operations", "time"):
        assert subject in words


def naive_loss(model, ids, hidden, causal):
    """One window, one hidden token at a time, each probability from a softmax over the vocabulary."""
    tail, losses = len(ids) - TAIL, []
    given = ids.clone()
    if not causal:
        given[tail:][hidden] = MASK
    full = torch.zeros(1, 1, len(ids), len(ids)) if not causal else None
    with torch.no_grad():
        logits = model(given[None], attention_mask=full).logits[0]
    for place in range(TAIL):
        if causal or hidden[place]:
            p = logits[tail + place - 1].double().softmax(-1)
            losses.append(-float(p[ids[tail + place]].log()))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("causal", [True, False])
def test_losses_of_windows_by_the_letter(causal):
    torch.manual_seed(0)
    model = FAMILIES["llama"](2).eval() if causal else bidirectional("llama", 2)
    ids, hidden = torch.randint(2, MASK, (5, 150)), torch.rand(5, TAIL) < 0.5
    found = window_losses(Loaded(model, None), ids, hidden, batch=2)
    for row in range(5):
        assert float(found[row]) == pytest.approx(naive_loss(model, ids[row], hidden[row], causal), rel=1e-4)


@pytest.fixture(scope="module")
def document():
    """Results with the rows of a study whose answers get better with every step."""
    task, found = next(iter(BASE)), grid(Bench(True), next(iter(BASE)))
    outcomes = {}
    for setting in dict.fromkeys(s for some in found.values() for s in some):
        many = 3 if setting.random else 1
        good = [[float(prompt < 1 + 3 * setting.share)] * many for prompt in range(6)]
        steps = setting.steps or setting.canvas
        cost = 6 * many * steps
        outcomes[setting] = Outcome(
            setting,
            {"passed": good, "parses": good},
            [[9] * many] * 6,
            [["x"] * many] * 6,
            cost,
            cost,
            1e6 * cost,
            cost,
        )
    study = Study(found, outcomes)
    sweeps = rows(study, "steps", "block", "canvas", "temperature", "remasking", "fast")
    claims = [{"claim": name, "n": 6, "detail": {"charts": {task: {name: some}}}} for name, some in sweeps.items()]
    return {"method": NAME, "claims": [*claims, {"claim": "without a chart", "n": 1}]}


def test_charts_are_drawn_from_results_alone(document, tmp_path, capsys):
    (tmp_path / "results").mkdir()
    results.path_of(NAME, tmp_path / "results").write_text(json.dumps(document))
    study_images.main(["--results", str(tmp_path / "results"), "--out", str(tmp_path / "images")])
    files = sorted((tmp_path / "images").iterdir())
    assert len(files) == 5 + 2 == len(capsys.readouterr().out.split())
    for file in files:
        assert ElementTree.parse(file).getroot().get("viewBox")
    steps = ElementTree.parse(tmp_path / "images" / f"{NAME}_function_bodies_steps.svg").getroot()
    study_images.main(
        ["--results", str(tmp_path / "results"), "--out", str(tmp_path / "passed"), "--measure", "passed"]
    )
    assert "answers that pass" in (tmp_path / "passed" / f"{NAME}_function_bodies_steps.svg").read_text()
    heights = [float(c.get("cy", "0")) for c in steps.iter("{http://www.w3.org/2000/svg}circle")]
    assert len(heights) == 5 and all(a >= b for a, b in pairwise(heights)) and heights[0] > heights[-1]


def test_without_results_it_says_what_to_run(tmp_path, capsys):
    with pytest.raises(SystemExit):
        study_images.main(["--results", str(tmp_path)])
    assert f"pertoken bench {NAME}" in capsys.readouterr().err
