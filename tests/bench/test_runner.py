import json
import math
import random

import numpy as np
import pytest
import torch

from pertoken.bench import results
from pertoken.bench.claims import Measurement
from pertoken.bench.runner import run


def found(value=3.0, **detail):
    return Measurement(value, "full", 2.0, 5, detail)


def stored(folder):
    return json.loads((folder / "toy.json").read_text())


def test_a_full_run_keeps_records_with_what_they_were_measured_on(toy, tmp_path):
    toy("one")(lambda bench: found())
    outcome = run(["toy"], directory=tmp_path, seed=4)
    kept = stored(tmp_path)
    assert outcome.fine and outcome.saved == [tmp_path / "toy.json"]
    assert kept["method"] == "toy"
    assert set(kept["versions"]) == {"python", "torch", "transformers", "pertoken"}
    assert {"cpu", "cores", "threads", "memory_bytes", "gpu"} == set(kept["machine"])
    assert kept["duration"] >= 0 and kept["date"].endswith("+00:00")
    (record,) = kept["claims"]
    assert outcome.records[0].items() <= record.items()
    assert set(record) - set(outcome.records[0]) == {"date", "duration"}
    assert record["seed"] == 4


def test_a_quick_run_writes_nothing(toy, tmp_path):
    seen = []
    toy("one")(lambda bench: seen.append(bench.quick) or found())
    outcome = run(["toy"], quick=True, directory=tmp_path)
    assert seen == [True] and outcome.fine
    assert list(tmp_path.iterdir()) == [] and outcome.saved == []


def test_every_finished_claim_is_on_disk_before_the_next_starts(toy, tmp_path):
    toy("one")(lambda bench: found())
    toy("two")(lambda bench: found(len(stored(tmp_path)["claims"])))
    outcome = run(["toy"], directory=tmp_path)
    assert outcome.records[1]["value"] == 1
    assert [record["claim"] for record in stored(tmp_path)["claims"]] == ["one", "two"]


def test_ctrl_c_keeps_what_is_finished(toy, tmp_path):
    def interrupted(bench):
        raise KeyboardInterrupt

    toy("one")(lambda bench: found())
    toy("two")(interrupted)
    toy("three")(lambda bench: pytest.fail("ran after the interrupt"))
    outcome = run(["toy"], directory=tmp_path)
    assert outcome.interrupted and not outcome.fine
    assert [record["claim"] for record in outcome.records] == ["one"]
    assert [record["claim"] for record in stored(tmp_path)["claims"]] == ["one"]
    assert [path.name for path in tmp_path.iterdir()] == ["toy.json"]


def test_ctrl_c_before_anything_is_finished_leaves_older_results_alone(toy, tmp_path):
    def interrupted(bench):
        raise KeyboardInterrupt

    (tmp_path / "toy.json").write_text('{"claims": []}')
    toy("one")(interrupted)
    assert run(["toy"], directory=tmp_path).interrupted
    assert (tmp_path / "toy.json").read_text() == '{"claims": []}'


def test_a_claim_that_raises_is_recorded_and_the_run_goes_on(toy, tmp_path):
    def broken(bench):
        raise RuntimeError("no such tensor")

    toy("one")(broken)
    toy("two")(lambda bench: found())
    outcome = run(["toy"], directory=tmp_path)
    first, second = outcome.records
    assert (first["holds"], first["value"], second["holds"]) == (False, None, True)
    assert first["detail"]["error"] == "RuntimeError: no such tensor"
    assert "broken, line" in first["detail"]["where"]
    assert not outcome.fine


def test_a_value_that_is_no_number_does_not_hold(toy, tmp_path):
    toy("one", expected=">= 0", compare="value")(lambda bench: found(math.nan, curve=[1.0, math.nan]))
    (record,) = run(["toy"], directory=tmp_path).records
    assert record["holds"] is False and record["value"] is None
    assert stored(tmp_path)["claims"][0]["detail"]["curve"] == [1.0, None]


def test_a_claim_measured_again_replaces_its_record_and_others_keep_theirs():
    old = {"versions": {"torch": "2.10"}, "machine": {"cpu": "x"}}
    old["claims"] = [{"claim": name, "value": 1, "date": "January"} for name in ("one", "two", "no longer made")]
    new = {"versions": {"torch": "2.13"}, "machine": {"cpu": "x"}}
    new["claims"] = [{"claim": "two", "value": 2, "date": "May"}]
    merged = results.merge(old, new, ["one", "two"])
    one = {"claim": "one", "value": 1, "date": "January", "versions": {"torch": "2.10"}}
    assert merged == new | {"claims": [one, {"claim": "two", "value": 2, "date": "May"}]}
    newer = new | {"versions": {"torch": "2.14"}, "claims": []}
    assert results.merge(merged, newer, ["one"])["claims"] == [one], "the versions it was measured with stay its own"


def test_an_interrupted_second_run_keeps_the_older_record_of_what_it_did_not_reach(toy, tmp_path, monkeypatch):
    stop = []

    def second(bench):
        if stop:
            raise KeyboardInterrupt
        return found(4.0)

    toy("one")(lambda bench: found(9.0 if stop else 3.0))
    toy("two")(second)
    run(["toy"], directory=tmp_path)
    stop.append(True)
    monkeypatch.setattr(results, "machine", lambda: {"cpu": "another"})
    run(["toy"], directory=tmp_path)
    one, two = stored(tmp_path)["claims"]
    assert (one["value"], two["value"]) == (9.0, 4.0)
    assert stored(tmp_path)["machine"] == {"cpu": "another"}
    assert two["machine"] != {"cpu": "another"}


def test_unknown_names_stop_the_run_before_it_starts(toy, tmp_path):
    ran = []
    toy("one")(lambda bench: ran.append(1) or found())
    with pytest.raises(ValueError, match="did you mean toy"):
        run(["toy", "tois"], directory=tmp_path)
    assert ran == []


def test_a_method_without_claims_is_named(toy, tmp_path):
    with pytest.raises(ValueError, match="toy has no claims"):
        run(["toy"], directory=tmp_path)


def test_claims_of_one_run_share_and_start_from_the_seed(toy, tmp_path):
    made, drawn = [], []

    def claim(bench):
        drawn.append((random.random(), np.random.rand(), torch.rand(()).item()))
        return found(bench.shared("three", lambda: made.append(1) or 3.0))

    toy("one")(claim)
    toy("two")(claim)
    run(["toy", "toy"], quick=True, directory=tmp_path, seed=7)
    assert made == [1] and len(drawn) == 2
    assert drawn[0] == drawn[1]


def test_progress_and_records_are_told(toy, tmp_path):
    told, records = [], []
    toy("one")(lambda bench: bench.status("half way") or found())
    run(["toy"], True, records.append, directory=tmp_path, status=told.append)
    assert told == ["toy 1/1: one", "half way"]
    assert [record["claim"] for record in records] == ["one"]


def test_where_results_lie(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert results.results_dir(tmp_path / "given") == tmp_path / "given"
    assert results.results_dir() == results.CACHE.expanduser()
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "pertoken"\n')
    (tmp_path / "deep" / "deeper").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "deep" / "deeper")
    assert results.results_dir() == tmp_path.resolve() / "results"
    (tmp_path / "deep" / "deeper" / "results").mkdir()
    assert results.results_dir().resolve() == (tmp_path / "deep" / "deeper" / "results").resolve()


@pytest.mark.parametrize("text", ["{", "[]", '{"method": "toy"}'])
def test_a_file_that_holds_something_else_is_named(tmp_path, text):
    (tmp_path / "toy.json").write_text(text)
    with pytest.raises(ValueError, match=r"toy\.json does not hold results"):
        results.read("toy", tmp_path)


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    results.write("toy", {"claims": []}, tmp_path)
    with pytest.raises(ValueError):
        results.write("toy", {"claims": [math.nan]}, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["toy.json"]
    assert stored(tmp_path) == {"claims": []}


def test_only_some_claims_are_measured_and_the_others_stay(toy, tmp_path):
    toy("a Tree is grown")(lambda bench: found(4.0))
    toy("a chain is not")(lambda bench: found(6.0))
    run(["toy"], directory=tmp_path)
    outcome = run(["toy"], directory=tmp_path, only="TREE")
    assert [record["claim"] for record in outcome.records] == ["a Tree is grown"]
    assert [record["value"] for record in stored(tmp_path)["claims"]] == [4.0, 6.0]


def test_only_what_no_claim_says_is_refused(toy, tmp_path):
    toy("one")(lambda bench: pytest.fail("measured all the same"))
    with pytest.raises(ValueError, match="no claim of toy contains 'two'; the claims are: one"):
        run(["toy"], directory=tmp_path, only="two")
