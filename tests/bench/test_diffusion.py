"""Cost at equal agreement, agreement up to the end, and quality without a reference, on cases known by hand."""

from __future__ import annotations

import math
import random

import pytest
import torch

from pertoken.bench import diffusion
from pertoken.bench.answers import judge, likeness, parses, passes, true_lines
from pertoken.bench.claims import Bench
from pertoken.bench.diffusion import Loaded, Point, Task, agreement, agreement_at, cost_at, counted, front
from pertoken.bench.dkv_cache import Changes, NoDelay, RandomRefresh, followed, same_guesses
from pertoken.bench.learn2pd import by_the_letter
from pertoken.denoise.dkv_cache import DKVCache
from pertoken.denoise.loop import REFRESH, Denoise
from pertoken.zoo.unit_tests import unit_tests
from tests.bench import toys

torch.set_num_threads(1)
MASK = 256  # the toy tokenizer's last byte, which no prompt here has
PROMPT = "def add(a, b):\n    return a + b\n\n\n# tests\n"


def test_true_tests_are_told_from_false_and_foreign_ones():
    good = "assert add(1, 2) == 3\nassert add(0, 20) == 20\n"
    assert true_lines(PROMPT, good) == (2, 2) and passes(PROMPT, good)
    for wrong in (
        "assert add(1, 2) == 4\n",
        "assert add(1, 2) != 3\n",
        "assert add(1, 2)\n",
        "assert add(1, 2) == 3 == 3\n",
        "assert sub(1, 2) == 3\n",
        "assert add(1) == 1\n",
        "assert add(1, 'x') == 3\n",
        "assert add(a=1, b=2) == 3\n",
        "assert add(*[1, 2]) == 3\n",
        "assert add(1, 2) == open('x')\n",
        "assert add([0] * 9, []) == [0]\n",
        "add(1, 2)\n",
        "assert add(1, 2 == 3\n",
        "import os\n",
    ):
        assert true_lines(PROMPT, wrong) == (0, 1), wrong
        assert not passes(PROMPT, good + wrong)
    assert not passes(PROMPT, good[:-1]), "the last line has not ended"
    assert not passes(PROMPT, "")


def test_no_number_is_too_large_to_try():
    prompt = "def repeat(word, n):\n    return word * n\n\n\n# tests\n"
    assert true_lines(prompt, "assert repeat('ab', 2) == 'abab'\nassert repeat('ab', 10000000000) == 'ab'\n") == (1, 2)


def test_every_test_that_the_corpus_makes_is_true():
    for prompt, answer in unit_tests(60, seed=3, languages=("python",)):
        assert passes(prompt, answer), (prompt, answer)


def test_quality_is_a_mean_over_answers():
    found = judge([PROMPT] * 2, ["assert add(1, 2) == 3\n", "assert ("], ["assert add(1, 2) == 3\n"] * 2, True)
    assert (found.tests, found.lines, found.parses) == (0.5, 0.5, 0.5)
    assert found.likeness == (1 + likeness("assert (", "assert add(1, 2) == 3\n")) / 2
    assert math.isnan(judge(["def f():\n"], ["    pass\n"], ["    pass\n"], False).tests)
    assert parses("def f():\n    pass\n") and not parses("def f():\n") and not parses("x = \0")


def test_agreement_counts_up_to_the_later_end():
    one = torch.tensor([[5, 6, 0, 0, 0, 0], [5, 6, 7, 8, 9, 9]])
    other = torch.tensor([[5, 7, 8, 0, 0, 0], [5, 6, 7, 8, 9, 9]])
    found = agreement(one, other)
    assert found.positions == (2 + 6) / (4 + 6) and found.rows == 0.5
    assert agreement(one, other, end=None).positions == (1 + 3 + 6) / 12
    assert counted(one, 0).tolist() == [5, 6, 0, 5, 6, 7, 8, 9, 9]


def naive_cost(points, level):
    """The cheapest mixture of any two points that reaches the level."""
    best = math.inf
    for a in points:
        for b in points:
            if a.agreement >= level:
                best = min(best, a.steps)
            if a.agreement < level <= b.agreement and a.steps <= b.steps:
                share = (level - a.agreement) / (b.agreement - a.agreement)
                best = min(best, a.steps * (1 - share) + b.steps * share)
    return best


def point(steps, agreement):
    return Point("", steps, 10 * steps, agreement, 0.0)


def test_the_front_leaves_out_what_another_beats():
    points = [point(8, 0.9), point(2, 0.5), point(4, 0.4), point(8, 0.8), point(16, 1.0)]
    assert [p.steps for p in front(points)] == [2, 8, 16]
    assert cost_at(points, 0.7) == pytest.approx(5) and cost_at(points, 0.95, "forwards") == pytest.approx(120)
    assert cost_at(points, 0.1) == 2 and cost_at(points[:4], 0.95) == math.inf
    assert agreement_at(points, 5) == pytest.approx(0.7) and agreement_at(points, 99) == 1.0
    assert agreement_at(points, 1) == -math.inf and agreement_at(points, 120, "forwards") == pytest.approx(0.95)


@pytest.mark.parametrize("seed", range(5))
def test_cost_and_agreement_are_each_others_inverse(seed):
    rng = random.Random(seed)
    points = [point(rng.randint(1, 50), rng.random()) for _ in range(6)]
    best = front(points)
    for level in (best[0].agreement, (best[0].agreement + best[-1].agreement) / 2, best[-1].agreement):
        cost = cost_at(points, level)
        assert agreement_at(points, cost) == pytest.approx(level)
        assert cost >= naive_cost(points, level) - 1e-9


@pytest.fixture(scope="module")
def about():
    model = toys.model()
    model.config.is_causal, model.config.mask_token_id, model.config.prediction_shift = False, MASK, 1
    return Loaded(model, toys.tokenizer())


TASK = Task("toys", ("def f(", "x", "return [1, 2"), ("a)", "b", "]"), 16)


def test_decoding_counts_and_remembers(about):
    bench, decoder = Bench(), Denoise(block=8, steps=4)
    out = diffusion.decode(bench, TASK, decoder, use=about, batch=2)
    assert out.ids.shape == (3, 16) and len(out.texts) == 3
    assert diffusion.decode(bench, TASK, decoder, use=about, batch=2) is out
    exact = diffusion.reference(bench, TASK, 8, use=about)
    lengths = about.batch(TASK.prompts)["attention_mask"].sum(-1)
    assert exact.steps == 16 and exact.token_forwards == 16 * int((lengths + 16).sum())
    assert out.steps == 4 and out.row_steps == 12 and out.calls == 8
    (found,) = diffusion.points(bench, TASK, {"low": decoder}, 8, use=about, batch=2)
    alike = agreement(out.ids, exact.ids)
    figures = (out.steps, out.forwards, alike.positions, alike.rows)
    assert found.plain == ["low", *(round(figure, 4) for figure in figures)] and alike.positions < 1


def test_the_reference_is_lladas_sampler_by_the_letter(about):
    out = diffusion.reference(Bench(), TASK, 8, use=about, eos_token_id=None)
    inputs = about.batch(TASK.prompts)
    with torch.inference_mode():
        for row, ids in enumerate(inputs["input_ids"]):
            prompt = ids[inputs["attention_mask"][row].bool()]
            assert by_the_letter(about.model, prompt, 16, 8, 16) == out.ids[row].tolist()


def test_a_side_counts_tokens_up_to_the_end(about):
    work = diffusion.side(about, "plain", Denoise(block=8), 16).work
    inputs = about.batch(TASK.prompts)
    whole = diffusion.side(about, "whole", Denoise(block=8), 16, eos_token_id=None).work(inputs)
    assert work(inputs).ndim == 1 and len(work(inputs)) <= whole.numel() == 48


def test_without_the_delay_a_decided_position_is_not_computed_again(about):
    inputs, computed = about.batch(["abc"]), {}
    for name, rule in {"late": DKVCache(100), "at once": NoDelay(100)}.items():
        decoder = Denoise(refresh=rule, block=16, shift=0)
        with decoder.record() as trace:
            about.model.generate(**inputs, max_new_tokens=16, do_sample=False, custom_generate=decoder)
        computed[name] = [int(step.decision.spent().sum()) for step in trace.at(REFRESH)]
    assert computed["late"][:2] == [19, 19] and computed["at once"][:2] == [19, 15]
    assert computed["late"][2:] == [n + 1 for n in computed["at once"][2:]]


def test_guesses_are_compared_along_the_uncached_run(about):
    bench, task = Bench(), TASK.on(32)
    bench.cache["diffusion", diffusion.MODEL, "fp32"] = about
    assert same_guesses(bench, task, DKVCache(1)) == 1.0
    late, at_once = (same_guesses(bench, task, rule) for rule in (DKVCache(32), NoDelay(32)))
    assert late < 1 and at_once < 1
    run = followed(bench, task)
    for (_, masked, chosen), (_, same_masked, same_chosen) in zip(run, followed(bench, task, NoDelay(32)), strict=True):
        assert torch.equal(masked, same_masked) and torch.equal(chosen, same_chosen)
    assert sum(int(chosen.sum()) for _, _, chosen in run) == 3 * 32


def test_the_random_control_computes_as_many_positions(about):
    inputs, counts = about.batch(["abc", "de"]) | {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None}, {}
    for name, rule in {"rule": DKVCache(4), "random": RandomRefresh(4)}.items():
        decoder = Denoise(refresh=rule, block=16, shift=0)
        with decoder.record() as trace:
            about.model.generate(**inputs, custom_generate=decoder)
        counts[name] = [step.decision.spent().sum(-1).tolist() for step in trace.at(REFRESH)]
    assert counts["rule"] == counts["random"]


def test_what_moves_is_what_was_decided(about):
    rule = Changes()
    diffusion.decode(Bench(), TASK, Denoise(refresh=rule, block=8), use=about)
    moved, decided = (torch.cat(parts) for parts in zip(*rule.moved, strict=True))
    assert int(decided.sum()) == 3 * 15, "every position but those decided at the last step is read once more"
    assert moved[decided].mean() > moved[~decided].mean()
