"""Sweeps of a dial on tiny models: what is measured, chosen, written, refused and kept."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree

import pytest
import torch

from pertoken.bench import compare as module
from pertoken.bench import tune as tuning
from pertoken.bench.compare import Options
from pertoken.bench.settings import Config
from pertoken.bench.texts import Example
from pertoken.bench.tune import tune, write
from pertoken.core.budget import Budget
from tests.bench import toys
from tests.test_cli import call

torch.set_num_threads(1)
EXAMPLES = [Example("def f(x):"), Example("x"), Example("for i in")]
HALF, MOST = Budget(fraction=0.5), Budget(fraction=1.0)


@pytest.fixture
def models(monkeypatch):
    """A tiny causal model of 4 layers; one that fills in."""

    def load(name, options):
        model = toys.model(layers=4)
        if name == "filling":
            model.config.is_causal, model.config.mask_token_id = False, 256
        return model, toys.tokenizer()

    monkeypatch.setattr(module, "load_model", load)


def swept(method="skip_layers", model="toy", examples=EXAMPLES, new=6, **given):
    draft = given.pop("draft", None)
    return tune(method, model, draft, examples, Options(new, dtype="fp32", batch=2), **given)


def test_points_lie_where_the_budget_puts_them_beside_a_control_of_equal_cost(models):
    found = swept(values=[MOST, HALF], data="here")
    (full,), mine, random = found.of("full"), found.of("skip_layers"), found.of("random")
    assert (full.compute, full.quality, full.same) == (1.0, 1.0, 1.0)
    assert [(round(p.compute, 6), p.quality) for p in mine[:1]] == [(1.0, 1.0)]
    assert 0.4 < mine[1].compute < 0.8 and mine[1].low <= mine[1].quality <= mine[1].high
    assert [p.compute for p in random] == pytest.approx([p.compute for p in mine], rel=0.01)
    assert [p.settings for p in random] == [{"budget": Budget(layers=n), "prompt": True} for n in (4, 2)]
    json.dumps(found.to_json(), allow_nan=False)
    assert {line.name: line.dashed for line in found.chart().lines}["random"]
    single = swept(values=[HALF]).chart()
    assert not {line.name: line.dashed for line in single.lines}["random"], "a dashed point would be a level"


@pytest.mark.parametrize("keep, chosen", [(1e-6, "skip_layers"), (1.0, "full")])
def test_the_cheapest_setting_that_keeps_the_quality_is_written(models, tmp_path, keep, chosen):
    found = swept(values=[MOST, HALF], keep=keep)
    config, chart = write(found, tmp_path / "made" / "c.json")
    kept = Config.load(config)
    assert (kept.method, kept.model) == (chosen, "toy")
    assert kept.settings == ({"budget": HALF} if chosen != "full" else {})
    assert len(kept.about["curve"]) == 5 and kept.about["keep_quality"] == keep
    assert ElementTree.parse(chart).getroot().tag.endswith("svg")


def test_quality_with_answers_is_relative_to_the_whole_models(models):
    own = swept(values=[HALF])
    from pertoken.bench.compare import set_up
    from pertoken.bench.sides import make_side

    setup = set_up([], "toy", None, [e.prompt for e in EXAMPLES], Options(6, dtype="fp32", batch=2))
    sweep = tuning._Sweep(setup, EXAMPLES, False)
    assert sweep.begin("full").compute == sweep.begin("generate").compute == 1.0
    texts = sweep.run(make_side("generate", "causal", setup.given)).texts
    answered = [Example(e.prompt, text) for e, text in zip(EXAMPLES, texts, strict=True)]
    found = swept(values=[HALF], examples=answered)
    assert found.answers and found.of("full")[0].quality == 1.0
    assert found.of("skip_layers")[0].quality == pytest.approx(own.of("skip_layers")[0].quality, abs=0.2)
    with pytest.raises(ValueError, match="nothing in common with the reference answers"):
        swept(values=[HALF], examples=[Example(e.prompt, "\n\n\n\n\n\n\n") for e in EXAMPLES])


def test_exits_pauses_questions_and_steps_are_matched_by_their_control(models):
    exits = swept("fixed_exit", values=[HALF])
    assert exits.of("fixed_exit")[0].compute < 1 and not exits.of("random")
    skipped = swept("skipdecode", values=[HALF], settings={"reference": 4})
    (mine,), (theirs,) = skipped.of("skipdecode"), skipped.of("random")
    assert theirs.settings == {"budget": Budget(layers=2), "prompt": False}
    assert theirs.compute == pytest.approx(mine.compute, rel=0.1) and 0.6 < mine.compute < 1
    pausing = swept("adadec", values=[0.0])
    (mine,), (theirs,) = pausing.of("adadec"), pausing.of("random")
    assert theirs.settings["rate"] == 1.0 and theirs.compute == pytest.approx(mine.compute, rel=0.05)
    routed = swept("r2r", draft="toy", values=[0.5])
    assert 0 < routed.of("random")[0].settings["rate"] <= 1
    filled = swept("threshold", "filling", new=8, values=[0.0])
    assert filled.of("full")[0].compute == 1.0 and filled.of("threshold")[0].compute < 0.5
    assert filled.of("random")[0].settings["steps"] == 1
    stepped = swept("schedule", "filling", new=8, values=[0.5, 2])
    assert [p.setting for p in stepped.of("schedule")] == ["steps=4", "steps=2"]
    assert filled.whole == "dense"
    attached = swept("skip_layers", "filling", new=8, values=[HALF])
    assert attached.of("skip_layers")[0].compute < 1
    with pytest.raises(ValueError, match="threshold fills in a canvas"):
        swept("threshold", values=[0.5])


def test_a_refused_setting_is_left_out_and_said(models):
    found = swept("skipdecode", values=[Budget(layers=0), HALF])
    assert list(found.left_out) == ["budget=layers=0"] and "cannot be met" in found.left_out["budget=layers=0"]
    assert len(found.of("skipdecode")) == 1
    with pytest.raises(ValueError, match=r"refused every setting; .*cannot be met"):
        swept("skipdecode", values=[Budget(layers=0)])


def test_ctrl_c_keeps_finished_points(models, monkeypatch, tmp_path):
    run, calls = tuning._Sweep.run, []

    def interrupted(self, side):
        calls.append(side.name)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return run(self, side)

    monkeypatch.setattr(tuning._Sweep, "run", interrupted)
    (tmp_path / "p.txt").write_text("x = 1\ndef f(\n")
    out = tmp_path / "c.json"
    command = ["tune", "skip_layers", "--model", "toy", "--data", tmp_path / "p.txt", "--values", "1.0,0.5"]
    found = call(*command, "--max-new-tokens", 4, "--out", out, "--json", "--keep-quality", 0.01)
    assert found.exit_code == 1, found.output
    assert [p["of"] for p in json.loads(found.stdout)["points"]] == ["full", "skip_layers", "random"]
    assert Config.load(out).method == "full" and "1 setting(s) were tried" in found.stderr


def test_tune_and_run_from_the_command_line(models, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "x = 1"}\n{"prompt": "def f("}\n')
    out = tmp_path / "c.json"
    command = ["tune", "skip_layers", "--model", "toy", "--data", tmp_path / "p.jsonl", "--values", "0.5", "--out", out]
    found = call(*command, "--max-new-tokens", 4, "--keep-quality", 0.01)
    assert found.exit_code == 0, found.output
    assert "chosen: skip_layers budget=fraction=0.5" in found.stdout and "  random" in found.stdout
    assert "of the operations" in found.stderr and out.with_suffix(".svg").is_file()
    again = call(*command, "--max-new-tokens", 4, "--keep-quality", 2)
    assert again.exit_code == 0 and "chosen: full; nothing that was tried reaches 2" in again.stdout
    call(*command, "--max-new-tokens", 4, "--keep-quality", 0.01)
    ran = call("run", "--config", out, "--prompt", "x = 1", "--max-new-tokens", 4, "--json")
    assert ran.exit_code == 0, ran.output
    runs = json.loads(ran.stdout)["runs"]
    assert [run["name"] for run in runs] == ["generate", "full", "skip_layers budget=fraction=0.5"]


REFUSED = {
    "a lossless method": (["tune", "dyspec"], "dyspec is lossless"),
    "no dial": (["tune", "dual_cache"], "dual_cache has no dial"),
    "an unknown setting": (["tune", "skip_layers", "--set", "bugdet=1"], "did you mean budget"),
    "an unknown method": (["tune", "skip_layer"], "did you mean skip_layers"),
    "nothing to keep": (["tune", "skip_layers", "--keep-quality", "0"], "keep_quality=0.0 keeps nothing"),
    "no prompts to take": (["tune", "skip_layers", "--limit", "0"], "limit=0"),
    "a missing file": (["tune", "skip_layers", "--data", "nowhere.txt"], "nowhere.txt"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_arguments_exit_2(models, tmp_path, name):
    command, message = REFUSED[name]
    (tmp_path / "p.txt").write_text("x\n")
    data = [] if "--data" in command else ["--data", tmp_path / "p.txt"]
    found = call(*command, "--model", "toy", *data, "--out", tmp_path / "c.json")
    assert found.exit_code == 2 and message in " ".join(found.stderr.split()), found.output
    assert not (tmp_path / "c.json").exists()
