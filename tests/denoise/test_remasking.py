"""Dream's ways of remasking as commit rules: against its sampler by the letter, and against their laws."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LogitsProcessorList

from pertoken.core.errors import BadRequest
from pertoken.denoise.dual_cache import DualCache
from pertoken.denoise.entropy import Entropy
from pertoken.denoise.loop import COMMIT, Denoise
from pertoken.denoise.margin import Margin
from pertoken.denoise.origin import Origin
from pertoken.denoise.pace import quotas, times
from pertoken.denoise.rules import Guess
from pertoken.denoise.schedule import Schedule
from pertoken.denoise.threshold import Threshold
from tests.denoise.conftest import END, MASK, alone, fill, prompts

RULES = {"maskgit_plus": Schedule(sharpened=True), "topk_margin": Margin(), "entropy": Entropy()}


def naive_score(alg, row):
    """One position's score by the letter, from its probabilities as a list."""
    ordered = sorted(row, reverse=True)
    if alg == "maskgit_plus":
        return ordered[0]
    if alg == "topk_margin":
        return ordered[0] - ordered[1]
    return sum(p * math.log(p) for p in row if p > 0)


@torch.inference_mode()
def naive_dream(model, prompt, length, steps, shift, alg):
    """Dream's `diffusion_generate` at temperature 0: one row, no blocks, one loop over positions. Ids and forwards that
    committed anything."""
    x = [*prompt, *[MASK] * length]
    t = [1 + (1e-3 - 1) * i / steps for i in range(steps + 1)]
    forwards = 0
    for step in range(steps):
        masked = [i for i, token in enumerate(x) if token == MASK]
        number = int(len(masked) * (1 - t[step + 1] / t[step])) if step < steps - 1 else len(masked)
        if not number:
            continue
        forwards += 1
        full = torch.zeros(1, 1, len(x), len(x))
        logits = model(torch.tensor([x]), attention_mask=full).logits[0].double()
        scores, tokens = {}, {}
        for i in masked:
            row = logits[i - shift].clone()
            row[MASK] = -torch.inf
            p = row.softmax(-1).tolist()
            scores[i], tokens[i] = naive_score(alg, p), max(range(len(p)), key=p.__getitem__)
        for i in sorted(masked, key=lambda i: (-scores[i], i))[:number]:
            x[i] = tokens[i]
    return x[len(prompt) :], forwards


@pytest.mark.parametrize("steps", [1, 5, 16, 40])
@pytest.mark.parametrize("alg", RULES)
@pytest.mark.parametrize("shift", [0, 1])
def test_is_dreams_sampler_by_the_letter(model, alg, steps, shift):
    inputs = prompts(7, 3, 12)
    decoder = Denoise(RULES[alg], block=None, steps=steps, pace="dream", shift=shift)
    out = fill(model, inputs, decoder)
    for row in range(3):
        prompt = alone(inputs, row)["input_ids"][0].tolist()
        ids, forwards = naive_dream(model, prompt, 16, steps, shift, alg)
        assert out[row].tolist() == ids
    assert decoder.stats.steps == forwards and decoder.stats.row_steps == 3 * forwards


@pytest.mark.parametrize(("size", "steps"), [(16, 16), (16, 5), (16, 40), (1, 3), (64, 64), (7, 7)])
def test_a_pace_commits_everything_and_names_no_idle_step(size, steps):
    grid = [1 - (1 - 1e-3) * i / steps for i in range(steps + 1)]
    even, dream = (quotas(pace, size, steps) for pace in ("even", "dream"))
    assert even.shape[1] == min(size, steps) and dream.shape[1] <= min(size, steps)
    for places in range(1, size + 1):
        left, by_the_letter = places, []
        for i in range(steps):
            count = left if i == steps - 1 else math.floor(left * (1 - grid[i + 1] / grid[i]))
            by_the_letter += [count] * (count > 0)
            left -= count
        shared = [places // steps + (i < places % steps) for i in range(min(places, steps))]
        for table, wanted in ((even, shared), (dream, by_the_letter)):
            assert sum(wanted) == places and min(wanted) >= 1
            assert table[places].tolist() == wanted + [wanted[-1]] * (table.shape[1] - len(wanted))
    assert not even[0].any() and not dream[0].any()


def test_the_steps_of_a_few_places():
    assert quotas("even", 16, 5)[16].tolist() == [4, 3, 3, 3, 3]
    assert quotas("even", 16, 5)[6].tolist() == [2, 1, 1, 1, 1]
    assert quotas("even", 16, 5)[3].tolist() == [1, 1, 1, 1, 1]


def test_more_steps_than_places_cost_no_forward(model):
    decoder = Denoise(Schedule(), block=None, steps=64, pace="dream")
    fill(model, prompts(4), decoder)
    assert decoder.stats.steps == quotas("dream", 16, 64).shape[1] <= 16


def test_an_unknown_pace_is_refused(model):
    with pytest.raises(BadRequest, match=r"pace='sine' is unknown; choose one of even, dream"):
        fill(model, prompts(4), Denoise(pace="sine"))  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", [*RULES.values(), Origin(3), Origin(3, steps=5)], ids=repr)
@pytest.mark.parametrize("refresh", [None, DualCache()], ids=["recompute", "dual_cache"])
def test_a_row_does_not_depend_on_its_batch(model, rule, refresh):
    inputs = prompts(7, 3, 12)
    chosen = {} if refresh is None else {"refresh": refresh}
    decoder = Denoise(rule, block=8, steps=8, **chosen)
    together = fill(model, inputs, decoder)
    assert not (together == MASK).any()
    assert len({tuple(row) for row in together.tolist()}) == 3
    for row in range(3):
        assert fill(model, alone(inputs, row), decoder)[0].tolist() == together[row].tolist()


# ---- what transformers' processors do to the scores


def guess_of(scores, tokens=None):
    scores = torch.tensor(scores)
    tokens = scores.argmax(-1) if tokens is None else torch.tensor(tokens)
    plain = torch.full(tokens.shape, 0.5, dtype=torch.float64)
    return Guess(scores, tokens, plain, torch.ones_like(tokens, dtype=torch.bool), torch.ones(len(tokens)).long())


def test_ranks_are_the_papers_formulas_on_the_processed_scores():
    inf = float("inf")
    scores = [[[2.0, 1.0, -inf, 0.0], [0.5, 0.5, -inf, -inf]], [[3.0, -inf, -inf, -inf], [0.25, 0.5, 0.75, 1.0]]]
    guess = guess_of(scores, [[1, 0], [0, 3]])
    for row, places in enumerate(scores):
        for place, logits in enumerate(places):
            total = sum(math.exp(v) for v in logits)
            p = [math.exp(v) / total for v in logits]
            for alg, rule in RULES.items():
                expected = p[int(guess.tokens[row, place])] if alg == "maskgit_plus" else naive_score(alg, p)
                assert float(rule.rank(guess)[row, place]) == pytest.approx(expected, abs=1e-12)
    assert Schedule().rank(guess).eq(0.5).all(), "LLaDA's rank is the probability before the processors"


class Watch:
    """A logits processor that keeps what it was given."""

    def __init__(self):
        self.seen = []

    def __call__(self, ids, scores):
        assert ids is None
        self.seen.append(scores.clone())
        return scores


def test_processors_get_every_undecided_place_of_every_row_and_no_text(model):
    inputs, watch = prompts(6, 10, 4), Watch()
    torch.manual_seed(0)
    fill(
        model,
        inputs,
        Denoise(block=8),
        do_sample=True,
        temperature=0.25,
        top_k=3,
        logits_processor=LogitsProcessorList([watch]),
    )
    undecided = [*range(8, 0, -1)] * 2
    assert [scores.shape for scores in watch.seen] == [(3 * n, model.config.vocab_size) for n in undecided]
    assert all(bool((scores[:, MASK] == -torch.inf).all()) for scores in watch.seen)


def law_of(model, inputs, temperature, top_p=1.0):
    """Probabilities of the one masked token behind the first row's prompt, by the definition of top-p."""
    canvas = torch.cat([inputs["input_ids"][:1], torch.tensor([[MASK]])], 1)
    full = torch.zeros(1, 1, canvas.shape[1], canvas.shape[1])
    with torch.no_grad():
        logits = model(canvas, attention_mask=full).logits[0, -1].double()
    logits[MASK] = -torch.inf
    p = (logits / temperature).softmax(-1)
    kept, total = torch.zeros_like(p), 0.0
    for i in p.argsort(descending=True).tolist():
        if total < top_p:
            kept[i] = p[i]
        total += float(p[i])
    return kept / kept.sum()


@pytest.mark.parametrize(("temperature", "top_p"), [(0.5, 1.0), (1.0, 0.6), (2.0, 0.9)])
def test_a_batch_samples_the_law_of_temperature_and_top_p(model, temperature, top_p):
    from scipy.stats import chisquare

    count = 3000
    inputs = {name: value.expand(count, -1) for name, value in prompts(5).items()}
    torch.manual_seed(1)
    options = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    out = fill(model, inputs, Denoise(block=1), length=1, **options).flatten()
    law = law_of(model, prompts(5), temperature, top_p)
    drawn = torch.bincount(out, minlength=len(law)).double()
    assert drawn[law == 0].sum() == 0

    def p_value(expected):
        common = expected * count >= 5
        seen = torch.cat([drawn[common], drawn[~common].sum()[None]])
        wanted = torch.cat([expected[common], expected[~common].sum()[None]]) * count
        kept = wanted > 0
        return chisquare(seen[kept].numpy(), (wanted[kept] * seen[kept].sum() / wanted[kept].sum()).numpy()).pvalue

    assert p_value(law) > 1e-3
    if temperature != 1.0:
        assert p_value(law_of(model, prompts(5), temperature**2, 1.0)) < 1e-6, "temperature must not act twice"


def test_the_confidence_is_that_of_the_model_not_of_the_processed_scores(model):
    """With top-k 1 the processed scores are certain everywhere; the threshold must not see that."""
    inputs = prompts(6, 10)
    greedy, sampled = Denoise(Threshold(0.3), block=8), Denoise(Threshold(0.3), block=8)
    expected = fill(model, inputs, greedy)
    assert fill(model, inputs, sampled, do_sample=True, top_k=1, temperature=0.1).equal(expected)
    assert sampled.stats.steps == greedy.stats.steps > 2


@pytest.mark.parametrize("option", [{"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}, {"min_length": 20}])
def test_a_processor_that_reads_the_text_is_refused_by_name(model, option):
    with pytest.raises(BadRequest, match=r"(Repetition|NoRepeat|MinLength).*asks for the text so far"):
        fill(model, prompts(6, 10), Denoise(block=8), eos_token_id=END, **option)


# ---- drawing the places


@pytest.mark.parametrize("rule", [Schedule(alg_temp=0.3), Margin(alg_temp=0.3), Entropy(alg_temp=0.7)], ids=repr)
def test_alg_temp_draws_places_without_replacement_from_the_softmax_of_ranks(rule):
    rows = 20000
    torch.manual_seed(2)
    scores = torch.tensor([[[2.0, 0.0, -1.0], [1.0, 0.9, 0.0], [3.0, -2.0, 0.0], [0.0, 0.0, 0.0]]])
    masked = torch.tensor([[True, True, True, False]])
    plain = scores.double().softmax(-1).amax(-1)
    guess = Guess(scores, scores.argmax(-1), plain, masked, torch.tensor([2]))
    weight = (rule.rank(guess)[0, :3] / rule.alg_temp).exp()
    weight = weight / weight.sum()
    pairs = {}
    for i in range(3):
        for j in range(3):
            if i != j:
                key = tuple(sorted((i, j)))
                pairs[key] = pairs.get(key, 0.0) + float(weight[i] * weight[j] / (1 - weight[i]))
    many = Guess(*(v.expand(rows, *v.shape[1:]) for v in (scores, guess.tokens, plain, masked, torch.tensor([2]))))
    chosen = rule.choose(many, None)  # type: ignore[arg-type]
    assert chosen[:, 3].sum() == 0 and chosen.sum(-1).eq(2).all()
    for (i, j), p in pairs.items():
        share = float((chosen[:, i] & chosen[:, j]).double().mean())
        assert share == pytest.approx(p, abs=4.5 * math.sqrt(p * (1 - p) / rows) + 1e-9)


def test_a_tiny_alg_temp_is_no_draw_and_a_negative_one_is_refused(model):
    inputs = prompts(6, 10)
    plain, drawn = Denoise(Margin(), block=8, steps=4), Denoise(Margin(alg_temp=1e-12), block=8, steps=4)
    torch.manual_seed(0)
    assert fill(model, inputs, plain).equal(fill(model, inputs, drawn))
    with pytest.raises(BadRequest, match=r"alg_temp=-1"):
        Entropy(alg_temp=-1)


# ---- independent flips


def flip_steps(seed, length, steps):
    from pertoken.denoise.canvas import Canvas

    canvas = Canvas.of(torch.ones(1, 2, dtype=torch.long), torch.ones(1, 2), length, length, MASK)
    return Origin(seed, steps).flips(canvas)[2:]


def test_origin_flips_each_position_by_itself_with_dreams_probabilities():
    length, steps, rounds = 6, 5, 4000
    found = torch.stack([flip_steps(seed, length, steps) for seed in range(rounds)])
    t = times(steps).tolist()
    assert t[0] == 1 and t[-1] == pytest.approx(1e-3)
    alive = 1.0
    for step in range(steps):
        flips = 1 - t[step + 1] / t[step] if step < steps - 1 else 1.0
        p = alive * flips
        alive -= p
        share = (found == step).double().mean(0)
        assert (share - p).abs().max() < 4.5 * math.sqrt(p * (1 - p) / rounds)
    together = ((found[:, 0] == 0) & (found[:, 1] == 0)).double().mean()
    assert together == pytest.approx((1 - t[1]) ** 2, abs=4.5 * math.sqrt(0.04 / rounds))


def test_origin_commits_by_flip_step_and_skips_the_idle_ones(model):
    decoder, steps = Denoise(Origin(4), block=None, steps=12), []
    with decoder.record() as trace:
        fill(model, prompts(5), decoder)
    flips = flip_steps(4, 16, 12).tolist()
    for step in trace.at(COMMIT):
        columns = (step.decision.keep[0].nonzero().flatten() - 5).tolist()
        steps.append(sorted({flips[c] for c in columns}))
    assert steps == [[s] for s in sorted(set(flips))]
