"""Settings as text and as files, and which methods have a dial."""

from __future__ import annotations

import json

import pytest

from pertoken.bench.settings import Config, dial_of, fields_of, setting, value_of
from pertoken.core.budget import Budget
from pertoken.core.card import card, cards
from pertoken.methods import load_methods

load_methods()
WITHOUT = {
    "dyspec": "is lossless: its output is the model's own",
    "full": "is lossless",
    "tome": "works on images",
    "dllm_code_study": "is a tool; only policies and decoders",
    "dual_cache": "has no dial: none of its settings",
}


def test_every_dial_is_a_setting_of_its_method():
    found = {}
    for one in cards().values():
        try:
            found[one.name] = dial_of(one)
        except ValueError:
            continue
        assert found[one.name].name in fields_of(one) and len(found[one.name].values) > 2
        assert set(found[one.name].beside) <= set(fields_of(one))
    assert {"tokenselect", "h2o", "skipdecode", "stop_exit", "adadec", "r2r", "learn2pd", "schedule"} <= set(found)


@pytest.mark.parametrize("name", WITHOUT)
def test_methods_without_a_dial_say_why(name):
    with pytest.raises(ValueError, match=f"{name} {WITHOUT[name]}"):
        dial_of(card(name))


def test_a_configuration_is_read_as_it_was_written(tmp_path):
    config = Config(
        "skipdecode", {"budget": Budget(fraction=0.25), "anchor": "sequence", "span": 0.5}, "m", None, {"n": 1}
    )
    assert Config.load(config.save(tmp_path / "new" / "c.json")) == config
    full = Config("tokenselect", {"budget": Budget.full()})
    assert Config.load(full.save(tmp_path / "c.json")) == full


BAD = [
    "",
    "[]",
    "{}",
    '{"format": "other"}',
    '{"format": "pertoken-config-1"}',
    '{"format": "pertoken-config-1", "x": 1}',
]


@pytest.mark.parametrize("text", [*BAD, '{"format": "pertoken-config-1", "method": 3}'])
def test_other_files_are_no_configuration(tmp_path, text):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(ValueError, match=r"c\.json is no configuration"):
        Config.load(tmp_path / "c.json")


def test_settings_are_read_as_people_write_them():
    one = card("tokenselect")
    written = ("budget=0.25", "budget=tokens=64", "budget=full", "sinks=4", "vote=sum", "reuse=0.5")
    wanted = [Budget(fraction=0.25), Budget(tokens=64), Budget.full(), 4, "sum", 0.5]
    assert [setting(one, text)[1] for text in written] == wanted
    assert value_of("stop", "null") is None and value_of("steps", "8") == 8
    assert "steps" in fields_of(card("learn2pd")) and "steps" not in fields_of(one)


@pytest.mark.parametrize(
    "text, message",
    [("sinks", "has no value"), ("sink=3", "did you mean sinks"), ("budget=much", "budget 'much' is none"),
     ("budget=tokens=-1", "must be a whole number")],
)  # fmt: skip
def test_settings_that_are_none_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        setting(card("tokenselect"), text)


def test_a_configuration_has_only_what_json_has(tmp_path):
    path = Config("h2o", {"budget": Budget(tokens=8)}).save(tmp_path / "c.json")
    assert json.loads(path.read_text())["settings"] == {"budget": {"budget": {"tokens": 8}}}
