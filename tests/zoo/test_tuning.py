"""What is trained beside a model goes on where it stopped, and only with its own recipe."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pertoken.zoo import corpus
from pertoken.zoo.stopping import Stopping
from pertoken.zoo.tuning import tune

SHORT = Stopping(model="code-draft", steps=3, batch=1, length=24, layers=(1,))


@pytest.fixture(autouse=True)
def little_text(monkeypatch):
    text = {"a.py": "def add(one, other):\n    return one + other\n\n\n" * 60}
    monkeypatch.setattr(corpus, "split_texts", lambda split: text)


def test_a_run_goes_on_and_another_recipe_does_not(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    tune("code-stop", whole, SHORT)
    tune("code-stop", parts, SHORT, steps=1)
    tune("code-stop", parts, SHORT)
    for name in ("config.json", "controller.safetensors"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes(), name
    with pytest.raises(ValueError, match=r"another recipe; give another --out"):
        tune("code-stop", parts, replace(SHORT, lr=1.0))
