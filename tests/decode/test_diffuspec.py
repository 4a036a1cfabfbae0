"""DiffuSpec against its naive twin: one row at a time, nothing kept, every sum written out."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from pertoken.core.errors import BadRequest
from pertoken.decode.diffuspec import DiffuSpec, Length
from pertoken.decode.lattice import MaskDrafter, paths, pruned
from pertoken.decode.ngram import NGramCounts
from pertoken.decode.request import Row
from tests.decode.test_as_user import END, VOCABULARY, generate, llama, noisy, prompts

MASK = VOCABULARY


@pytest.fixture(scope="module")
def model():
    return llama()


@pytest.fixture(scope="module")
def drafter():
    """A random model that reads both ways, with one token more than the target: its mask."""
    other = llama(seed=5, layers=2, vocab_size=VOCABULARY + 1)
    other.config.is_causal, other.config.mask_token_id, other.config.prediction_shift = False, MASK, 1
    return other


@torch.no_grad()
def naive_laws(drafter, tokens, count):
    """Log-probabilities `[place, vocabulary]` from a whole forward in which everything sees everything."""
    ids = torch.tensor([[*tokens, *[MASK] * count]])
    both_ways = torch.zeros(1, 1, ids.shape[1], ids.shape[1])
    logits = drafter(ids, attention_mask=both_ways, use_cache=False).logits[0]
    return logits[len(tokens) - 1 : -1, :VOCABULARY].double().log_softmax(-1)


def naive_ngram(text, history, token, order, vocabulary):
    value = 1 / vocabulary
    for length in range(order):
        h = list(history[len(history) - length :]) if length else []
        if len(h) < length:
            break
        follows = [text[i + length] for i in range(len(text) - length) if list(text[i : i + length]) == h]
        if not follows:
            break
        kinds = len(set(follows))
        value = (follows.count(token) + kinds * value) / (len(follows) + kinds)
    return value


def naive_path(laws, text, settings):
    """The path of best mean score that a beam finds."""
    live, done, weight = [(0.0, [])], [], settings.weight
    for log_p in laws:
        order = sorted(range(VOCABULARY), key=lambda t: -float(log_p[t]))[: settings.candidates]
        kept, mass = [], 0.0
        for token in order:
            kept.append(token)
            mass += math.exp(float(log_p[token]))
            if mass >= settings.mass:
                break
        grown = []
        for total, path in live:
            for token in kept + ([] if END in kept else [END]):
                q = naive_ngram(text, [*text, *path], token, settings.order, VOCABULARY)
                grown.append((total + weight * float(log_p[token]) + (1 - weight) * math.log(q), [*path, token]))
        best = sorted(grown, key=lambda one: -one[0])[: settings.width]
        done += [one for one in best if one[1][-1] == END]
        live = [one for one in best if one[1][-1] != END]
        if END in kept or not live:
            break
    return max(done + live, key=lambda one: one[0] / len(one[1]))[1]


@torch.no_grad()
def naive(model, drafter, tokens, new, settings):
    """Drafts of every step, and the new tokens, of greedy decoding."""
    prompt, tokens, drafts, k = len(tokens), list(tokens), [], settings.longest
    history = []
    while len(tokens) < prompt + new and tokens[-1] != END:
        count = min(k, prompt + new - len(tokens) - 1)
        draft = []
        if count:
            laws = naive_laws(drafter, tokens, count)
            draft = naive_path(laws, tokens, settings)
            first = laws.argmax(-1).tolist()
            generated = first.index(END) if END in first else count
        drafts.append(draft)
        accepted = 0
        while True:
            token = int(model(torch.tensor([tokens])).logits[0, -1].argmax())
            tokens.append(token)
            if token == END or len(tokens) == prompt + new or accepted == len(draft) or draft[accepted] != token:
                accepted += accepted < len(draft) and draft[accepted] == token
                break
            accepted += 1
        if count:
            history.append((generated, accepted))
            weights = [settings.rho * (1 - settings.rho) ** i for i in range(len(history))][::-1]
            gen, acc = (sum(w * h[i] for w, h in zip(weights, history, strict=True)) / sum(weights) for i in (0, 1))
            more = settings.step if acc >= gen - 1e-9 else 0
            k = min(max(math.floor(gen + 1e-9) + more, settings.shortest), settings.longest)
    return drafts, tokens[prompt:]


SETTINGS = {
    "paper": {"shortest": 4, "longest": 7, "step": 3},
    "all candidates": {"shortest": 3, "longest": 6, "step": 2, "mass": 1.0, "candidates": 61, "weight": 0.2},
    "only the drafter": {"shortest": 2, "longest": 5, "step": 2, "weight": 1.0, "width": 1},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_draft_of_a_ragged_batch_is_that_of_the_naive_twin(model, drafter, name):
    decoder, inputs = DiffuSpec(drafter, **SETTINGS[name]), prompts()
    with decoder.record() as trace:
        out = generate(model, inputs, decoder)
    for row, (ids, mask) in enumerate(zip(*inputs.values(), strict=True)):
        drafts, new = naive(model, drafter, ids[mask.bool()].tolist(), 20, decoder)
        steps = [(step.decision, step.rows.index(row)) for step in trace.steps if row in step.rows]
        assert [one.tokens[at][one.valid[at]].tolist() for one, at in steps] == drafts
        assert out[row, inputs["input_ids"].shape[1] :][: len(new)].tolist() == new
    if name == "all candidates":
        assert decoder.stats.accepted > 0
    assert torch.equal(out, generate(model, inputs))


@pytest.mark.parametrize(
    "more", [{}, {"paths": 3}, {"refresh": None}, {"refresh": 3, "beyond": 4}, {"shortest": 40, "longest": 40}], ids=str
)
def test_greedy_ids_are_those_of_generate_whatever_is_drafted(model, drafter, more):
    inputs, decoder = prompts(), DiffuSpec(drafter, **more)
    assert torch.equal(generate(model, inputs, decoder, max_new_tokens=30), generate(model, inputs, max_new_tokens=30))
    assert decoder.stats.draft_calls <= decoder.stats.steps  # one forward per step, whatever the draft's length


def test_one_beam_of_the_drafter_alone_is_its_argmax(drafter):
    laws = naive_laws(drafter, [5, 9, 3], 6)
    best, tokens = laws.topk(15, -1)
    places = pruned(tokens.numpy(), best.numpy(), np.full((6, 0), 0.0), [], 0.8)
    ((_, path),) = paths(places, [5, 9, 3], (), NGramCounts(3, VOCABULARY), 1.0, 1)
    assert list(path) == laws.argmax(-1).tolist()


def test_a_wide_beam_finds_the_best_path_and_a_wider_one_no_worse():
    rng = np.random.default_rng(3)
    laws = np.log(rng.dirichlet(np.ones(4), 4))
    counts = NGramCounts(3, 4)
    counts.extend(rng.integers(0, 4, 60).tolist())
    places = [[(t, float(law[t])) for t in np.argsort(-law)] for law in laws]

    def score(path):
        before = [1, 2, *path]
        q = [math.log(counts.probability(tuple(before[i : i + 2]), before[i + 2])) for i in range(4)]
        return sum(0.5 * laws[i][t] + 0.5 * q[i] for i, t in enumerate(path)) / 4

    best = max(score(path) for path in itertools.product(range(4), repeat=4))
    found = [paths(places, [1, 2], (), counts, 0.5, width)[0] for width in (1, 2, 8, 64)]
    assert found[-1][0] / 4 == pytest.approx(best) == pytest.approx(score(found[-1][1]))
    sums = [total for total, _ in found]
    assert all(b >= a - 1e-12 for a, b in itertools.pairwise(sums))


def test_an_end_that_is_only_added_does_not_stop_the_lattice():
    tokens = np.array([[5, 6, 7], [5, 6, 7], [1, 5, 6], [5, 6, 7]])
    log_p = np.log(np.array([[0.7, 0.2, 0.05], [0.5, 0.4, 0.05], [0.9, 0.05, 0.03], [0.8, 0.1, 0.05]]))
    places = pruned(tokens, log_p, np.log(np.full((4, 1), 0.01)), [1], 0.8)
    assert [[t for t, _ in place] for place in places] == [[5, 6, 1], [5, 6, 1], [1]]


def test_counts_are_a_law_and_those_of_their_definition():
    rng = np.random.default_rng(0)
    text = rng.integers(0, 6, 80).tolist()
    grown, base = NGramCounts(3, 6), NGramCounts.fitted([text[:40], text[40:]], 6)
    for end in (10, 11, 50, 80):
        grown.extend(text[:end])
    adapted = NGramCounts(2, 6, base)
    adapted.extend(text[:20])
    for history in [(), (2,), (9, 9), *itertools.product(range(6), repeat=2)]:
        for one in (grown, base, adapted):
            assert sum(one.probability(history, t) for t in range(6)) == pytest.approx(1)
        for token in range(6):
            assert grown.probability(history, token) == pytest.approx(naive_ngram(text, history, token, 3, 6))


def test_length_keeps_up_from_the_first_step_and_falls_with_early_ends():
    length = Length(20, 30, 10, 0.5)
    for _ in range(5):  # all accepted: uncorrected means would fall to 25 at once
        length.update(30, 30)
        assert length.now == 30
    length.update(22, 3)
    assert length.now == 25  # (30 * 31 / 64 + 22 / 2) * 64 / 63 = 25.9
    for _ in range(9):
        length.update(2, 0)
    assert length.now == 20


def test_without_refresh_only_new_tokens_and_masks_are_computed(drafter):
    rows = [Row(0, [3, 4, 5, 6]), Row(1, [7, 8])]
    fresh, kept = (MaskDrafter(drafter, 2, 32, VOCABULARY, 0, refresh) for refresh in (1, None))
    with torch.inference_mode():
        assert torch.equal(fresh.read(rows, [3, 5]), kept.read(rows, [3, 5]))
        assert fresh.tokens == kept.tokens == 7 + 7
        rows = [Row(0, [3, 4, 5, 6, 9]), Row(1, [7, 8, 2, 3])]
        again = fresh.read(rows, [2, 0])
        assert kept.read(rows, [2, 0]).shape == again.shape and torch.isfinite(again[0]).all()
    assert fresh.tokens == 14 + 7 and kept.tokens == 14 + 3
    assert torch.allclose(again[0].double(), naive_laws(drafter, rows[0].tokens, 2), atol=1e-4)


@pytest.mark.parametrize("seen", [1, 3])
def test_sampling_with_paths_has_the_targets_law_and_the_papers_ratio_rule_has_not(seen):
    """Chi-square of two tokens over five; the control verifies the same path as if it were drawn from the drafter."""
    from scipy.stats import chisquare

    from pertoken.decode.diffuspec import DiffuSession

    target, other = llama(1, 2, vocab_size=5, eos_token_id=None), llama(2, 2, vocab_size=6, eos_token_id=None)
    for one in (target, other):
        one.lm_head.weight.data *= 0.15
    other.config.is_causal, other.config.mask_token_id = False, 5
    target.generation_config.eos_token_id = None
    prompt = torch.tensor([[1, 2, 3, 1, 2]])
    every = torch.cartesian_prod(torch.arange(5), torch.arange(5))
    with torch.no_grad():
        p = target(torch.cat([prompt.expand(25, -1), every], 1)).logits.double().softmax(-1)[:, 4:-1]
    law = p.gather(-1, every[..., None]).squeeze(-1).prod(-1)

    def p_value(decoder):
        torch.manual_seed(3)
        inputs = {"input_ids": prompt.expand(4000, -1), "attention_mask": torch.ones(4000, 5, dtype=torch.long)}
        out = generate(target, inputs, decoder, max_new_tokens=2, do_sample=True, top_k=0)
        codes = (out[:, -2:] * torch.tensor([5, 1])).sum(-1)
        assert decoder.stats.accepted > 0
        return chisquare(torch.bincount(codes, minlength=25).numpy(), (law * 4000).numpy()).pvalue

    decoder = DiffuSpec(other, paths=seen, mass=1.0)
    assert p_value(decoder) > 1e-3
    if seen == 1:
        plain = DiffuSession.propose

        def drawn(self):
            proposal = plain(self)
            q = self.drafter.read(self.request.active, [1 for _ in self.request.active])[:, 0].exp()
            for i, tree in enumerate(proposal.trees):
                tree.sure = [False for _ in tree.sure]
                proposal.laws[i] = {-1: q[i]} if len(tree) else {}
            return proposal

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DiffuSession, "propose", drawn)
            assert p_value(decoder) < 1e-3


def test_refusals_say_what_to_do(model, drafter):
    inputs = prompts()
    small = llama(seed=5, layers=2, vocab_size=50)
    small.config.is_causal, small.config.mask_token_id = False, 49
    short = llama(seed=5, layers=2, vocab_size=VOCABULARY + 1, max_position_embeddings=16)
    short.config.is_causal, short.config.mask_token_id = False, MASK
    for decoder, words in {
        DiffuSpec(): "needs a masked-diffusion model",
        DiffuSpec(noisy(model)): "no masked-diffusion model",
        DiffuSpec(small): "must be the drafter's first",
        DiffuSpec(short): "16 positions",
        DiffuSpec(drafter, shortest=5, longest=4): "shortest <= longest",
        DiffuSpec(drafter, mass=1.5): "no share",
        DiffuSpec(drafter, ngrams=NGramCounts(3, 7)): "vocabulary of 7",
    }.items():
        with pytest.raises(BadRequest, match=words):
            generate(model, inputs, decoder)
