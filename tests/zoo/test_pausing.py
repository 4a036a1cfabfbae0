"""AdaDec's threshold for the zoo's code model: it is that model's, and is found without being named."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pertoken.bench.catalogue import zoo_entries
from pertoken.decode.adadec import AdaDec, Threshold
from pertoken.models.load import load
from pertoken.models.signature import signature
from pertoken.zoo.pausing import PAUSES, learn


@pytest.mark.parametrize("name", PAUSES)
def test_the_packaged_threshold_was_learnt_on_its_model(name):
    recipe = PAUSES[name]
    found = Threshold.load(recipe.kept)
    model, tokenizer = load(f"zoo:{recipe.model}", "fp32")
    assert found.model == signature(model)
    assert found.slope < 0 and 0 < found.entropy < 8 and found.steps == recipe.steps * (recipe.length - recipe.given)
    decoder = AdaDec()
    batch = tokenizer(
        ["def parse(text):\n    ", "class Tree:\n    def __init__(self"], return_tensors="pt", padding=True
    )
    torch.set_num_threads(1)
    out = model.generate(**batch, custom_generate=decoder, max_new_tokens=12, do_sample=False)
    assert out.shape[1] > batch["input_ids"].shape[1] and decoder.stats.pauses > 0
    assert 0 < found.pauses < 1


def test_a_threshold_is_learnt_again_from_its_recipe(tmp_path):
    torch.set_num_threads(1)
    recipe, said = replace(PAUSES["code-pause"], steps=16, length=96, files=6), []
    path = learn(tmp_path / "new", recipe, said.append)
    found = Threshold.load(path)
    assert found.model == Threshold.load(recipe.kept).model and found.steps == 16 * 64
    assert said[0] == "reading 1536 tokens" and f"{found.entropy:.3f} nats" in said[1]


def test_it_is_listed_with_the_zoo():
    (one,) = [entry for entry in zoo_entries() if entry["name"] == "code-pause"]
    assert one["teacher"] == "code-target" and 0 < one["bytes"] < 1000 and one["path"].endswith("code-target")
