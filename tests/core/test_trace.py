import json
import pickle
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from pertoken.core.decision import Decision, Keep, Weight
from pertoken.core.trace import Recorded, Trace, TraceMismatch
from tests.core.strategies import decisions

plain = st.one_of(st.none(), st.booleans(), st.integers(-5, 5), st.text(max_size=8))
notes = st.dictionaries(st.sampled_from(["a", "b", "c"]), st.one_of(plain, st.lists(plain, max_size=3)), max_size=2)
steps = st.tuples(
    st.sampled_from(["layer 0", "step", "säule/1"]), decisions(), st.lists(st.integers(0, 9), max_size=3), notes
)
texts = st.dictionaries(st.text(max_size=5), plain, max_size=3)


def record(about, made) -> Trace:
    trace = Trace(about)
    for site, decision, rows, note in made:
        trace.record(site, decision, tuple(rows), **note)
    return trace


def keep(*flags: bool) -> Keep:
    return Keep(torch.ones(1, len(flags), dtype=torch.bool), torch.tensor([flags]))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts, st.lists(steps, max_size=14))
def test_saved_and_loaded_is_the_same(tmp_path, about, made):
    trace = record(about, made)
    trace.save(tmp_path / "new" / "trace.safetensors")
    loaded = Trace.load(tmp_path / "new" / "trace.safetensors")
    assert loaded.about == trace.about
    assert loaded.same_as(trace) and trace.same_as(loaded)
    assert [step.note for step in loaded.steps] == [step.note for step in trace.steps]
    for mine, theirs in zip(loaded.steps, trace.steps, strict=True):
        for name, tensor in mine.decision.tensors().items():
            assert tensor.dtype == theirs.decision.tensors()[name].dtype


@given(st.lists(steps, max_size=8))
def test_a_player_serves_what_was_recorded_in_order(made):
    trace = record({}, made)
    again, player = Trace(), trace.player()
    for site, decision, _, _ in made:
        step = player.take(site, type(decision))
        again.record(step.site, step.decision, step.rows, **step.note)
    assert player.finished
    assert again.same_as(trace)


def test_recorded_tensors_are_copies():
    flags = torch.tensor([[True, False]])
    weight = torch.ones(1, 2, requires_grad=True)
    trace = Trace()
    trace.record("a", Keep(torch.ones(1, 2, dtype=torch.bool), flags))
    trace.record("b", Weight(torch.ones(1, 2, dtype=torch.bool), weight))
    flags.logical_not_()
    assert trace.steps[0].decision.keep.tolist() == [[True, False]]
    assert not trace.steps[1].decision.weight.requires_grad


def test_steps_of_one_site():
    trace = record({}, [("a", keep(True), [], {}), ("b", keep(False), [], {}), ("a", keep(False), [], {})])
    assert [step.decision.keep.item() for step in trace.at("a")] == [True, False]


def test_same_as_sees_every_difference():
    base = record({}, [("a", keep(True, False), [0], {})])
    others = [
        record({}, []),
        record({}, [("b", keep(True, False), [0], {})]),
        record({}, [("a", keep(True, False), [1], {})]),
        record({}, [("a", keep(True, True), [0], {})]),
        record({}, [("a", keep(True), [0], {})]),
        record({}, [("a", Weight(torch.ones(1, 2, dtype=torch.bool), torch.ones(1, 2)), [0], {})]),
    ]
    assert not any(base.same_as(other) for other in others)


def test_a_player_refuses_another_site_kind_or_end():
    player = record({}, [("a", keep(True), [], {})]).player()
    with pytest.raises(TraceMismatch, match="'b'"):
        player.take("b", Keep)
    with pytest.raises(TraceMismatch, match="weight"):
        player.take("a", Weight)
    assert not player.finished
    player.take("a", Decision)
    with pytest.raises(TraceMismatch, match="the trace holds 1"):
        player.take("a", Keep)


def test_missing_and_foreign_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Trace.load(tmp_path / "nowhere")
    foreign = tmp_path / "model.safetensors"
    save_file({"weight": torch.ones(2)}, foreign)
    with pytest.raises(ValueError, match="not a trace"):
        Trace.load(foreign)
    text = tmp_path / "text.txt"
    text.write_text("not safetensors at all")
    with pytest.raises(ValueError, match="cannot be read"):
        Trace.load(text)


@pytest.mark.parametrize(
    "header", [{"about": "{}"}, {"about": "{", "steps": "[]"}, {"about": "{}", "steps": '[{"site": "a"}]'}]
)
def test_damaged_headers_are_named(tmp_path, header):
    path = tmp_path / "trace.safetensors"
    save_file({"x": torch.ones(1)}, path, {"format": "pertoken-trace-1"} | header)
    with pytest.raises(ValueError, match="trace"):
        Trace.load(path)


def test_a_kind_from_another_version_is_named(tmp_path):
    path = tmp_path / "trace.safetensors"
    entry = [{"site": "a", "kind": "teleport", "rows": [], "note": {}}]
    save_file(
        {"0/valid": torch.ones(1)}, path, {"format": "pertoken-trace-1", "about": "{}", "steps": json.dumps(entry)}
    )
    with pytest.raises(ValueError, match="teleport"):
        Trace.load(path)


def test_no_pickle_is_written_or_read(tmp_path):
    path = tmp_path / "trace.safetensors"
    record({"method": "x"}, [("a", keep(True), [], {})]).save(path)
    with safe_open(str(path), "pt") as file:
        assert set(file.keys()) == {"0/valid", "0/keep"}
        assert json.loads(file.metadata()["about"]) == {"method": "x"}
    with pytest.raises(pickle.UnpicklingError):
        pickle.loads(path.read_bytes())

    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was executed",))

    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match="cannot be read"):
        Trace.load(path)


@dataclass(frozen=True)
class Coin(Recorded):
    """A decoder that keeps one side."""

    def __call__(self, side: bool) -> bool:
        trace, player = self._tape.taken()
        decision = keep(side) if player is None else player.take("toss", Keep).decision
        if trace is not None:
            trace.record("toss", decision)
        return bool(decision.tensors()["keep"])


def test_one_call_of_one_decoder_is_recorded_and_replayed():
    coin, other = Coin(), Coin()
    assert coin == other, "what is recorded is no setting"
    with coin.record() as trace:
        assert not other(False) and coin(True) and not coin(False)
    assert trace.about == {"method": "Coin"} and len(trace.steps) == 1
    with coin.replay(trace), coin.record() as again:
        assert coin(False), "the recorded side, whatever is asked for"
        assert not coin(False), "the next call is a call of its own"
    assert again.same_as(trace)


def test_what_is_not_taken_ends_with_the_block():
    coin = Coin()
    with pytest.raises(RuntimeError), coin.record() as trace, coin.replay(trace):
        raise RuntimeError
    assert not coin(False) and trace.steps == []
