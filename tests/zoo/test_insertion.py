"""The insertion objective against its definition: targets over all (slot, token), the loss and its gradient, rows."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from rich.console import Console
from torch.nn import functional as F

from pertoken.models.load import load
from pertoken.zoo import corpus
from pertoken.zoo.insertion import (
    Insertion,
    best_is_right,
    insertion_losses,
    marked,
    shortened,
    spread_levels,
    target_entropy,
)
from pertoken.zoo.recipe import RECIPES, Recipe, Shape
from pertoken.zoo.star_graphs import END, FIRST, KINDS, MARKER, StarGraphs, StarRecipe, trained
from pertoken.zoo.train import Run

torch.set_num_threads(1)
VOCABULARY, GAP = 11, 10
TINY = Recipe(
    Shape(layers=2, width=32, heads=2, kv_heads=1, ffn=48, vocab=301, positions=64),
    objective="insertion",
    steps=4,
    batch=4,
    length=24,
    warmup=2,
    evaluate_every=100,
    save_every=100,
)


def naive_batch(ids, kept, open_):
    """Per row: the shortened tokens, and the target as a dictionary {(slot, token): probability}."""
    rows = []
    for tokens, keeps, opens in zip(ids, kept, open_, strict=True):
        left, where, missing = [], [], []
        for token, keep, may in zip(tokens, keeps, opens, strict=True):
            if keep:
                left.append(token)
                where.append(may)
            else:
                missing.append((len(left) - 1, token))
        target = {}
        for pair in missing:
            target[pair] = target.get(pair, 0.0) + 1 / len(missing)
        rows.append((left, where, target))
    return rows


def naive_losses(scores, open_, targets):
    """Dense cross-entropy of scores `[row, slot, token]` over all open slots; 0 for an empty target."""
    losses = []
    for row, target in enumerate(targets):
        if not target:
            losses.append(scores.new_zeros(()))
            continue
        dense = torch.zeros_like(scores[row])
        for (slot, token), p in target.items():
            dense[slot, token] = p
        assert dense.sum() == pytest.approx(1.0)
        logits = scores[row].masked_fill(~open_[row][:, None], torch.finfo(scores.dtype).min)
        losses.append(-(dense * logits.flatten().log_softmax(-1).view_as(dense)).sum())
    return torch.stack(losses)


def example(seed=0, rows=6, length=13):
    """Rows with repeated tokens, padding, given tokens on both sides and one gap marker before each open run."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 5, (rows, length), generator=generator)
    valid = torch.arange(length) < torch.randint(6, length + 1, (rows, 1), generator=generator)
    open_ = torch.rand(rows, length, generator=generator) < 0.6
    open_[:, 0] = False
    return ids, valid, open_ & valid, generator


def test_a_marker_stands_before_each_run_of_open_tokens():
    ids, valid, open_, _ = example()
    out, real, may = marked(ids, valid, open_, GAP)
    for row in range(len(ids)):
        wanted = []
        for column in range(int(valid[row].sum())):
            if open_[row, column] and not open_[row, column - 1]:
                wanted.append((GAP, True))
            wanted.append((int(ids[row, column]), bool(open_[row, column])))
        found = [(int(t), bool(o)) for t, o, r in zip(out[row], may[row], real[row], strict=True) if r]
        assert found == wanted
        assert not real[row, len(wanted) :].any()


@pytest.mark.parametrize("multiple", [1, 8])
def test_shortened_rows_and_targets_are_those_of_the_definition(multiple):
    ids, valid, open_, generator = example()
    ids, valid, open_ = marked(ids, valid, open_, GAP)
    level = torch.tensor([0.0, 0.2, 0.5, 0.7, 0.9, 0.999])
    batch = shortened(ids, valid, open_, GAP, level, generator, multiple)
    total = (open_ & (ids != GAP)).sum(-1)
    assert batch.missing.tolist() == [int(share * (int(t) + 1)) for share, t in zip(level, total, strict=True)]
    assert batch.missing[0] == 0 and batch.missing[-1] == total[-1]
    assert batch.ids.shape[1] % multiple == 0
    for row in range(len(ids)):
        missing = [(int(s), int(t)) for r, s, t in zip(batch.row, batch.slot, batch.token, strict=True) if r == row]
        left = batch.ids[row, batch.valid[row]].tolist()
        assert all(bool(batch.open[row, slot]) for slot, _ in missing)
        rebuilt = []
        for slot, token in enumerate(left):
            rebuilt += [token, *[t for s, t in missing if s == slot]]
        assert rebuilt == ids[row, valid[row]].tolist()


def naive_stop(scores, row, batch):
    """Mean over the row's open slots of the surprise at whether something is missing right behind; token 0 says."""
    lacking = {int(s) for r, s in zip(batch.row, batch.slot, strict=True) if r == row}
    slots = batch.open[row].nonzero().flatten().tolist()
    return sum(F.softplus(scores[slot, 0] * (1.0 if slot in lacking else -1.0)) for slot in slots) / len(slots)


@pytest.mark.parametrize("stop_at", ["cls", "slots"])
def test_the_loss_and_its_gradient_equal_the_dense_definition(stop_at):
    ids, valid, open_, generator = example(1)
    ids, valid, open_ = marked(ids, valid, open_, GAP)
    level = torch.tensor([0.0, 0.3, 0.5, 0.7, 0.9, 0.999])
    batch = shortened(ids, valid, open_, GAP, level, generator)
    head = torch.nn.Linear(8, VOCABULARY, bias=False)
    hidden = torch.randn(*batch.ids.shape, 8, generator=generator)
    hidden[~batch.valid] = float("nan")
    targets = []
    for row in range(len(ids)):
        target = {}
        for r, s, t in zip(batch.row.tolist(), batch.slot.tolist(), batch.token.tolist(), strict=True):
            if r == row:
                target[s, t] = target.get((s, t), 0.0) + 1 / int(batch.missing[row])
        targets.append(target)
    assert any(p > 1 / n for target, n in zip(targets, batch.missing, strict=True) for p in target.values()), "repeats"
    results = []
    for naive in (True, False):
        states = hidden.clone().requires_grad_()
        head.zero_grad()
        if naive:
            scores = head(states.nan_to_num())
            if stop_at == "slots":
                stops = torch.stack([naive_stop(scores[row], row, batch) for row in range(len(ids))])
                scores = torch.cat([torch.full_like(scores[..., :1], -1e9), scores[..., 1:]], -1)
            else:
                stops = F.softplus(scores[:, 0, 0] * torch.where(batch.missing == 0, -1.0, 1.0))
            losses = naive_losses(scores, batch.open, targets)
        else:
            losses, stops, _ = insertion_losses(states, head, batch, 0, stop_at)
        (losses.sum() + 2 * stops.sum()).backward()
        results.append((losses.detach(), stops.detach(), states.grad[batch.valid], head.weight.grad.clone()))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert results[1][0][0] == 0.0 and (results[1][0][1:] > 0).all()
    entropy = [-sum(p * math.log(p) for p in target.values()) for target in targets]
    torch.testing.assert_close(target_entropy(batch), torch.tensor(entropy))


def test_naive_targets_agree_with_a_hand_made_case():
    ((left, where, target),) = naive_batch([[0, 9, 1, 1, 2, 3]], [[1, 1, 0, 0, 1, 0]], [[0, 1, 1, 1, 1, 1]])
    assert (left, where) == ([0, 9, 2], [0, 1, 1])
    assert target == {(1, 1): pytest.approx(2 / 3), (2, 3): pytest.approx(1 / 3)}


def test_the_best_pair_is_right_only_if_it_is_listed():
    ids = torch.tensor([[0, GAP, 1, 2], [0, GAP, 1, 2]])
    open_ = torch.tensor([[False, True, True, True]] * 2)
    batch = shortened(ids, open_ | True, open_, GAP, torch.tensor([0.4, 0.4]), torch.Generator().manual_seed(0))
    assert batch.missing.tolist() == [1, 1]
    scores = torch.zeros(int(batch.open.sum()), VOCABULARY)
    scores[int(batch.slot[0]) - 1, int(batch.token[0])] = 1.0  # of row 0, whose open slots are 1, 2, ...
    scores[int(batch.open[0].sum()) + int(batch.slot[1]) - 1, (int(batch.token[1]) + 1) % VOCABULARY] = 1.0
    assert best_is_right(scores, batch).tolist() == [True, False]


def test_levels_are_spread_evenly_and_the_number_missing_is_uniform():
    generator = torch.Generator().manual_seed(0)
    levels = torch.cat([spread_levels(10, generator) for _ in range(300)])
    assert (levels.view(300, 10).sort(-1).values.diff(dim=-1) - 0.1).abs().max() < 1e-5
    counts = torch.bincount((levels * 5).long(), minlength=5)  # T = 4
    assert counts.sum() == 3000 and (counts == 600).all()


@pytest.fixture
def run(monkeypatch, tmp_path):
    lines = [f"def f{i}(a, b):\n    return a * {i} + b[{i % 7}]\n\n" for i in range(120)]
    texts = {"train": {"t.py": "".join(lines)}, "heldout": {"h.py": "".join(lines[::-1])}}
    monkeypatch.setattr(corpus, "split_texts", lambda split, root=None: texts[split])
    monkeypatch.setattr("pertoken.zoo.rows.unit_tests", lambda count, seed: [("def f():\n", "    return 1\n")] * count)
    return Run("tiny", tmp_path / "tiny", TINY, compile_model=False)


def test_rows_open_what_is_not_given_and_lose_their_padding(run):
    objective, generator = run.objective, torch.Generator().manual_seed(0)
    assert isinstance(objective, Insertion)
    rows = torch.from_numpy(objective.rows(0)[:300].astype(np.int64))
    end = objective.data.end
    ids, valid, open_ = objective.opened(rows, generator)
    assert {bool(g > 1) for g in rows[:, 0]} == {True, False}
    runs = set()
    for row in range(len(rows)):
        given, wanted = int(rows[row, 0]), rows[row, 1:].tolist()
        wanted[0] = end
        while len(wanted) > 1 and wanted[-1] == end:
            wanted.pop()
        found, may = ids[row, valid[row]].tolist(), open_[row, valid[row]].tolist()
        assert [t for t in found if t != objective.mask] == wanted
        assert found[0] == end and not may[0]
        if given > 1 and given < len(wanted):
            assert found.index(objective.mask) == given and may == [False] * given + [True] * (len(may) - given)
        runs.add(found.count(objective.mask))
    assert {1, 2} <= runs
    parts = objective.parts(rows[:8], torch.full((8,), 0.5), generator)
    lengths = [part.valid.sum(-1).max() for part in parts]
    assert sum(len(part.ids) for part in parts) == 8 and lengths[0] <= lengths[1]


def test_a_run_learns_and_its_model_loads_as_an_insertion_model(run):
    before = run.objective.evaluate()
    run.train(Console(quiet=True))
    after = run.curve[-1]
    assert after["heldout"] < before["heldout"] and after["excess"] < after["heldout"]
    model, tokenizer = load(str(run.export()), "fp32")
    about = model.config
    assert about.is_causal is False
    assert (about.mask_token_id, about.stop_token_id) == (tokenizer.mask_token_id, tokenizer.eos_token_id)
    assert not any("stop" in name for name, _ in model.named_parameters())


def test_the_recipe_is_of_the_twins_size_and_start():
    mine, base = RECIPES["code-insertion-base"], RECIPES["code-diffusion-base"]
    assert (mine.shape, mine.start, mine.objective) == (base.shape, base.start, "insertion")
    last = RECIPES["code-insertion"]
    assert (last.start, last.tokenizer, last.few > 0) == ("code-insertion-base", "code-target", True)


def naive_is_path(prompt, answer, in_pairs):
    """Whether the answer goes along edges of the prompt from its start to its goal."""
    *edges, start, goal, marker = prompt[1:]
    assert marker == MARKER
    known = {tuple(edges[i : i + 2]) for i in range(0, len(edges), 2)}
    pairs = list(pairwise(answer))[:: 2 if in_pairs else 1]
    joined = all(a[1] == b[0] for a, b in pairwise(pairs))
    return set(pairs) <= known and joined and pairs[0][0] == start and pairs[-1][1] == goal


@pytest.mark.parametrize(
    "task",
    [
        StarGraphs(),
        StarGraphs(2, (4, 7), 20),
        StarGraphs(pairs=True),
        StarGraphs(2, (4, 7), 20, pairs=True),
        StarGraphs(4, (3, 5), 17, symmetric=True),
    ],
    ids=str,
)
def test_star_graphs_have_one_path_and_a_fork(task):
    graphs = task.sample(200, torch.Generator().manual_seed(0))
    lengths, ahead = set(), 0
    for row, answer in enumerate(graphs.answers):
        prompt = graphs.ids[row, graphs.valid[row] & ~graphs.answer[row]].tolist()
        assert naive_is_path(prompt, answer, task.pairs)
        path = [*answer[::2], answer[-1]] if task.pairs else answer
        edges = [tuple(prompt[i : i + 2]) for i in range(1, len(prompt) - 3, 2)]
        assert len(set(edges)) == len(edges) and min(min(e) for e in edges) >= FIRST
        sources = [u for u, _ in edges]
        fork = [u for u in set(sources) if sources.count(u) > 1]
        assert len(fork) == (task.degree > 1) and sources.count(fork[0]) == task.degree
        plan = len(path) - 1 - path.index(fork[0])
        assert plan >= 2, "at least two edges from the fork to the goal"
        ahead += path[0] != fork[0]
        lengths.add(len(path))
    low, high = task.arms
    assert lengths == ({high} if task.symmetric else set(range(low, high + 1)))
    assert (ahead == 0) == task.symmetric
    assert graphs.ids[~graphs.valid].eq(END).all() and not graphs.valid[:, -1].any()
    assert task.edges_right(graphs, graphs.answers).eq(1).all()
    assert task.edges_right(graphs, [[0] * len(a) for a in graphs.answers]).eq(0).all()


def test_prompts_are_left_padded_up_to_the_marker():
    graphs = StarGraphs().sample(9, torch.Generator().manual_seed(0))
    inputs = graphs.prompts
    for row in range(9):
        kept = inputs["attention_mask"][row].bool()
        found = inputs["input_ids"][row, kept].tolist()
        assert found + graphs.answers[row] == graphs.ids[row, graphs.valid[row]].tolist()
        assert found[-1] == MARKER and not kept[: int((~kept).sum())].any()


def test_a_task_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="13 names; there are 12"):
        StarGraphs(3, (3, 5), 12)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_star_model_learns_and_is_kept(kind, tmp_path):
    seen = []
    recipe = StarRecipe(kind, StarGraphs(2, (3, 3), 6), width=32, layers=2, heads=2, steps=120, batch=32, warmup=5)
    model = trained(recipe, tmp_path, lambda step, loss: seen.append((step, loss)))
    assert [step for step, _ in seen] == [1, 100] and seen[1][1] < 0.9 * seen[0][1]
    assert (getattr(model.config, "is_causal", True) is False) == (kind != "autoregressive")
    again = trained(recipe, tmp_path, lambda step, loss: pytest.fail("trained again"))
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), again.parameters(), strict=True))
    assert len(list(tmp_path.iterdir())) == 1
