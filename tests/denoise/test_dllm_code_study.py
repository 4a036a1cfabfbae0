"""The study: its grid is runnable, its counts are what was computed, and its record can be read again."""

from __future__ import annotations

from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pertoken.core.cost import count_flops
from pertoken.core.errors import BadRequest
from pertoken.denoise.dllm_code_study import REMASKING, RULES, operations, study, sweeps
from pertoken.denoise.loop import Denoise
from pertoken.denoise.study import Outcome, Setting, Study
from tests.contract.conftest import FAMILIES
from tests.denoise.conftest import END, MASK, bidirectional, prompts

BASE = Setting(canvas=16, block=8, steps=8)


@pytest.fixture(scope="module")
def pair():
    """A diffusion model, a twin, and a tokenizer of as many words as they have tokens."""
    words = {f"w{i}": i for i in range(MASK + 1)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w2"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w1", pad_token="w0")
    torch.manual_seed(0)
    model, twin = bidirectional("llama"), FAMILIES["llama"](3).eval()
    for one in (model, twin):
        one.generation_config.eos_token_id, one.generation_config.pad_token_id = END, 0
    return model, twin, tokenizer


PROMPTS = ["w5 w6 w7", "w8 w9", "w3 w4 w5 w6 w7 w8"]


def judge(where, answers):
    return [
        {"passed": float((i + len(text)) % 2), "short": float(len(text) < 40)}
        for i, text in zip(where, answers, strict=True)
    ]


def run(pair, grid, **options):
    return study(*pair, PROMPTS, judge, grid=grid, **options)


def test_the_grid_has_every_knob_and_every_setting_can_be_run():
    grid = sweeps(Setting(128, 32, 32), 450)
    assert [s.canvas for s in grid["canvas"] if not s.autoregressive] == [64, 128, 256, 448]
    assert {s.canvas / s.steps for s in grid["canvas"] if s.steps} == {4.0}
    assert [s.steps for s in grid["steps"] if s.steps] == [8, 16, 32, 64, 128]
    assert [s.block for s in grid["block"] if not s.autoregressive] == [8, 16, 32, 64, 128]
    assert sorted({s.temperature for s in grid["temperature"]}) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert {s.rule for s in grid["remasking"]} - {""} == set(REMASKING)
    for found in grid.values():
        assert len(set(found)) == len(found) and any(s.autoregressive for s in found)
        for setting in found:
            if not setting.autoregressive:
                block = setting.block or setting.canvas
                assert (
                    setting.canvas % block == 0 and (setting.steps or setting.canvas) % (setting.canvas // block) == 0
                )


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_of_the_grid_runs_and_commits_as_the_steps_say(pair, rule):
    setting = replace(BASE, rule=rule, block=None, steps=16)
    found = run(pair, {"one": [setting]}, samples=2)
    outcome = found.of(setting)
    assert outcome.samples == (2 if rule in ("random", "origin") else 1)
    if rule not in ("origin", "threshold"):
        assert outcome.row_steps == 16 * outcome.answers


def test_counts_are_those_of_the_forwards(pair):
    found = run(pair, {"a": [BASE, replace(BASE, steps=16), BASE.twin]}, batch=2)
    given = [3, 2, 6]
    for setting in (BASE, replace(BASE, steps=16)):
        outcome = found.of(setting)
        assert outcome.row_steps == 3 * setting.steps
        assert outcome.token_forwards == sum(setting.steps * (g + 16) for g in given)
        row = outcome.row()
        assert row["nfe"] == setting.steps and row["tokens_per_nfe"] == pytest.approx(row["length"] / row["nfe"])
        assert row["end_share"] == pytest.approx(1 - row["length"] / 16)
    twin = found.of(BASE.twin)
    new = [min(length[0] + 1, 16) for length in twin.lengths]
    assert twin.row_steps == sum(new)
    assert twin.token_forwards == sum(g + n - 1 for g, n in zip(given, new, strict=True))
    assert twin.seconds > 0


def test_a_cache_costs_fewer_token_forwards(pair):
    plain, cached = replace(BASE, steps=16), replace(BASE, steps=16, refresh="dual_cache")
    found = run(pair, {"a": [plain, cached]})
    assert found.of(cached).token_forwards < found.of(plain).token_forwards / 1.5
    assert found.of(cached).flops < found.of(plain).flops and found.of(cached).row_steps == found.of(plain).row_steps


def test_the_twins_answers_are_plain_generations(pair):
    _, twin, tokenizer = pair
    outcome = run(pair, {"a": [BASE.twin]}).of(BASE.twin)
    for prompt, texts, lengths in zip(PROMPTS, outcome.texts, outcome.lengths, strict=True):
        inputs = tokenizer(prompt, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        ids = twin.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
        ids = ids[: ids.index(END)] if END in ids else ids
        assert lengths == [len(ids)] and texts == [tokenizer.decode(ids, skip_special_tokens=True)]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_operations_are_those_that_torch_counts(models, family):
    model, inputs = models[family], prompts(9, 9)
    decoder = Denoise(block=8, steps=4)
    options = {"max_new_tokens": 16, "do_sample": False, "custom_generate": decoder}
    model.generate(**inputs, **options)  # the first call also tries out the model's fused form
    counted = count_flops(lambda: model.generate(**inputs, **options))
    stats = decoder.stats
    estimated = operations(model, stats.token_forwards, stats.attended, stats.row_steps * 8)
    assert estimated == pytest.approx(counted, rel=0.01)


def test_sampling_takes_samples_with_seeds_and_greedy_one(pair):
    warm, cold = replace(BASE, temperature=1.0), replace(BASE, temperature=0.0)
    grid = {"temperature": [cold, warm, cold.twin, warm.twin]}
    found, again, other = (run(pair, grid, samples=3, seed=s) for s in (0, 0, 7))
    assert {s: found.of(s).samples for s in grid["temperature"]} == {cold: 1, warm: 3, cold.twin: 1, warm.twin: 3}
    for setting in (warm, warm.twin):
        assert found.of(setting).texts == again.of(setting).texts != other.of(setting).texts
        assert found.of(setting).distinct > 1 / 3
    assert found.of(cold).distinct == 1


def test_what_is_known_is_not_run_again(pair):
    first = run(pair, {"a": [BASE]})
    more = run(pair, {"b": [BASE, BASE.twin]}, known=first)
    assert more.of(BASE) is first.of(BASE) and BASE.twin in more.outcomes
    with pytest.raises(BadRequest, match="was not run"):
        first.of(BASE.twin)


def test_an_outcomes_figures():
    outcome = Outcome(
        BASE,
        {"passed": [[1, 0, 0], [0, 0, 0]], "parses": [[1, 1, 1], [1, 1, 0]]},
        [[2, 4, 6], [8, 8, 8]],
        [["a", "a", "b"], ["c", "c", "c"]],
        row_steps=48,
        token_forwards=600,
        flops=6e6,
        seconds=3.0,
    )
    row = outcome.row()
    assert (row["passed"], row["parses"]) == pytest.approx((1 / 6, 5 / 6))
    assert (outcome.pass_at(1), row["passed@k"]) == pytest.approx((1 / 6, 0.5))
    assert (row["distinct"], row["length"], row["nfe"]) == pytest.approx((0.5, 6, 8))
    assert (row["tokens_per_nfe"], row["token_forwards"], row["flops"], row["seconds"]) == (0.75, 100, 1e6, 0.5)
    assert row["end_share"] == 1 - 6 / 16 and 0 <= row["passed_low"] <= 1 / 6 <= row["passed_high"] <= 1 / 3


def test_a_study_is_saved_loaded_and_drawn(pair, tmp_path):
    grid = sweeps(BASE, 24, canvases=(8, 16), temperatures=(0.0, 1.0), shares=(0.25, 1.0), rule_shares=(0.25, 0.5))
    found = run(pair, grid, samples=2, about="three prompts")
    again = Study.load(found.save(tmp_path / "study.json"))
    assert again == found
    for name in grid:
        assert again.rows(name) == found.rows(name)
    files = found.plot(tmp_path / "images")
    assert {f.stem.removeprefix("dllm_code_study_") for f in files} == {*grid, "flops", "seconds"}
    for file in files:
        root = ElementTree.parse(file).getroot()
        assert len(list(root.iter("{http://www.w3.org/2000/svg}circle"))) >= 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"prompts": []}, "no prompts"),
        ({"samples": 0}, "samples=0"),
        ({"grid": {"a": [replace(BASE, rule="best")]}}, "rule 'best' is unknown; choose one of low_confidence"),
        ({"grid": {"a": [replace(BASE, refresh="none")]}}, "refresh 'none' is unknown; choose one of recompute"),
        ({"judge": lambda where, answers: [{"fine": 1.0} for _ in where]}, 'with "passed"'),
        ({"judge": lambda where, answers: []}, "must give 3 mappings"),
        ({"grid": {"a": [replace(BASE, canvas=4096, steps=512)]}}, "positions"),
    ],
)
def test_bad_requests_say_what_is_wrong(pair, options, says):
    given = {"grid": {"a": [BASE]}, "prompts": PROMPTS, "judge": judge} | options
    with pytest.raises(BadRequest, match=says):
        study(*pair, given.pop("prompts"), given.pop("judge"), **given)
