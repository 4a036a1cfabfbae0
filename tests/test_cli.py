import json
import os
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

import pertoken
from pertoken import cli
from pertoken.bench import claims
from pertoken.bench.claims import Measurement
from pertoken.bench.compare import Comparison, Options, Run
from pertoken.cli.showing import save_traces
from pertoken.core import card
from pertoken.core.decision import Keep
from pertoken.core.trace import Trace

PATH = os.pathsep.join(filter(None, sys.path))
HELP = """
import sys
from typer.testing import CliRunner
import pertoken.cli
print(CliRunner().invoke(pertoken.cli.app, ["--help"]).stdout)
heavy = {"torch", "transformers", "numpy", "jinja2"} & set(sys.modules)
assert not heavy, heavy
"""
COMMANDS = [("methods",), ("bench",), ("tune",), ("run",), ("demo",), ("trace",), ("zoo", "list"), ("zoo", "train")]


def call(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


class Toy:
    """Does nothing."""


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """One method with one claim that holds, one that does not; results go to a directory of their own."""
    monkeypatch.setattr(card, "_REGISTRY", {})
    monkeypatch.setattr(claims, "_CLAIMS", {})
    monkeypatch.setattr("pertoken.methods.load_methods", lambda: None)
    monkeypatch.setattr("pertoken.bench.catalogue.load_methods", lambda: None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    paper = card.Paper("Toys")
    card.method(question="decode", shape="decoder", exactness="lossless", paper=paper, name="toy")(Toy)
    claims.claim("toy", claim="is fast", metric="tokens/s", expected="> 1")(lambda bench: Measurement(3, "full", 2, 1))
    return tmp_path


def trace() -> Trace:
    made = Trace({"method": "toy", "model": "m", "rows": [], "runs": []})
    made.record("step", Keep(torch.tensor([[True, False]]), torch.tensor([[True, True]])), (0,), width=2)
    return made


def comparison() -> Comparison:
    run = Run("toy", "toy", 1.0, 8, 8.0, 4, 100, 1000, 2.0, True)
    return Comparison("m", None, ["x"], Options(), [run], [trace()], {"toy": ["y [bold]"]})


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help_with_an_example(command):
    found = call(*command, "--help")
    assert found.exit_code == 0
    assert f"pertoken {' '.join(command)}" in " ".join(found.stdout.split("Example:")[1].split())


def test_help_lists_the_commands_and_loads_nothing_heavy():
    found = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, env={"PYTHONPATH": PATH})
    assert found.returncode == 0, found.stderr
    assert all(command in found.stdout for command in ("methods", "bench", "tune", "run", "demo", "trace", "zoo"))


def test_version():
    assert call("--version").stdout.strip() == pertoken.__version__


def test_public_names_are_found_when_asked_for():
    from pertoken.core.attach import attach

    assert pertoken.attach is attach
    assert set(pertoken.__all__) <= set(dir(pertoken))
    with pytest.raises(AttributeError, match=r"it offers .*DySpec"):
        _ = pertoken.nothing


@pytest.mark.parametrize("name", pertoken.__all__)
def test_every_public_name_exists(name):
    assert getattr(pertoken, name) is not None


@pytest.mark.parametrize("command", [["bench", "dyspek"], ["run", "dyspek", "--model", "x", "--prompt", "y"]])
def test_an_unknown_method_is_a_bad_argument_with_a_suggestion(command):
    found = call(*command)
    assert found.exit_code == 2
    assert "did you mean dyspec" in found.stderr
    assert found.stdout == ""
    assert "Traceback" not in found.stderr


BAD = {
    "no command": [],
    "an unknown command": ["dance"],
    "bench without a name": ["bench"],
    "run without a model": ["run", "full", "--prompt", "x"],
    "run without a method": ["run", "--model", "x", "--prompt", "y"],
    "run with another file as its configuration": ["run", "--config", "nowhere.json", "--prompt", "y"],
    "tune without data": ["tune", "skip_layers", "--model", "x"],
    "tune on a directory": ["tune", "skip_layers", "--model", "x", "--data", "."],
    "run without a prompt": ["run", "full", "--model", "x"],
    "run with two prompts": ["run", "full", "--model", "x", "--prompt", "y", "--input", "z"],
    "run with a missing file": ["run", "full", "--model", "x", "--input", "nowhere.txt"],
    "run with an unknown model": ["run", "full", "--model", "./nowhere", "--prompt", "x"],
    "run with no tokens": ["run", "full", "--model", "x", "--prompt", "y", "--max-new-tokens", "0"],
    "run with an empty block": ["run", "threshold", "--model", "x", "--prompt", "y", "--block", "0"],
    "run with two rules of a slot": ["run", "threshold+factor", "--model", "x", "--prompt", "y"],
    "run with an unknown dtype": ["run", "full", "--model", "x", "--prompt", "y", "--dtype", "fp7"],
    "a missing trace": ["trace", "nowhere"],
    "an unknown zoo model": ["zoo", "train", "code-targe", "--out", "runs"],
    "no steps": ["zoo", "train", "code-target", "--out", "runs", "--steps", "0"],
}


@pytest.mark.parametrize("command", BAD.values(), ids=BAD.keys())
def test_bad_arguments_exit_2_with_one_sentence(command):
    found = call(*command)
    assert found.exit_code == 2, found.output
    assert "Traceback" not in found.output


def test_a_bug_keeps_its_traceback(monkeypatch):
    def broken(*arguments):
        raise KeyError("a bug")

    monkeypatch.setattr("pertoken.bench.catalogue.entries", broken)
    found = call("methods")
    assert isinstance(found.exception, KeyError)


def test_a_foreseen_failure_of_a_run_exits_1(monkeypatch):
    from pertoken.core.attach import UndoError

    def broken(*arguments):
        raise UndoError("something was left")

    monkeypatch.setattr("pertoken.bench.catalogue.entries", broken)
    found = call("methods")
    assert found.exit_code == 1
    assert "something was left" in found.stderr


def test_methods_as_json_and_as_a_table(toy):
    call("bench", "toy")
    (one,) = json.loads(call("methods", "--json").stdout)
    assert (one["name"], one["question"], one["shape"], one["exactness"]) == ("toy", "decode", "decoder", "lossless")
    assert one["claims"][0]["result"]["holds"] is True
    table = call("methods").stdout
    assert "toy" in table and "1/1 claims" in " ".join(table.split())


def test_every_registered_method_is_listed():
    names = {one["name"] for one in json.loads(call("methods", "--json").stdout)}
    assert {"full", "chain", "kary_tree", "random_tree", "prompt_lookup", "dyspec", "del"} <= names
    assert {"learn2pd", "difftester", "dkv_cache", "elastic_cache", "ilm", "schedule", "end_of_text"} <= names


def test_bench_prints_json_alone_and_keeps_results(toy):
    found = call("bench", "toy", "--json", "--seed", 5)
    (record,) = json.loads(found.stdout)
    assert found.exit_code == 0
    assert (record["ratio"], record["holds"], record["seed"]) == (1.5, True, 5)
    assert json.loads((toy / "results" / "toy.json").read_text())["claims"][0]["ratio"] == 1.5
    assert "is fast" in found.stderr


def test_bench_prints_a_table(toy):
    found = call("bench", "toy", "--quick", "--results", toy / "elsewhere")
    assert found.exit_code == 0
    assert "is fast" in found.stdout and "holds" in found.stdout
    assert not (toy / "elsewhere").exists()


def test_bench_prints_the_table_of_a_claim(toy):
    rows = [{"side": "full [1]", "exact": 0.123456}, {"side": "mine", "exact": 1.0}]
    made = Measurement(3, "full", 2, 1, {"table": rows})
    claims.claim("toy", claim="has a table", metric="x", expected="> 1")(lambda bench: made)
    printed = " ".join(call("bench", "toy", "--quick").stdout.split())
    assert "side exact" in printed and "full [1] 0.1235" in printed and "mine 1" in printed


def test_a_claim_that_does_not_hold_exits_1(toy):
    claims.claim("toy", claim="is [free]", metric="cost", expected="== 0", compare="value")(lambda bench: 1 / 0)
    found = call("bench", "toy", "--json", "--quick")
    assert found.exit_code == 1
    assert [record["holds"] for record in json.loads(found.stdout)] == [True, False]
    assert "ZeroDivisionError: division by zero" in " ".join(call("bench", "toy", "--quick").stdout.split())


def test_ctrl_c_in_bench_keeps_finished_claims_and_says_so(toy):
    def interrupted(bench):
        raise KeyboardInterrupt

    claims.claim("toy", claim="ends", metric="x", expected="> 1")(interrupted)
    found = call("bench", "toy", "--json")
    assert found.exit_code == 1
    assert [record["claim"] for record in json.loads(found.stdout)] == ["is fast"]
    assert "1 finished claim(s), kept in: results/toy.json" in found.stderr


def test_run_passes_its_options_on_and_prints_json_alone(toy, monkeypatch):
    asked = []

    def compare(names, model, draft, prompts, options, status):
        asked.append((names, model, draft, prompts, options))
        status("working")
        return comparison()

    monkeypatch.setattr("pertoken.bench.compare.compare", compare)
    (toy / "prompts.txt").write_text("one\ntwo\n")
    options = (
        "--max-new-tokens 9 --temperature 0.5 --top-p 0.9 --top-k 7 --dtype fp32 --baseline generate --seed 3 --batch 2"
    )
    found = call(
        "run", "toy", "toy+other", "--model", "m", "--draft", "d", "--input", "prompts.txt", *options.split(), "--json"
    )
    assert found.exit_code == 0, found.output
    assert asked == [
        (["toy", "toy+other"], "m", "d", ["one", "two"], Options(9, 0.5, 0.9, 7, "fp32", "auto", "generate", 3, 2))
    ]
    printed = json.loads(found.stdout)
    assert printed["runs"][0]["speedup"] == 2.0 and printed["outputs"] == {"toy": ["y [bold]"]}
    assert "working" in found.stderr


def test_run_passes_settings_of_a_canvas_on(toy, monkeypatch):
    asked = []
    monkeypatch.setattr("pertoken.bench.compare.compare", lambda *given: asked.append(given[4]) or comparison())
    options = "--block 16 --steps 64 --filter f.safetensors --language java"
    found = call("run", "a+b", "--model", "m", "--prompt", "x", *options.split(), "--json")
    assert found.exit_code == 0, found.output
    assert asked == [Options(block=16, steps=64, filter="f.safetensors", language="java")]
    assert asked[0].baseline is None, "the default is that of the model's kind"


def test_run_saves_its_trace(toy, monkeypatch):
    monkeypatch.setattr("pertoken.bench.compare.compare", lambda *arguments: comparison())
    found = call("run", "toy", "--model", "m", "--prompt", "x", "--trace", "t.safetensors", "--json")
    assert found.exit_code == 0, found.output
    assert Trace.load("t.safetensors").same_as(trace())


def test_several_traces_get_a_file_each(tmp_path):
    several = comparison()
    several.traces.append(trace())
    several.traces[1].about["method"] = "other, attached"
    save_traces(several, tmp_path / "t.safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {"t.toy.safetensors", "t.other-attached.safetensors"}


def test_a_trace_is_read_as_json(tmp_path):
    trace().save(tmp_path / "t.safetensors")
    found = call("trace", tmp_path / "t.safetensors", "--json")
    printed = json.loads(found.stdout)
    assert printed["about"]["method"] == "toy"
    assert printed["steps"] == [{"site": "step", "kind": "keep", "rows": [0], "note": {"width": 2}, "spent": [1]}]


def test_a_foreign_file_is_no_trace(tmp_path):
    (tmp_path / "t.txt").write_text("hello")
    found = call("trace", tmp_path / "t.txt")
    assert found.exit_code == 2 and "cannot be read as a trace" in found.stderr


def test_zoo_models_are_listed():
    assert {"code-target", "code-draft"} <= {one["name"] for one in json.loads(call("zoo", "list", "--json").stdout)}
    assert "code-draft" in call("zoo", "list").stdout


class FakeRun:
    """Two steps of training that take no time."""

    def __init__(self, name, directory, recipe, compile_model):
        self.asked = [name, None, compile_model]
        self.directory, self.step, self.curve = directory, 0, []
        directory.mkdir(parents=True)

    def resume(self):
        return False

    def train(self, until=None):
        self.asked[1] = until
        self.curve.append({"step": 2, "train": 1.5, "seconds": 0.1})
        if self.asked[1] == 99:
            from pertoken.zoo.train import RunInterrupted

            raise RunInterrupted("stopped at step 2 of 99; run again to go on")

    def export(self):
        return self.directory / "model"


def test_zoo_train_exports_and_draws_its_curve(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr("pertoken.zoo.train.Run", lambda *given: made.append(FakeRun(*given)) or made[-1])
    found = call("zoo", "train", "code-draft", "--out", tmp_path, "--steps", 2, "--no-compile")
    assert found.exit_code == 0, found.output
    assert made[0].asked == ["code-draft", 2, False]
    assert str(tmp_path / "code-draft" / "model") in found.stderr
    assert {path.name for path in (tmp_path / "code-draft").iterdir()} == {"curve.csv", "curve.svg"}


def test_an_interrupted_training_says_how_to_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr("pertoken.zoo.train.Run", FakeRun)
    found = call("zoo", "train", "code-draft", "--out", tmp_path, "--steps", 99)
    assert found.exit_code == 1
    assert "run again to go on" in found.stderr
    assert (tmp_path / "code-draft" / "curve.svg").exists()
