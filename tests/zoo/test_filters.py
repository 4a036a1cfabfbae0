"""Filters of Learn2PD are trained on training prompts only, kept with their rates, and found again by block."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from pertoken.cli import app
from pertoken.core.errors import BadRequest
from pertoken.denoise.learn2pd import Filter, Learn2PD
from pertoken.denoise.loop import Denoise
from pertoken.zoo import corpus, filters
from pertoken.zoo.filters import collect, filter_name, judged, train_filters, training_prompts
from pertoken.zoo.recipe import FILTERS, FilterRecipe
from tests.bench import toys

torch.set_num_threads(1)
TINY = FilterRecipe(block=4, length=8, batch=2, batches=3, longest_prompt=40, steps=200, rates=(0.2, 0.5))


@pytest.fixture
def about(monkeypatch):
    """A toy model and its tokenizer in place of the zoo's, and a few functions in place of the standard library."""
    model = toys.model()
    model.config.is_causal, model.config.mask_token_id, model.config.prediction_shift = False, 256, 1
    model.config.max_position_embeddings = 256
    texts = {f"{i}.py": f"def f{i}(a):\n    return a * {i}\n\n\n" for i in range(12)}
    monkeypatch.setattr(corpus, "split_texts", lambda split, root=None: {"train": texts}[split])
    monkeypatch.setattr(filters, "load", lambda name, dtype: (model, toys.tokenizer()))
    return model, toys.tokenizer()


def test_prompts_are_of_both_kinds_and_of_like_lengths(about):
    batches = training_prompts(TINY, about[1])
    assert [len(batch) for batch in batches] == [2] * 6
    functions = [prompt for batch in batches for prompt in batch if "test" not in prompt]
    assert len(functions) == 6 == len(set(functions))
    for batch in batches:
        assert len({"test" in prompt for prompt in batch}) == 1, "a batch has one kind of prompt"
    short = replace(TINY, longest_prompt=3)
    assert len(training_prompts(short, about[1])) == 3, "functions that are too long are left out"


def test_every_fifth_batch_is_kept_from_training(about):
    seen, held = collect(replace(TINY, batch=1), about[0], about[1], lambda text: None)
    whole = filters.records(about[0], [_inputs(about, prompts) for prompts in _batches(about)], 8, 4)
    assert len(held[0]) > 0 and len(seen[0]) + len(held[0]) == len(whole[0])
    first, last = (filters.records(about[0], [_inputs(about, _batches(about)[n])], 8, 4)[0] for n in (0, 5))
    assert torch.equal(held[0], torch.cat([first, last]))


def _batches(about):
    return training_prompts(replace(TINY, batch=1), about[1])


def _inputs(about, prompts):
    return dict(about[1](prompts, return_tensors="pt", padding=True))


def test_filters_are_kept_with_what_they_were_trained_on(about, tmp_path):
    said = []
    paths = train_filters("tiny", tmp_path / "tiny", TINY, status=said.append)
    assert [path.name for path in paths] == ["filter-4.safetensors", "filter-4-1.safetensors"]
    assert said[0] == "records of batch 1/6"
    config = json.loads((tmp_path / "tiny" / "config.json").read_text())
    assert config["model_type"] == "learn2pd_filter" and config["records"] > 0
    two, one = (Filter.load(path) for path in paths)
    assert (two.layers, one.layers) == (2, 1)
    assert list(two.about["tau"]) == ["0.2", "0.5"] and two.about["records"] == config["records"]
    decoder = Denoise(Learn2PD(tmp_path / "tiny"), block=4)
    inputs = _inputs(about, ["ab", "c"])
    out = about[0].generate(**inputs, max_new_tokens=8, do_sample=False, custom_generate=decoder)
    assert out.shape[1] == inputs["input_ids"].shape[1] + 8
    with pytest.raises(BadRequest, match=r"no filter at .*filter-8"):
        about[0].generate(**inputs, max_new_tokens=8, custom_generate=Denoise(Learn2PD(tmp_path / "tiny"), block=8))


def test_tau_keeps_wrong_commits_within_the_rate():
    torch.manual_seed(0)
    confidence = torch.rand(500, 4)
    right, undecided = torch.rand(500, 4) < confidence, torch.rand(500, 4) < 0.7
    net = Filter(4, 1)
    net.net[0].weight.data, net.net[0].bias.data = 8 * torch.eye(4), torch.full((4,), -4.0)
    found = judged(net, (confidence, right, undecided), (0.05, 0.2, 0.3))
    for rate, tau in found["tau"].items():
        committed = (net(confidence).sigmoid() > tau) & undecided
        wrong = int((committed & ~right).sum()) / max(int(committed.sum()), 1)
        assert wrong <= float(rate) + 1 / max(int(committed.sum()), 1)
        assert found["recall"][rate] == pytest.approx(int((committed & right).sum()) / int((undecided & right).sum()))
    assert found["tau"]["0.05"] > found["tau"]["0.2"] > found["tau"]["0.3"]


def test_the_papers_filter_has_the_plain_name():
    assert [filter_name(32, layers) for layers in (2, 1, 4)] == [
        "filter-32.safetensors",
        "filter-32-1.safetensors",
        "filter-32-4.safetensors",
    ]


def test_the_command_trains_filters(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(filters, "train_filters", lambda *given: asked.append(given[:4]) or [tmp_path / "f"])
    found = CliRunner().invoke(app, ["zoo", "train", "code-filter", "--out", str(tmp_path), "--steps", "3"])
    assert found.exit_code == 0 and f"filter: {tmp_path / 'f'}" in found.output
    assert asked == [("code-filter", tmp_path / "code-filter", FILTERS["code-filter"], 3)]
