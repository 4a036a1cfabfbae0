"""AdaDec against its naive twin, which reads the whole text again for every token it tries; and what it learns from."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pertoken.core.errors import BadRequest
from pertoken.decode.adadec import AdaDec, Threshold, fitted, learn_threshold, logistic
from pertoken.decode.random_pause import RandomPause
from tests.decode.test_as_user import Favour, generate, llama, prompts

THRESHOLD = 2.6


@pytest.fixture(scope="module")
def model():
    return llama()


@torch.no_grad()
def law(model, tokens, favour):
    """Raw entropy, and log-probabilities after the processor, of the token after these; float64."""
    raw = model(torch.tensor([tokens])).logits[0, -1].double()
    p = raw.softmax(-1)
    scores = favour(torch.tensor([tokens]), raw[None].float())[0].double() if favour else raw
    return float(-(p * p.log()).sum()), scores.log_softmax(-1)


def naive(model, tokens, new, threshold, beams, length, end=1, favour=None):
    """Loop over tokens, straight off the digest: new tokens, and how many places paused."""
    prompt, tokens, pauses = len(tokens), list(tokens), 0
    while len(tokens) < prompt + new:
        entropy, log_p = law(model, tokens, favour)
        token = int(log_p.argmax())
        if entropy >= threshold:
            pauses += 1
            best = -math.inf
            for candidate in log_p.topk(beams).indices.tolist():
                tried, total, rolled = [*tokens, candidate], float(log_p[candidate]), 0
                while rolled < length and tried[-1] != end and len(tried) < prompt + new:
                    _, after = law(model, tried, favour)
                    total, rolled = total + float(after.max()), rolled + 1
                    tried.append(int(after.argmax()))
                if total / (rolled + 1) > best:
                    best, token = total / (rolled + 1), candidate
        tokens.append(token)
        if token == end:
            break
    return tokens[prompt:], pauses


def rows_of(out, inputs, end=1):
    new = out[:, inputs["input_ids"].shape[1] :].tolist()
    return [row[: row.index(end) + 1] if end in row else row for row in new]


@pytest.mark.parametrize("favour", [None, Favour()], ids=["plain", "processed"])
@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize(("beams", "length"), [(3, 5), (2, 3), (4, 1)])
def test_ragged_rows_are_those_of_the_naive_twin(model, beams, length, reuse, favour):
    inputs = prompts()
    if favour:  # it looks at the two last tokens of the padded row
        inputs = {k: v[[0, 3]][:, -9:] for k, v in inputs.items()}
    decoder = AdaDec(THRESHOLD, beams=beams, length=length, reuse=reuse)
    out = generate(model, inputs, decoder, logits_processor=[favour] if favour else None)
    texts = [ids[mask.bool()].tolist() for ids, mask in zip(*inputs.values(), strict=True)]
    wanted = [naive(model, text, 20, THRESHOLD, beams, length, favour=favour) for text in texts]
    assert rows_of(out, inputs) == [tokens for tokens, _ in wanted]
    assert decoder.stats.pauses == sum(pauses for _, pauses in wanted) > 0
    plain = rows_of(generate(model, inputs, logits_processor=[favour] if favour else None), inputs)
    if (beams, length, favour) == (3, 5, None):
        assert decoder.stats.changed > 0 and [tokens for tokens, _ in wanted] != plain


@pytest.mark.parametrize(
    "decoder",
    [AdaDec(math.inf), AdaDec(0.0, beams=1), AdaDec(0.0, length=0), RandomPause(0.0)],
    ids=["never", "one candidate", "no lookahead", "no chance"],
)
def test_it_is_greedy_decoding_where_it_cannot_decide(model, decoder):
    inputs = prompts()
    assert torch.equal(generate(model, inputs, decoder), generate(model, inputs))


def test_reusing_the_continuation_saves_forwards_and_counts_are_exact(model):
    inputs = {k: v[:1] for k, v in prompts().items()}
    counts = {}
    for reuse in (True, False):
        decoder = AdaDec(THRESHOLD, reuse=reuse)
        generate(model, inputs, decoder)
        counts[reuse] = decoder.stats
    with_, without = counts[True], counts[False]
    assert with_.pauses == without.pauses > 0
    assert without.forwards == without.steps + without.draft_calls > with_.forwards
    assert without.steps == without.tokens and without.layer_loads == 3 * without.forwards
    assert without.tokens < without.token_forwards <= without.tokens + 15 * without.pauses


def test_random_pauses_do_not_depend_on_the_batch_and_come_at_their_rate(model):
    inputs, decoder = prompts(), RandomPause(0.3, seed=4)
    together = rows_of(generate(model, inputs, decoder, max_new_tokens=60), inputs)
    assert 0.15 < decoder.stats.pauses / decoder.stats.tokens < 0.45
    for row in range(5):
        kept = inputs["attention_mask"][row].bool()
        own = {k: v[row : row + 1, kept] for k, v in inputs.items()}
        assert rows_of(generate(model, own, decoder, max_new_tokens=60), own)[0] == together[row]


def test_logistic_regression_is_at_its_minimum_and_finds_a_known_slope():
    rng = np.random.default_rng(0)
    x = rng.exponential(1.0, 4000)
    y = rng.random(4000) < 1 / (1 + np.exp(1.7 * x - 2.0))
    a, b = logistic(torch.tensor(x), torch.tensor(y))
    assert abs(a + 1.7) < 0.15 and abs(b - 2.0) < 0.15

    def loss(a, b):
        p = 1 / (1 + np.exp(-(a * x + b)))
        return a * a / 2 - np.log(np.where(y, p, 1 - p)).sum()

    assert all(loss(a, b) < loss(a + da, b + db) for da, db in [(1e-3, 0), (-1e-3, 0), (0, 1e-3), (0, -1e-3)])
    slope, _, level, accuracy = fitted(torch.tensor(x), torch.tensor(y))
    assert slope < 0 and level * 100 == pytest.approx(round(level * 100)) and accuracy > 0.6


def test_a_threshold_is_learnt_kept_and_refused_with_another_model(model, tmp_path):
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(2, 61, (40, 4), generator=generator)
    torch.manual_seed(0)
    texts = model.generate(starts, max_new_tokens=40, do_sample=True, top_k=0, eos_token_id=None).tolist()
    found = learn_threshold(model, texts, given=4)
    assert found.steps == 40 * 40 and found.slope < 0 and 0 <= found.pauses <= 1
    found.save(tmp_path)
    assert Threshold.load(tmp_path) == found == Threshold.load(tmp_path / "adadec.json")
    inputs = prompts()
    assert torch.equal(generate(model, inputs, AdaDec(tmp_path)), generate(model, inputs, AdaDec(found.entropy)))
    with pytest.raises(BadRequest, match="learnt on the model with signature"):
        generate(llama(seed=2), inputs, AdaDec(tmp_path))
    with pytest.raises(BadRequest, match="too few of one kind"):
        fitted(torch.rand(50), torch.ones(50, dtype=torch.bool))


def test_refusals_say_what_to_do(model, tmp_path):
    inputs = prompts()
    with pytest.raises(BadRequest, match="learn_threshold"):
        generate(model, inputs, AdaDec(tmp_path / "none.json"))
    (tmp_path / "odd.json").write_text("[]")
    with pytest.raises(BadRequest, match="not a threshold"):
        generate(model, inputs, AdaDec(tmp_path / "odd.json"))
    with pytest.raises(BadRequest, match="do_sample=False"):
        generate(model, inputs, AdaDec(1.0), do_sample=True)
    with pytest.raises(BadRequest, match="at least 1 candidate"):
        generate(model, inputs, AdaDec(1.0, beams=0))
