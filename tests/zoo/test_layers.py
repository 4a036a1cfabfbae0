"""Models that differ in their layers: what they hold, how they run while they are trained, and training on demand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from pertoken.attend.dma import DMA
from pertoken.attend.dynamic_mask import DynamicMask
from pertoken.core.attach import attach
from pertoken.core.budget import Budget
from pertoken.zoo import corpus, layers, on_demand, recipe, train
from pertoken.zoo.causal import Causal
from pertoken.zoo.recalling import AtPositions
from pertoken.zoo.recipe import RECIPES, Shape

SHAPE = Shape(layers=2, width=32, heads=4, kv_heads=2, ffn=48, positions=64)


@pytest.fixture
def ids():
    return torch.randint(1, 4000, (2, 40), generator=torch.Generator().manual_seed(3))


def made(kind):
    torch.manual_seed(0)
    return layers.made(SHAPE.config(0), kind)


def test_only_one_kind_holds_a_mask():
    assert layers.mask_of(made("dense")) is None and layers.mask_of(made("window")) is None
    assert isinstance(layers.mask_of(made("dynamic_mask")), DynamicMask)
    with pytest.raises(ValueError, match="layers='sparse' is unknown; choose one of dense, dynamic_mask, window"):
        made("sparse")


def test_a_window_reads_the_last_keys_of_every_query(ids):
    model = made("window")
    read = AtPositions(model)
    places = torch.arange(40).expand(2, -1)
    other = ids.clone()
    other[:, 5] += 1
    with layers.at_work(model, "window", 3):  # 2 layers of 3 keys before each query: 6 tokens back
        one, two = read(ids, places), read(other, places)
    assert not torch.equal(one[:, 11], two[:, 11])
    assert torch.equal(one[:, 12:], two[:, 12:]) and torch.equal(one[:, :5], two[:, :5])


def test_a_dynamic_mask_is_trained_with_the_model(ids, tmp_path):
    model = made("dynamic_mask")
    with layers.at_work(model, "dynamic_mask", 8):
        out = AtPositions(model)(ids, torch.arange(40).expand(2, -1))
    out.float().pow(2).sum().backward()
    mask = layers.mask_of(model)
    assert all(scorer.weight.grad.abs().sum() > 0 for scorer in mask.scorers.values())
    layers.save(model, tmp_path)
    with attach(model, DMA(Budget(tokens=8), mask=tmp_path)):
        again = model.model(input_ids=ids, use_cache=False).last_hidden_state
    assert torch.allclose(out, again, atol=1e-5)


def test_what_is_not_there_is_trained_once_and_kept(tmp_path, monkeypatch):
    text = {"a.py": "def add(one, other):\n    return one + other\n\n\n" * 40}
    monkeypatch.setattr(corpus, "split_texts", lambda split: text)
    short = replace(RECIPES["reading"], shape=SHAPE, steps=2, batch=1, length=24, layers="dynamic_mask", keys=4)
    monkeypatch.setitem(recipe.RECIPES, "reading", short)
    assert on_demand.found("reading", tmp_path) is None
    path = on_demand.trained("reading", tmp_path)
    assert on_demand.found("reading", tmp_path) == path
    assert (path / "config.json").exists() and (path / "dynamic_mask.safetensors").exists()
    monkeypatch.setattr(train.Run, "train", None)
    assert on_demand.trained("reading", tmp_path) == path
    monkeypatch.setitem(recipe.RECIPES, "reading", replace(short, lr=1.0))
    with pytest.raises(ValueError, match="another recipe"):
        on_demand.trained("reading", tmp_path)


def test_what_was_begun_goes_on_and_ends_as_if_never_stopped(tmp_path, monkeypatch):
    text = {"a.py": "def add(one, other):\n    return one + other\n\n\n" * 40}
    monkeypatch.setattr(corpus, "split_texts", lambda split: text)
    short = replace(RECIPES["reading"], shape=SHAPE, steps=4, batch=1, length=24, save_every=2)
    monkeypatch.setitem(recipe.RECIPES, "reading", short)
    loss, seen = Causal.loss, []

    def cut(self, batch, step, generator):
        seen.append(step)
        if len(seen) == 4:  # the process dies in its fourth step: what it had saved last was the second
            raise SystemExit
        return loss(self, batch, step, generator)

    monkeypatch.setattr(Causal, "loss", cut)
    with pytest.raises(SystemExit):
        on_demand.trained("reading", tmp_path / "cut")
    assert on_demand.found("reading", tmp_path / "cut") is None
    paths = [on_demand.trained("reading", tmp_path / name) for name in ("cut", "whole")]
    assert seen == [0, 1, 2, 3, 2, 3, 0, 1, 2, 3]
    one, other = (load_file(path / "model.safetensors") for path in paths)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_takes_the_tokenizer_that_its_recipe_names(tmp_path):
    made = train.make_tokenizer(tmp_path / "tokenizer", RECIPES["associating"])
    packaged = Tokenizer.from_file(str(on_demand.trained("code-target") / "tokenizer.json"))
    assert made.to_str() == packaged.to_str()


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="'readings' is unknown"):
        on_demand.found("readings")


def test_a_packaged_model_is_not_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(train.Run, "train", None)
    assert on_demand.trained("code-draft", tmp_path).parent.name == "weights"
