"""The naive twins are themselves right: estimates, optimality by enumeration, exact output law, DEL arithmetic."""

import itertools
import math
import random

import numpy as np
import pytest
from scipy.stats import chisquare

from tests.decode import naive


def random_law(seed, vocab, concentration=1.0):
    """A memoised random conditional law over paths; every path has its own distribution, independent of call order."""
    cache = {}

    def law(path):
        if path not in cache:
            entropy = [seed, len(path), *path]
            cache[path] = np.random.default_rng(entropy).dirichlet([concentration] * vocab)
        return cache[path]

    return law


def sampler(uniform):
    return lambda residual, place: naive.inverse_cdf(residual, uniform())


def argmax(residual, place):
    return int(np.argmax(residual))


def shifted(law, prefix):
    return lambda path: law((*prefix, *path))


def closed_trees(draft, size):
    """Every tree of ``size`` nodes whose children are, at each node, the most probable tokens in descending order:
    all the trees the argmax chooser can grow. Each is a dict path -> number of children."""
    order = lambda path: np.argsort(-draft(path), kind="stable")  # noqa: E731
    found = {frozenset()}
    for _ in range(size):
        larger = set()
        for tree in found:
            for path in [(), *tree]:
                ranked = order(path)
                taken = sum((*path, int(t)) in tree for t in ranked)
                if taken < len(ranked):
                    larger.add(tree | {(*path, int(ranked[taken]))})
        found = larger
    return found


def all_trees(vocab, size):
    """Every prefix-closed set of ``size`` paths over ``vocab`` tokens."""
    found = {frozenset()}
    for _ in range(size):
        found = {
            tree | {(*path, t)}
            for tree in found
            for path in [(), *tree]
            for t in range(vocab)
            if (*path, t) not in tree
        }
    return found


def path_probability(draft, path):
    return math.prod(float(draft(path[:i])[path[i]]) for i in range(len(path)))


def reach_of_set(draft, tree):
    """Sum over the nodes of P[the walk tries this node] when siblings are tried in descending draft probability:
    P[parent accepted] * (1 - probability of the siblings before it)."""
    total = 0.0
    for path in tree:
        d = draft(path[:-1])
        before = sum(float(d[p[-1]]) for p in tree if p[:-1] == path[:-1] and d[p[-1]] > d[path[-1]])
        total += path_probability(draft, path[:-1]) * (1.0 - before)
    return total


@pytest.mark.parametrize("seed", range(8))
def test_values_leave_the_heap_in_falling_order_and_estimates_agree(seed):
    draft = random_law(seed, 6, 0.5)
    tree = naive.grow_greedy(draft, 12, sampler(random.Random(seed).random))
    assert len(tree) == 12
    reach = [node.reach for node in tree]
    assert all(a >= b for a, b in itertools.pairwise(reach))
    paths = [naive.path_of(tree, i) for i in range(len(tree))]
    assert len(set(paths)) == len(paths)
    for node, path in zip(tree, paths, strict=True):  # the telescoped form: P[path] is the product of the d's
        assert node.value == pytest.approx(path_probability(draft, path), rel=1e-9)
    assert naive.expected_length(tree) == pytest.approx(naive.expected_length_brute(draft, tree), rel=1e-9)


def test_greedy_tree_has_the_largest_sum_of_reaches_of_all_trees_the_chooser_can_grow():
    for seed in range(25):
        draft = random_law(100 + seed, 3)
        tree = naive.grow_greedy(draft, 4, argmax)
        paths = frozenset(naive.path_of(tree, i) for i in range(4))
        trees = closed_trees(draft, 4)
        assert paths in trees
        mine = sum(node.reach for node in tree)
        assert mine == pytest.approx(reach_of_set(draft, paths), rel=1e-9)
        assert mine == pytest.approx(max(reach_of_set(draft, t) for t in trees), rel=1e-9)


def test_greedy_tree_need_not_have_the_largest_expected_length():
    # The heap is ordered by what is known before a draw (is the place reached?). A place reached less often but with a
    # sharp law can hold the better node: here the root's second place (reached 0.4, then certain, so worth 0.4) loses
    # to the child place (reached 0.6, flat law, so worth 0.2).
    laws = {(): [0.6, 0.4, 0.0]}
    draft = lambda path: np.array(laws.get(path, [1 / 3, 1 / 3, 1 / 3]))  # noqa: E731
    tree = naive.grow_greedy(draft, 2, argmax)
    assert [naive.path_of(tree, i) for i in range(2)] == [(0,), (0, 0)]
    best = max(sum(path_probability(draft, p) for p in t) for t in all_trees(3, 2))
    assert best == pytest.approx(1.0)
    assert naive.expected_length(tree) == pytest.approx(0.8)


def test_greedy_breaks_ties_by_insertion_and_skips_an_empty_residual():
    half = lambda path: np.array([0.5, 0.5])  # noqa: E731
    tree = naive.grow_greedy(half, 4, argmax)
    assert [naive.path_of(tree, i) for i in range(4)] == [(0,), (1,), (0, 0), (1, 0)]
    certain = lambda path: np.array([0.0, 1.0])  # noqa: E731
    tree = naive.grow_greedy(certain, 3, argmax)
    assert [naive.path_of(tree, i) for i in range(3)] == [(1,), (1, 1), (1, 1, 1)]
    assert naive.expected_length(tree) == 3.0


@pytest.mark.parametrize("seed", range(5))
def test_threshold_at_the_last_popped_value_gives_the_greedy_tree(seed):
    draft = random_law(200 + seed, 5)
    greedy = naive.grow_greedy(draft, 15, argmax)
    layered = naive.grow_threshold(draft, greedy[-1].reach, 1000, argmax)
    key = lambda tree: sorted((naive.path_of(tree, i), node.value) for i, node in enumerate(tree))  # noqa: E731
    assert key(layered) == key(greedy)
    depths = [len(naive.path_of(layered, i)) for i in range(len(layered))]
    assert depths == sorted(depths)
    assert layered[:7] == naive.grow_threshold(draft, greedy[-1].reach, 7, argmax)


def two_token_counts(grow, draft, target, vocab, trials, uniform):
    """Counts of the first two tokens produced by whole speculative steps, a second step where the first gave one."""
    counts = np.zeros(vocab * vocab)
    for _ in range(trials):
        out = ()
        while len(out) < 2:
            d, t = (draft, target) if not out else (shifted(draft, out), shifted(target, out))
            tree = grow(d)
            accepted, final = naive.verify(tree, d, t, uniform)
            out = (*out, *(tree[i].token for i in accepted), final)
        counts[out[0] * vocab + out[1]] += 1
    return counts


def two_token_law(target, vocab):
    return np.array([target(())[a] * target((a,))[b] for a in range(vocab) for b in range(vocab)])


def test_grow_and_verify_reproduce_the_target_law_and_argmax_children_do_not():
    vocab, trials = 4, 20_000
    draft, target = random_law(1, vocab, 2.0), random_law(2, vocab, 2.0)
    law = two_token_law(target, vocab)

    uniform = random.Random(3).random
    counts = two_token_counts(
        lambda d: naive.grow_greedy(d, 4, sampler(uniform)), draft, target, vocab, trials, uniform
    )
    assert chisquare(counts, law * trials).pvalue > 1e-3

    uniform = random.Random(4).random
    few = trials // 10
    counts = two_token_counts(lambda d: naive.grow_greedy(d, 4, argmax), draft, target, vocab, few, uniform)
    assert chisquare(counts, law * few).pvalue < 1e-9


def test_threshold_growth_and_verify_reproduce_the_target_law():
    vocab, trials = 4, 4_000
    draft, target = random_law(5, vocab, 2.0), random_law(6, vocab, 2.0)
    uniform = random.Random(7).random
    counts = two_token_counts(
        lambda d: naive.grow_threshold(d, 0.3, 8, sampler(uniform)), draft, target, vocab, trials, uniform
    )
    assert chisquare(counts, two_token_law(target, vocab) * trials).pvalue > 1e-3


def chain_tree(tokens):
    return [naive.Node(token, i - 1, 0.0, 0.0) for i, token in enumerate(tokens)]


def test_verify_on_a_chain_is_the_ordinary_rejection_chain():
    for seed in range(200):
        draft, target = random_law(seed, 5), random_law(1000 + seed, 5)
        rng = random.Random(seed)
        tokens = []
        for _ in range(4):
            tokens.append(naive.inverse_cdf(draft(tuple(tokens)), rng.random()))
        q = [draft(tuple(tokens[:i])) for i in range(4)]
        p = [target(tuple(tokens[:i])) for i in range(5)]
        accepted, final = naive.verify(chain_tree(tokens), draft, target, random.Random(seed + 1).random)
        assert (len(accepted), final) == naive.rejection_chain(q, p, tokens, random.Random(seed + 1).random)
        assert accepted == list(range(len(accepted)))


def test_one_hot_target_makes_verify_greedy():
    for seed in range(100):
        draft, target = random_law(seed, 4), random_law(2000 + seed, 4)
        one_hot = lambda path, target=target: np.eye(4)[int(np.argmax(target(path)))]  # noqa: E731
        uniform = random.Random(seed).random
        tree = naive.grow_greedy(draft, 10, sampler(uniform))
        assert naive.verify(tree, draft, one_hot, uniform) == naive.verify_greedy(tree, target)


def test_verify_borderline_cases():
    calls = []

    def scripted(values):
        values = iter(values)

        def uniform():
            calls.append(next(values))
            return calls[-1]

        return uniform

    # A one-hot draft is exhausted by its only child; the second uniform draws the final token from the residual.
    draft = lambda path: np.array([1.0, 0.0, 0.0])  # noqa: E731
    target = lambda path: np.array([0.2, 0.3, 0.5])  # noqa: E731
    assert naive.verify(chain_tree([0]), draft, target, scripted([0.9, 0.3])) == ([], 1)
    # The order given: 0.2 is accepted at the ratio 0.2, then the leaf's bonus token comes from the target itself.
    assert naive.verify(chain_tree([0]), draft, target, scripted([0.2, 0.1])) == ([0], 0)
    # No target mass at the child: not accepted even at c = 0.
    assert naive.verify(chain_tree([0]), draft, lambda path: np.array([0.0, 0.0, 1.0]), scripted([0.0, 0.0])) == ([], 2)
    # A uniform beyond 1 forces the rejection that has probability zero when both laws are equal: R is kept.
    siblings = [naive.Node(0, -1, 0.0, 0.0), naive.Node(1, -1, 0.0, 0.0)]
    calls.clear()
    assert naive.verify(siblings, target, target, scripted([1.5, 0.9])) == ([], 2)
    assert calls == [1.5, 0.9]
    # An empty tree: one token from the target.
    assert naive.verify([], draft, target, scripted([0.45])) == ([], 1)
    assert naive.rejection_chain([], [target(())], [], scripted([0.45])) == (0, 1)


def test_tree_mask():
    mask = naive.tree_mask([-1, 0, -1, 1])
    expected = [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 0, 0, 1, 0],
        [1, 1, 1, 0, 1],
    ]
    assert mask.dtype == bool
    assert mask.astype(int).tolist() == expected
    assert naive.tree_mask([]).tolist() == [[True]]


def test_del_statistics_by_hand():
    control = naive.DelController(layers=4, gamma_max=3, omega=0.5)
    assert [control.alpha(e) for e in (1, 2, 3)] == [0.5] * 3
    assert [control.tau(e) for e in (1, 2, 3)] == [0.0] * 3
    target = [7, 8, 9]
    tokens = [[7, 0, 9], [7, 8, 0], [7, 8, 9]]
    conf = [[0.9, 0.2, 0.8], [0.6, 0.4, 0.1], [1.0, 1.0, 1.0]]
    assert control.update(1, tokens, conf, target, clip=True) == 2  # exit 1 is first wrong in column 1, which is kept
    assert (control.match, control.mismatch) == ([1, 2, 2], [1, 0, 0])
    assert control.tau(1) == pytest.approx(0.5 * (0.9 + 0.2))
    assert control.tau(2) == 0.0  # no mismatch yet
    assert control.update(2, tokens, conf, target, clip=False) == 3
    assert control.match == [2.5, 3.0, 4.0]
    assert control.mismatch == [1.5, 1.0, 0.0]
    assert control.alpha(1) == pytest.approx(2.5 / 4.0)
    assert control.tau(2) == pytest.approx(0.5 * ((0.5 * 1.0 + 1.0) / 3.0 + 0.1 / 1.0))
    assert control.tpl(1, 0) == pytest.approx(1 / 4)
    assert control.tpl(2, 3) == pytest.approx((1 - 0.75**4) / (1 - 0.75) / (4 + 3 * 2))
    assert control.tpl(3, 2) == pytest.approx(3 / 10)  # alpha = 1


def test_del_selection():
    control = naive.DelController(layers=8)
    one = lambda e, hit: control.update(e, [[hit]] * 7, [[0.5]] * 7, [1], clip=False)  # noqa: E731
    one(1, 1)
    assert control.select() == (1, 18)  # every exit always right: shallowest, longest, gamma_max included
    control = naive.DelController(layers=8)
    one(1, 0)
    assert control.select() == (1, 0)  # every exit always wrong: plain decoding
    assert control.tpl(*control.select()) == pytest.approx(1 / 8)
    for values in itertools.product([0, 1], repeat=3):  # against a table of the closed formula
        control = naive.DelController(layers=4, gamma_max=5)
        control.update(1, [[v, 1] for v in values], [[0.5, 0.5]] * 3, [1, 1], clip=False)
        table = {
            (e, d): sum(control.alpha(e) ** i for i in range(d + 1)) / (4 + d * e) for e in (1, 2, 3) for d in range(6)
        }
        assert table[control.select()] == pytest.approx(max(table.values()), rel=1e-12)
