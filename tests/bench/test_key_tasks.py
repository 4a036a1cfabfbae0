"""Contexts that policies share: what a decision keeps of dense attention, and how questions are asked."""

from __future__ import annotations

import pytest
import torch

from pertoken.attend.random_keys import RandomKeys
from pertoken.attend.snapkv import SnapKV
from pertoken.attend.tokenselect import TokenSelect
from pertoken.bench import key_tasks
from pertoken.bench.claims import Bench
from pertoken.core.attach import attach
from pertoken.core.budget import Budget
from pertoken.zoo.recall import forced


@pytest.fixture(scope="module")
def bench():
    return Bench(quick=True)


def naive_mass(model, ids, policy, name):
    """Of every layer, the share of eager attention that falls on the keys of its decisions, a mean over heads and real
    queries of runs."""
    seen = []
    with attach(model, policy) as attached:
        decide = attached.decide
        attached.decide = lambda site, view: seen.append((view, decide(site, view))) or seen[-1][1]
        model(input_ids=ids, use_cache=False)
    found = []
    for view, decision in seen:
        rows, heads, runs, length, _ = view.queries.shape
        shares = torch.zeros(rows, heads, runs)
        for row in range(rows):
            for head in range(heads):
                kv = head * view.keys.shape[1] // heads
                for run in range(runs):
                    read = set(decision.index[row, min(kv, decision.index.shape[1] - 1), run].tolist())
                    real = [q for q in range(length) if view.runs.slots[row, run, q] >= 0]
                    for q in real:
                        upto = int(view.runs.slots[row, run, q]) + 1
                        scores = view.scale * view.keys[row, kv, :upto] @ view.queries[row, head, run, q]
                        law = scores.softmax(-1)
                        shares[row, head, run] += sum(float(law[k]) for k in range(upto) if k in read) / len(real)
        found.append(shares)
    return torch.stack(found)


@pytest.mark.parametrize("run", [1, 4])
def test_mass_is_that_of_the_definition(bench, run):
    model = key_tasks.loaded(bench, "code-draft")[0]
    ids = torch.randint(1, 4000, (2, 22), generator=torch.Generator().manual_seed(1))
    policy = RandomKeys(Budget(tokens=4), sinks=1, recent=2, run=run)
    with attach(model, policy) as attached, key_tasks.noted(attached) as seen, torch.no_grad():
        model(input_ids=ids, use_cache=False)
    with torch.no_grad():
        wanted = naive_mass(model, ids, policy, "random_keys")
    assert torch.tensor(seen).allclose(wanted.mean((1, 2, 3)), atol=1e-5)


def test_questions_by_themselves_are_answered_as_in_one_forward(bench):
    model = key_tasks.loaded(bench)[0]
    about = key_tasks.contexts(bench, "pairs", 300)
    dense = key_tasks.ask(bench, None, 300, ("pairs",)).right["pairs"][0]
    predict = forced(model)
    with torch.no_grad():
        for question, found in zip(about.questions[0], dense, strict=True):
            ids = torch.cat([about.ids[0], question])[None]
            places = torch.arange(ids.shape[1] - len(question) + about.before - 1, ids.shape[1] - 1)
            right = (predict(ids, places)[0] == question[about.before :]).all()
            assert bool(right) == bool(found)


def test_what_keeps_everything_answers_as_dense_attention(bench):
    dense = key_tasks.ask(bench, None, 300)
    for policy in (TokenSelect(Budget(fraction=1.0), positions="original"), SnapKV(Budget(tokens=400))):
        for in_hand in (False, True):
            found = key_tasks.ask(bench, policy, 300, in_hand=in_hand)
            assert all(torch.equal(found.right[task], dense.right[task]) for task in key_tasks.TASKS)
    assert key_tasks.ask(bench, None, 300).n == dense.n == 3 * 4


def test_shares_add_up():
    for keys in (64, 1000, 8192):
        given = key_tasks.parts(keys)
        assert given["sinks"] + given["recent"] + given["budget"].tokens == keys
        assert given["run"] <= given["recent"]


def test_sides_step_through_the_same_questions(bench):
    found = key_tasks.stepped(bench, {"dense": None, "all": TokenSelect(Budget(fraction=1.0))}, "pairs", 300)
    assert found["dense"].right == found["all"].right and len(found["dense"].right) == 4
    assert len(found["dense"].seconds) == len(found["all"].seconds) == 4 * 2
