"""Recipes train, stop and go on; unlikelihood against loops; evaluation figures against the model's own."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors import safe_open
from torch.nn import functional as F
from transformers import AutoTokenizer, LlamaForCausalLM

from pertoken.zoo import corpus, evaluate, train
from pertoken.zoo.next_token import LayerSkipForward, layer_drop_rates, rotating_exits
from pertoken.zoo.recipe import RECIPES, Recipe, Shape
from pertoken.zoo.train import Run, RunInterrupted, learning_rate
from pertoken.zoo.unlikelihood import greedy_continuations, in_repeats, unlikelihood
from tests.contract.conftest import COMMON

torch.set_num_threads(1)
QUIET = Console(quiet=True)
TINY = Recipe(
    Shape(layers=3, width=32, heads=2, kv_heads=1, ffn=48, vocab=300, positions=64),
    steps=6,
    batch=2,
    length=24,
    warmup=2,
    exit_scale=1.0,
    layer_dropout=0.3,
    evaluate_every=100,
    save_every=100,
)


@pytest.fixture
def small_corpus(monkeypatch):
    """A few kilobytes of code in place of the standard library."""
    lines = [f"def f{i}(a, b):\n    return a * {i} + b[{i % 7}]\n\n" for i in range(120)]
    texts = {"train": {"t.py": "".join(lines)}, "heldout": {"h.py": "".join(lines[::-1])}}
    monkeypatch.setattr(corpus, "split_texts", lambda split, root=None: texts[split])


def start(directory, recipe=TINY):
    return Run("tiny", directory / "tiny", recipe, compile_model=False)


def state(run):
    """Everything that the next step depends on."""
    kept = {k: v.clone() for k, v in run.model.state_dict().items()}
    for i, optimizer in enumerate(run.optimizers):
        for j, entry in optimizer.state_dict()["state"].items():
            kept |= {f"{i}/{j}/{k}": v.clone() for k, v in entry.items() if torch.is_tensor(v)}
    return kept


def assert_same(one, other):
    assert one.keys() == other.keys()
    different = [k for k in one if not torch.equal(one[k], other[k])]
    assert not different, f"{len(different)} tensors differ, such as {different[:3]}"


def stop_before(run, step):
    """Ctrl-C as the batch of this step is asked for."""
    inner = run.batches

    def batches():
        for number, batch in enumerate(inner(), run.step):
            if number == step:
                raise KeyboardInterrupt
            yield batch

    run.batches = batches


@pytest.fixture
def whole(small_corpus, tmp_path):
    run = start(tmp_path / "whole")
    run.train(QUIET)
    return run


@pytest.mark.parametrize("at", [0, 1, 3, 5])
def test_an_interrupted_run_goes_on_bit_for_bit(whole, tmp_path, at):
    run = start(tmp_path / "parts")
    stop_before(run, at)
    with pytest.raises(RunInterrupted, match=f"step {at} of 6"):
        run.train(QUIET)
    again = start(tmp_path / "parts")
    assert again.resume() and again.step == at
    again.train(QUIET)
    assert again.step == 6
    assert_same(state(again), state(whole))


def test_the_training_curve_goes_on_as_well(small_corpus, tmp_path):
    recipe = replace(TINY, evaluate_every=2)
    whole = start(tmp_path / "whole", recipe)
    whole.train(QUIET)
    run = start(tmp_path / "parts", recipe)
    stop_before(run, 3)
    with pytest.raises(RunInterrupted):
        run.train(QUIET)
    again = start(tmp_path / "parts", recipe)
    again.resume()
    again.train(QUIET)
    drop = lambda curve: [{k: v for k, v in point.items() if k != "seconds"} for point in curve]  # noqa: E731
    assert [point["step"] for point in again.curve] == [2, 4, 6]
    assert drop(again.curve) == drop(whole.curve)


@pytest.mark.parametrize("which", [0, 1])
def test_ctrl_c_in_the_middle_of_a_step_loses_or_doubles_nothing(whole, tmp_path, which):
    """Ctrl-C may come between the two optimizers' steps, when half of the weights are new."""
    run = start(tmp_path / "parts")
    optimizer, calls = run.optimizers[which], []
    step = optimizer.step

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    optimizer.step = interrupted
    with pytest.raises(RunInterrupted):
        run.train(QUIET)
    again = start(tmp_path / "parts")
    again.resume()  # from the last whole state, if there is one
    again.train(QUIET)
    assert_same(state(again), state(whole))


def test_a_write_that_breaks_off_leaves_a_state_that_fits_together(whole, tmp_path, monkeypatch):
    recipe = replace(TINY, save_every=2)
    run = start(tmp_path / "parts", recipe)
    writes = []
    write = train.Path.write_text

    def break_off(path, *args, **kwargs):
        writes.append(path)
        if len(writes) == 2:
            raise OSError("no space left on device")
        return write(path, *args, **kwargs)

    monkeypatch.setattr(train.Path, "write_text", break_off)
    with pytest.raises(OSError, match="no space"):
        run.train(QUIET)
    monkeypatch.undo()
    texts = {"train": whole.objective.stream, "heldout": whole.objective.heldout}
    monkeypatch.setattr(corpus, "split_texts", lambda split, root=None: {split: ""})
    monkeypatch.setattr(corpus, "token_stream", lambda tokenizer, t: texts["train"])
    again = start(tmp_path / "parts", recipe)
    assert again.resume()
    with safe_open(again.directory / "state.safetensors", "pt") as file:
        assert int(file.metadata()["step"]) == again.step, "weights of one step, step number of another"
    again.train(QUIET)
    assert_same(state(again), state(whole))


def exported(run):
    return LlamaForCausalLM.from_pretrained(run.export()).state_dict()


@pytest.mark.parametrize("at", [3, 5, 7])
def test_what_is_exported_does_not_depend_on_interruptions(small_corpus, tmp_path, at):
    """With an unlikelihood stage the export is made from several saved states: an extra save must not count."""
    recipe = replace(TINY, steps=8, unlikelihood_steps=6, length=23 * 9, save_every=2)
    recipe = replace(recipe, shape=replace(TINY.shape, positions=256))
    whole = start(tmp_path / "whole", recipe)
    whole.train(QUIET)
    run = start(tmp_path / "parts", recipe)
    stop_before(run, at)
    with pytest.raises(RunInterrupted):
        run.train(QUIET)
    again = start(tmp_path / "parts", recipe)
    assert again.resume()
    again.train(QUIET)
    assert_same(state(again), state(whole))
    assert_same(exported(again), exported(whole))


def test_another_recipe_is_refused_by_what_differs(small_corpus, tmp_path):
    run = start(tmp_path)
    run.save()
    other = start(tmp_path, replace(TINY, lr=0.1, batch=3))
    with pytest.raises(ValueError, match="batch, lr"):
        other.resume()
    assert start(tmp_path, replace(TINY, steps=9)).resume(), "more steps of the same recipe are no other recipe"
    assert not start(tmp_path / "elsewhere").resume()


def test_training_learns_and_what_is_exported_can_be_loaded(small_corpus, tmp_path):
    run = start(tmp_path, replace(TINY, steps=30, layer_dropout=0.0, lr=2e-2, embedding_lr=2e-2))
    before = run.objective.evaluate()
    run.train(QUIET)
    after = run.objective.evaluate()
    assert after["heldout"] < before["heldout"] - 0.5 and after["exit_1"] < before["exit_1"]
    about = json.loads((run.directory / "state.json").read_text())
    assert about["step"] == 30 and about["recipe"]["steps"] == 30
    path = run.export()
    model, tokenizer = LlamaForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    assert model.dtype == torch.bfloat16 and tokenizer.padding_side == "left"
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    for name, weight in run.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight.to(torch.bfloat16))
    assert tokenizer.encode("def f1(a):") == run.tokenizer.encode("def f1(a):").ids


def test_unlikelihood_steps_train_too(small_corpus, tmp_path):
    recipe = replace(TINY, steps=4, unlikelihood_steps=2, length=23 * 9)
    recipe = replace(recipe, shape=replace(TINY.shape, positions=256))
    run = start(tmp_path, recipe)
    before = state(run)
    run.train(QUIET)
    assert run.step == 4 and math.isfinite(run.curve[-1]["train"])
    assert not torch.equal(before["model.norm.weight"], state(run)["model.norm.weight"])


def test_early_exits_and_layer_dropout_do_what_they_say():
    torch.manual_seed(0)
    model = LlamaForCausalLM(TINY.shape.config(0)).eval()
    ids = torch.randint(0, 300, (2, 9))
    forward = LayerSkipForward(model)
    with torch.no_grad():
        inner = model.model(ids, output_hidden_states=True)
        every = forward(ids, torch.ones(3, 2), torch.tensor([0, 1]))
        assert torch.allclose(every[-1], inner.last_hidden_state, atol=1e-5)
        for i in (0, 1):
            assert torch.allclose(every[i], model.model.norm(inner.hidden_states[i + 1]), atol=1e-5)
        keep = torch.tensor([[1.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
        dropped = forward(ids, keep, torch.tensor([0, 1]))
        assert torch.equal(dropped[:, 0], every[:, 0])
        assert torch.equal(dropped[1, 1], dropped[0, 1]) and not torch.allclose(dropped[2, 1], every[2, 1])


def test_schedules():
    assert layer_drop_rates(4, 0.1) == pytest.approx([0.1 * (2 ** (i / 3) - 1) for i in range(4)])
    assert layer_drop_rates(1, 0.1) == [0.0]
    for layers in (2, 3, 5, 12):
        seen = {exit_ for step in range(200) for exit_ in rotating_exits(step, layers)}
        assert seen == set(range(layers - 1)), "every early exit must be trained, the last layer is no early exit"
    recipe = replace(TINY, steps=100, warmup=10, decay_fraction=0.4)
    rates = [learning_rate(step, recipe) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9:60] == [1.0] * 51
    assert all(a >= b for a, b in itertools.pairwise(rates[60:])) and 0.02 <= rates[-1] <= 0.03
    recipe = replace(recipe, steps=140, unlikelihood_steps=40, unlikelihood_lr=0.3)
    assert [learning_rate(step, recipe) for step in range(100)] == rates, "what comes after must not change what was"
    tail = [learning_rate(step, recipe) for step in range(100, 140)]
    assert tail[0] == pytest.approx(0.3) and tail[-1] < 0.01 and min(tail) > 0


def test_recipes_are_complete():
    for name, recipe in RECIPES.items():
        shape = recipe.shape
        assert shape.width % shape.heads == 0 and shape.heads % shape.kv_heads == 0, name
        assert recipe.length <= shape.positions and recipe.unlikelihood_steps < recipe.steps
        assert recipe.teacher is None or recipe.teacher in RECIPES
        assert json.loads(json.dumps(asdict(recipe))), "a recipe is stored as JSON"


# ------------------------------------------------------------------------------------------------ unlikelihood


def naive_repeats(row, n):
    marked = [False] * len(row)
    for start_ in range(len(row) - n + 1):
        if any(row[start_ : start_ + n] == row[earlier : earlier + n] for earlier in range(start_)):
            marked[start_ : start_ + n] = [True] * n
    return marked


@settings(derandomize=True, max_examples=150, deadline=None)
@given(st.integers(1, 4), st.integers(0, 14), st.integers(1, 3), st.data())
def test_repeats_are_marked_as_by_loops(n, length, rows, data):
    tokens = [data.draw(st.lists(st.integers(0, 2), min_size=length, max_size=length)) for _ in range(rows)]
    mask = in_repeats(torch.tensor(tokens).view(rows, length), n)
    assert mask.tolist() == [naive_repeats(row, n) for row in tokens]


def small_model(scale=0.3):
    from transformers import LlamaConfig

    torch.manual_seed(2)
    shape = COMMON | {"initializer_range": scale, "tie_word_embeddings": True}
    return LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=2)).eval()


def test_unlikelihood_is_the_loss_of_the_loops():
    model = small_model()
    prefixes = torch.tensor([[3, 4, 5], [9, 9, 2], [20, 7, 40], [11, 2, 33]])
    new, n, end = 20, 2, model.config.eos_token_id
    tokens = greedy_continuations(model, prefixes, new)
    assert torch.equal(tokens, model.generate(prefixes, max_new_tokens=new, do_sample=False, pad_token_id=end)[:, 3:])
    total, count = 0.0, 0
    with torch.no_grad():
        for prefix, row in zip(prefixes, tokens.tolist(), strict=True):
            marked = naive_repeats(row, n)
            for i, token in enumerate(row):
                if token == end:
                    break
                count += 1
                if marked[i]:
                    ids = torch.tensor([[*prefix.tolist(), *row[:i]]])
                    out = model(ids, output_hidden_states=True)
                    p = float(out.logits[0, -1].softmax(-1)[token])
                    early = model.lm_head(model.model.norm(out.hidden_states[1][0, -1]))
                    total -= (1 - float(early.softmax(-1)[token])) * math.log(1 - min(p, 1 - 1e-4))
    loss = unlikelihood(model, prefixes, new, n).detach()
    assert total > 0, "nothing repeats: the case says nothing"
    assert float(loss) == pytest.approx(total / count, rel=1e-3)


def test_unlikelihood_makes_the_repeated_tokens_less_likely():
    model = small_model()
    prefixes = torch.tensor([[3, 4, 5], [9, 9, 2]])
    first = unlikelihood(model, prefixes, 24, 2)
    assert float(first.detach()) > 0
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(12):
        optimizer.zero_grad()
        loss = unlikelihood(model, prefixes, 24, 2)
        loss.backward()
        optimizer.step()
    assert float(unlikelihood(model, prefixes, 24, 2).detach()) < float(first.detach())


def test_nothing_repeated_costs_nothing():
    model = small_model()
    loss = unlikelihood(model, torch.tensor([[3, 4, 5]]), 3, 4)
    assert float(loss.detach()) == 0.0
    loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


# ------------------------------------------------------------------------------------------------ evaluation


def test_losses_are_the_cross_entropy_of_the_model_and_its_exits():
    model = small_model()
    stream = np.random.default_rng(0).integers(0, 61, 200).astype(np.uint16)
    found = evaluate.losses(model, stream, length=16, exits=(1, 2))
    windows = torch.from_numpy(corpus.windows(stream, 16, 0, 1).astype(np.int64))
    with torch.no_grad():
        out = model(windows[:, :-1], output_hidden_states=True)
        labels = windows[:, 1:].flatten()
        assert found["loss"] == pytest.approx(float(F.cross_entropy(out.logits.flatten(0, 1), labels)), rel=1e-5)
        early = model.lm_head(model.model.norm(out.hidden_states[1])).flatten(0, 1)
        assert found["exit_1"] == pytest.approx(float(F.cross_entropy(early, labels)), rel=1e-5)
        assert set(found) == {"loss", "exit_1", "exit_2"}


def test_agreement_is_a_share():
    model, other = small_model(), small_model(0.1)
    stream = np.random.default_rng(0).integers(0, 61, 400).astype(np.uint16)
    assert evaluate.agreement(model, model, stream, length=16) == 1.0
    assert evaluate.agreement(model, other, stream, length=16) < 0.5
