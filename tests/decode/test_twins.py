"""The library's growth, draws, verification and DEL controller against the naive twins, and against exact laws."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from transformers import GenerationConfig

from pertoken.decode.del_ import Controller
from pertoken.decode.dyspec import BestFirst, DySpec
from pertoken.decode.growth import Economy, Growth, draw
from pertoken.decode.request import Request, Row
from pertoken.decode.tree import ROOT, Tree, TreeBatch, ancestor_mask
from pertoken.decode.verify import Greedy, Sampling, verify
from pertoken.models.timing import StepTime
from tests.decode import naive
from tests.decode.test_naive import argmax, random_law

torch.set_num_threads(1)
FAR = 10_000  # room enough for any tree


class LawDrafter:
    """Answers as a draft model whose distribution after `path` is `law(path)`, and remembers what it was asked."""

    def __init__(self, law, temperature=1.0):
        self.law, self.temperature = law, temperature
        self.calls, self.read = 0, []

    def begin(self):
        self.read = []

    def _logits(self, paths):
        p = torch.tensor(np.stack([self.law(path) for path in paths]))
        return (p.log() * self.temperature).float()

    def roots(self, rows):
        self.calls += 1
        return self._logits([()] * len(rows))

    def expand(self, rows, trees, places):
        self.calls += 1
        self.read += places
        return self._logits([path_of(trees[row], node) for row, node in places])


def path_of(tree, node):
    return tuple(tree.tokens[n] for n in tree.path(node))


def rows_of(count):
    return [Row(i, [0]) for i in range(count)]


def grow(drafter, size, *, ratio=1.0, sample=True, top=True, floor=0.0, rows=1, room=FAR, economy=None):
    rules = Growth(
        BestFirst(size, ratio),
        drafter,
        temperature=drafter.temperature,
        sample=sample,
        floor=floor,
        economy=economy,
    )
    if top:
        rules.sampler = "top"
    return rules.grow(rows_of(rows), [room] * rows)


def nodes(tree):
    return list(zip(tree.tokens, tree.parents, strict=True))


def p_value(counts, law):
    """Chi-square of observed counts (a dict) against exact probabilities (a dict), rare outcomes together."""
    assert set(counts) <= set(law), f"impossible outcomes: {set(counts) - set(law)}"
    total = sum(counts.values())
    assert math.isclose(sum(law.values()), 1.0, abs_tol=1e-9)
    observed, expected, rare = [], [], [0.0, 0.0]
    for outcome, probability in law.items():
        if probability * total >= 5:
            observed.append(counts.get(outcome, 0))
            expected.append(probability * total)
        else:
            rare[0] += counts.get(outcome, 0)
            rare[1] += probability * total
    if rare[1] > 0:
        observed.append(rare[0])
        expected.append(rare[1])
    observed, expected = np.array(observed), np.array(expected)
    return chisquare(observed, expected * observed.sum() / expected.sum()).pvalue


def count(outcomes):
    counts = {}
    for outcome in outcomes:
        counts[outcome] = counts.get(outcome, 0) + 1
    return counts


# ------------------------------------------------------------------------------------------------ growing


@pytest.mark.parametrize("temperature", [0.6, 1.0])
@pytest.mark.parametrize("seed", range(6))
def test_fixed_size_growth_is_the_naive_one_node_by_node(seed, temperature):
    law = random_law(300 + seed, 7, 0.5)
    for size in (1, 2, 9, 30):
        expected = naive.grow_greedy(law, size, argmax)
        (tree,) = grow(LawDrafter(law, temperature), size).trees
        assert nodes(tree) == [(node.token, node.parent) for node in expected]
        assert tree.values == pytest.approx([node.value for node in expected], rel=1e-4)


@pytest.mark.parametrize("sample", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_reading_several_places_at_once_saves_forwards_and_hardly_changes_the_tree(seed, sample):
    law = random_law(340 + seed, 6, 0.7)
    exact, batched = LawDrafter(law), LawDrafter(law)
    (one,) = grow(exact, 25, sample=sample, ratio=1.0).trees
    (other,) = grow(batched, 25, sample=sample, ratio=0.3).trees
    assert len(other) == len(one) == 25
    assert sum(other.values) >= 0.95 * sum(one.values)
    assert batched.calls < exact.calls, f"{batched.calls} draft forwards, one by one {exact.calls}"


def test_a_leaf_never_costs_a_draft_forward():
    drafter = LawDrafter(random_law(7, 8))
    (tree,) = grow(drafter, 20).trees
    parents = {parent for parent in tree.parents if parent != ROOT}
    assert {node for _, node in drafter.read} == parents
    assert len(parents) < 20


@pytest.mark.parametrize("seed", range(6))
def test_greedy_growth_takes_the_most_likely_paths_of_all(seed):
    """Greedy decoding may look at the draws before it chooses: the tree is then the `size` likeliest paths there
    are."""
    vocab, size = 3, 6
    law = random_law(400 + seed, vocab)
    every = {
        path: math.prod(float(law(path[:i])[t]) for i, t in enumerate(path))
        for depth in range(1, size + 1)
        for path in itertools.product(range(vocab), repeat=depth)
    }
    best = sorted(every, key=lambda path: -every[path])[:size]
    (tree,) = grow(LawDrafter(law), size, sample=False).trees
    found = [path_of(tree, n) for n in range(len(tree))]
    assert found == best
    assert tree.values == pytest.approx([every[path] for path in best], rel=1e-4)


def test_growth_breaks_ties_like_the_naive_one_and_skips_what_has_no_mass():
    half = lambda path: np.array([0.5, 0.5])  # noqa: E731
    (tree,) = grow(LawDrafter(half), 4).trees
    assert nodes(tree) == [(n.token, n.parent) for n in naive.grow_greedy(half, 4, argmax)]
    certain = lambda path: np.array([0.0, 1.0])  # noqa: E731
    for sample in (True, False):
        (tree,) = grow(LawDrafter(certain), 3, sample=sample).trees
        assert nodes(tree) == [(1, -1), (1, 0), (1, 1)]


def test_no_node_is_deeper_than_its_row_has_room_and_rows_do_not_mix():
    laws = [random_law(500 + i, 5, 0.4) for i in range(3)]

    class PerRow(LawDrafter):
        def roots(self, rows):
            return torch.cat([LawDrafter(law).roots([0]) for law in laws])

        def expand(self, rows, trees, places):
            return torch.cat([LawDrafter(laws[row]).expand(rows, trees, [(row, node)]) for row, node in places])

        def __init__(self):
            super().__init__(None)

    rules = Growth(BestFirst(20, 0.3), PerRow(), temperature=1.0, sample=False)
    rooms = [1, 3, FAR]
    trees = rules.grow(rows_of(3), rooms).trees
    for law, room, tree in zip(laws, rooms, trees, strict=True):
        (alone,) = grow(LawDrafter(law), 20, sample=False, ratio=0.3, room=room).trees
        assert nodes(tree) == nodes(alone)
        assert max(tree.depths) <= room
    assert max(trees[2].depths) > 3, "the limit must have been what held the others back"


@pytest.mark.parametrize("threshold", [0.3, 0.1, 0.02])
@pytest.mark.parametrize("seed", range(4))
def test_threshold_growth_is_the_naive_one_layer_by_layer(seed, threshold):
    law = random_law(600 + seed, 5)
    for sample in (True, False):
        expected = naive.grow_threshold(law, threshold, 1000, argmax, known=not sample)
        wanted = {naive.path_of(expected, i): node.value for i, node in enumerate(expected)}
        (tree,) = grow(LawDrafter(law), 1000, ratio=0.0, sample=sample, floor=threshold).trees
        found = {path_of(tree, n): value for n, value in enumerate(tree.values)}
        assert found.keys() == wanted.keys()
        assert found == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("sample", [True, False])
def test_threshold_growth_needs_one_draft_forward_per_level(sample, seed):
    law = random_law(700 + seed, 6, 0.6)
    drafter = LawDrafter(law)
    shape = DySpec(size=1000, threshold=0.02).shape()
    rules = Growth(shape, drafter, temperature=1.0, sample=sample, floor=0.02)
    (tree,) = rules.grow(rows_of(1), [FAR]).trees
    levels = 1 + max(depth for depth, value in zip(tree.depths, tree.values, strict=True) if value >= 0.02)
    assert drafter.calls <= levels, f"{drafter.calls} draft forwards for {levels} levels"


def test_threshold_growth_stops_at_the_cap():
    law = random_law(8, 6)
    (tree,) = grow(LawDrafter(law), 7, ratio=0.0, floor=0.001).trees
    assert len(tree) == 7


class Fork(Exception):
    pass


def tree_law(law, size):
    """Exact probability of every tree (as its nodes in drawn order) by running the naive growth down every draw."""
    found, open_ = {}, [((), 1.0)]
    while open_:
        script, probability = open_.pop()
        left, branches = list(script), []

        def choose(residual, place, left=left, branches=branches):
            if left:
                return left.pop(0)
            branches.extend((t, float(p)) for t, p in enumerate(residual) if p > 0)
            raise Fork

        try:
            tree = naive.grow_greedy(law, size, choose)
        except Fork:
            open_ += [((*script, t), probability * p) for t, p in branches]
        else:
            key = tuple((n.token, n.parent) for n in tree)
            found[key] = found.get(key, 0.0) + probability
    return found


def test_sampled_trees_have_the_naive_law():
    law, size, rows, rounds = random_law(11, 3, 2.0), 3, 40, 500
    torch.manual_seed(0)
    drawn = []
    for _ in range(rounds):
        grown = grow(LawDrafter(law), size, top=False, rows=rows, ratio=1.0)
        drawn += [tuple(nodes(tree)) for tree in grown.trees]
        for tree, laws in zip(grown.trees, grown.laws, strict=True):
            assert set(tree.parents) <= laws.keys(), "verification needs the law of every node with children"
    counts = count(drawn)
    exact = tree_law(law, size)
    assert len(exact) > 10 and p_value(counts, exact) > 1e-3
    shuffled = dict(zip(exact, list(exact.values())[1:] + list(exact.values())[:1], strict=True))
    assert p_value(counts, shuffled) < 1e-9, "the test must be able to fail"


def test_growth_stops_where_a_node_costs_more_than_it_saves():
    law = random_law(13, 6)
    free = StepTime((1, 100), (1.0, 1.0))
    dear = StepTime((1, 100), (1.0, 100.0))
    cheap = Economy(free, StepTime((1, 100), (1e-6, 1e-6)))
    assert len(grow(LawDrafter(law), 30, economy=cheap, sample=False).trees[0]) == 30
    assert len(grow(LawDrafter(law), 30, economy=Economy(dear, None), sample=False).trees[0]) <= 2
    slow_draft = LawDrafter(law)
    assert len(grow(slow_draft, 30, economy=Economy(free, StepTime((1, 2), (5.0, 5.0)))).trees[0]) == 0
    assert slow_draft.calls == 0, "a draft that cannot pay must not be run"


# ------------------------------------------------------------------------------------------------ drawing


@pytest.mark.parametrize("temperature", [0.6, 1.0])
@pytest.mark.parametrize("taken", [-1, 2])
def test_gumbel_draws_have_the_law_of_drawing_without_replacement(taken, temperature):
    vocab, trials = 4, 40_000
    logits = torch.tensor([0.3, -0.5, 1.1, 0.0])
    p = (logits.double() / temperature).softmax(-1).numpy()
    torch.manual_seed(1)
    drawn, log_p = draw(logits.expand(trials, -1), temperature, "gumbel", vocab, [taken] * trials)
    assert np.allclose(log_p[0].exp().numpy(), p, atol=1e-6), "the law must not be renormalised for what is taken"
    rest = [t for t in range(vocab) if t != taken]
    exact = {}
    for order in itertools.permutations(rest):
        probability, left = 1.0, sum(p[t] for t in rest)
        for token in order:
            probability *= p[token] / left
            left -= p[token]
        exact[order] = probability
    assert p_value(count(tuple(d.tokens) for d in drawn), exact) > 1e-3
    for d in drawn[:50]:
        assert d.chances == pytest.approx([p[t] for t in d.tokens], rel=1e-4)


def test_top_draws_are_the_most_likely_in_order_and_leave_out_what_is_taken():
    logits = torch.tensor([[0.0, 3.0, 2.0, -torch.inf], [5.0, 0.0, 1.0, 2.0]])
    drawn, _ = draw(logits, 1.0, "top", 4, [-1, 0])
    assert [d.tokens for d in drawn] == [[1, 2, 0], [3, 2, 1]]
    drawn, _ = draw(logits, 1.0, "top", 2, [1, -1])
    assert [d.tokens for d in drawn] == [[2, 0], [0, 3]]


# ------------------------------------------------------------------------------------------------ verifying


def request_for(rows, vocab, new=64, sample=True):
    adapter = SimpleNamespace(vocabulary=vocab, positions=4096)
    config = GenerationConfig(do_sample=sample, max_length=1 + new, pad_token_id=0)
    return Request(adapter, torch.zeros(rows, 1, dtype=torch.long), None, config, None, None)


def library_tree(tree):
    out = Tree()
    for node in tree:
        out.add(node.token, node.parent, node.value)
    return out


def logits_of(tree, target):
    paths = [(), *(path_of(tree, n) for n in range(len(tree)))]
    return torch.tensor(np.stack([target(path) for path in paths])).log().float()


def laws_of(tree, draft):
    return {
        parent: torch.tensor(draft(() if parent == ROOT else path_of(tree, parent))).float() for parent in tree.children
    }


def run_verify(tree, draft, target, rows, choice):
    vocab = len(target(()))
    logits = logits_of(tree, target).expand(rows, -1, -1)
    laws = laws_of(tree, draft)
    return verify(request_for(rows, vocab), [tree] * rows, [laws] * rows, logits, choice)


def outcome_law(tree, draft, target):
    """Exact law of the committed tokens for one given tree, by following the rejection rule down every branch."""
    found = {}

    def visit(node, path, probability):
        R, d = target(path).copy(), draft(path).copy()
        for child in naive.children_of(tree, node):
            token = tree[child].token
            accept = min(1.0, R[token] / d[token])
            visit(child, (*path, token), probability * accept)
            probability *= 1.0 - accept
            left = np.maximum(R - d, 0.0)
            R = left / left.sum() if left.sum() > 0 else R
            d[token] = 0.0
            d = d / d.sum() if d.sum() > 0 else d
        for token, p in enumerate(R):
            if p * probability > 0:
                found[(*path, token)] = found.get((*path, token), 0.0) + p * probability

    visit(ROOT, (), 1.0)
    return found


@pytest.mark.parametrize("seed", range(3))
def test_verification_of_a_given_tree_has_the_exact_law(seed):
    draft, target = random_law(20 + seed, 5, 2.0), random_law(30 + seed, 5, 2.0)
    rng = np.random.default_rng(seed)
    drawn = naive.grow_greedy(draft, 7, lambda residual, _: naive.inverse_cdf(residual, rng.random()))
    torch.manual_seed(seed)
    walks = run_verify(library_tree(drawn), draft, target, 20_000, Sampling())
    exact = outcome_law(drawn, draft, target)
    counts = count(tuple(walk.committed) for walk in walks)
    assert p_value(counts, exact) > 1e-3
    assert any(len(outcome) > 2 for outcome in counts), "some rows must accept more than one node"
    for walk in walks[:100]:
        assert [drawn[node].token for node in walk.path] == walk.committed[: len(walk.path)]
        assert len(walk.committed) == len(walk.path) + 1


def first_tokens(draft, target, sampler, rows, children, sure=None):
    """First committed token of `rows` rows whose roots have `children` drawn children, after a sure one if given."""
    vocab = len(target(()))
    logits = torch.tensor(draft(())).log().float()
    drawn, _ = draw(logits.expand(rows, -1), 1.0, sampler, children, [-1 if sure is None else sure] * rows)
    trees = []
    for draws in drawn:
        tree = Tree()
        if sure is not None:
            tree.add(sure, ROOT, sure=True)
        for token in draws.tokens:
            tree.add(token, ROOT)
        trees.append(tree)
    law = torch.tensor(draft(())).float()
    width = 1 + max(map(len, trees))
    scores = torch.tensor(target(())).log().float().expand(rows, width, vocab)
    walks = verify(request_for(rows, vocab, 1), trees, [{ROOT: law}] * rows, scores, Sampling())
    return count(walk.committed[0] for walk in walks)


@pytest.mark.parametrize("sure", [None, 0, 3])
@pytest.mark.parametrize("children", [1, 3, 5])
def test_multi_draft_rejection_gives_the_target_law(children, sure):
    draft, target = random_law(41, 6, 0.7), random_law(42, 6, 0.7)
    exact = {token: float(p) for token, p in enumerate(target(()))}
    torch.manual_seed(3)
    assert p_value(first_tokens(draft, target, "gumbel", 20_000, children, sure), exact) > 1e-3


def test_the_most_likely_children_in_place_of_samples_do_not_give_the_target_law():
    draft, target = random_law(41, 6, 0.7), random_law(42, 6, 0.7)
    exact = {token: float(p) for token, p in enumerate(target(()))}
    torch.manual_seed(3)
    assert p_value(first_tokens(draft, target, "top", 20_000, 3), exact) < 1e-9


def test_equal_laws_accept_the_first_child_always():
    law = random_law(43, 5)
    torch.manual_seed(4)
    drawn = naive.grow_greedy(law, 6, argmax)
    walks = run_verify(library_tree(drawn), law, law, 2000, Sampling())
    first = drawn[0].token
    assert all(walk.committed[0] == first for walk in walks)


@pytest.mark.parametrize("seed", range(20))
def test_greedy_verification_is_the_naive_one(seed):
    draft, target = random_law(60 + seed, 4), random_law(160 + seed, 4)
    rng = np.random.default_rng(seed)
    drawn = naive.grow_greedy(draft, 12, lambda residual, _: naive.inverse_cdf(residual, rng.random()))
    (walk,) = run_verify(library_tree(drawn), draft, target, 1, Greedy())
    path, final = naive.verify_greedy(drawn, target)
    assert walk.path == path
    assert walk.committed == [*(drawn[node].token for node in path), final]


@settings(derandomize=True, max_examples=100)
@given(st.data())
def test_masks_are_the_naive_ones(data):
    size = data.draw(st.integers(0, 9))
    parents = [data.draw(st.integers(-1, node - 1)) for node in range(size)]
    expected = naive.tree_mask(parents)
    width = size + data.draw(st.integers(0, 3))
    mask = ancestor_mask(parents, width)
    assert np.array_equal(mask[: size + 1, : size + 1], expected)
    assert not mask[: size + 1, size + 1 :].any(), "no node may see padding"
    assert mask.diagonal().all()
    tree = Tree()
    for parent in parents:
        tree.add(0, parent)
    batch = TreeBatch.of([tree, Tree()], torch.device("cpu"))
    assert batch.valid.sum(-1).tolist() == [size, 0]
    if size:
        assert np.array_equal(batch.allow[0].numpy(), expected)


# ------------------------------------------------------------------------------------------------ DEL's controller


@settings(derandomize=True, max_examples=150)
@given(st.data())
def test_del_controller_is_the_naive_one(data):
    layers, rows = data.draw(st.integers(2, 5)), data.draw(st.integers(1, 3))
    longest, omega = data.draw(st.integers(1, 8)), data.draw(st.sampled_from([0.5, 0.95, 1.0]))
    fast = Controller(rows, layers, longest, omega)
    slow = [naive.DelController(layers, longest, omega) for _ in range(rows)]
    for _ in range(data.draw(st.integers(0, 6))):
        row, columns = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(1, 6))
        drafted_at = data.draw(st.one_of(st.none(), st.integers(1, layers - 1)))
        bits = st.lists(st.booleans(), min_size=columns, max_size=columns)
        confidences = st.lists(st.floats(0.0, 1.0, width=32), min_size=columns, max_size=columns)
        match = [data.draw(bits) for _ in range(layers - 1)]
        confidence = [data.draw(confidences) for _ in range(layers - 1)]
        fast.update(row, np.array(match), np.array(confidence), drafted_at)
        tokens = [[7 if hit else 8 for hit in line] for line in match]
        slow[row].update(drafted_at or 1, tokens, confidence, [7] * columns, clip=drafted_at is not None)
    exits = range(1, layers)
    close = {"rtol": 1e-9, "atol": 1e-12}
    assert np.allclose(fast.counts[..., 0], [s.match for s in slow], **close)
    assert np.allclose(fast.counts[..., 1], [s.mismatch for s in slow], **close)
    assert np.allclose(fast.confidences[..., 0], [s.conf_match for s in slow], **close)
    assert np.allclose(fast.confidences[..., 1], [s.conf_mismatch for s in slow], **close)
    assert np.allclose(fast.alpha(), [[s.alpha(e) for e in exits] for s in slow], **close)
    for e in exits:
        assert np.allclose(fast.tau(e), [s.tau(e) for s in slow], **close)
    table = np.array([[[s.tpl(e, d) for d in range(longest + 1)] for e in exits] for s in slow])
    assert np.allclose(fast.tokens_per_layer(), table, **close)
    exit_layer, length = fast.select()
    total = table.sum(0)
    assert total[exit_layer - 1, length] == pytest.approx(total.max(), rel=1e-12)
    second = np.sort(total.flatten())[-2]
    if rows == 1 and total.max() > second * (1 + 1e-9):
        assert (exit_layer, length) == slow[0].select()
    keep = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=rows, unique=True))
    before = fast.alpha()
    fast.keep(keep)
    assert np.array_equal(fast.alpha(), before[keep])


def test_del_controller_breaks_ties_to_the_shallowest_and_shortest():
    assert Controller(2, 4).select() == (1, naive_best(Controller(1, 4)))
    wrong = Controller(1, 4)
    wrong.update(0, np.zeros((3, 2), dtype=bool), np.full((3, 2), 0.5), None)
    assert wrong.select() == (1, 0)


def naive_best(controller):
    twin = naive.DelController(controller.layers, controller.longest, controller.omega)
    return twin.select()[1]
