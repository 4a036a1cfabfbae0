import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pertoken.core import signals

seeds = st.integers(0, 2**31)
widths = st.integers(1, 40)
scales = st.sampled_from([0.0, 0.1, 1.0, 10.0, 100.0])


def random_logits(seed, vocabulary, scale, rows=3):
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * scale


def softmax(logits: torch.Tensor) -> np.ndarray:
    values = logits.double().numpy()
    values = np.exp(values - values.max(-1, keepdims=True))
    return values / values.sum(-1, keepdims=True)


def naive_entropy(logits):
    return np.array([-sum(p * math.log(p) for p in row if p > 0) for row in softmax(logits)])


def naive_divergence(logits, reference):
    rows = zip(softmax(logits), softmax(reference), strict=True)
    return np.array(
        [sum(p * math.log(p / q) for p, q in zip(*map(list, (ps, qs)), strict=True) if p > 0) for qs, ps in rows]
    )


@given(seeds, widths, scales)
def test_against_naive_formulas(seed, vocabulary, scale):
    logits = random_logits(seed, vocabulary, scale)
    p = np.sort(softmax(logits), -1)
    np.testing.assert_allclose(signals.entropy(logits), naive_entropy(logits), atol=2e-5)
    np.testing.assert_allclose(signals.confidence(logits), p[:, -1], atol=2e-5)
    expected = p[:, -1] - p[:, -2] if vocabulary > 1 else np.ones(3)
    np.testing.assert_allclose(signals.margin(logits), expected, atol=2e-5)


@given(seeds, seeds, widths, st.sampled_from([0.0, 0.1, 1.0, 5.0]))
def test_divergence_against_naive_formula(seed, other, vocabulary, scale):
    logits, reference = random_logits(seed, vocabulary, scale), random_logits(other, vocabulary, scale)
    found = signals.divergence(logits, reference)
    np.testing.assert_allclose(found, naive_divergence(logits, reference), atol=5e-5, rtol=1e-4)
    assert (found >= -1e-5).all()
    np.testing.assert_allclose(signals.divergence(logits, logits), np.zeros(3), atol=1e-6)


def test_uniform_and_certain():
    uniform, certain = torch.zeros(1, 8), torch.tensor([[0.0, -math.inf, -math.inf, -math.inf]])
    assert signals.entropy(uniform).item() == pytest.approx(math.log(8))
    assert signals.margin(uniform).item() == pytest.approx(0)
    assert signals.entropy(certain).item() == 0
    assert signals.confidence(certain).item() == 1
    assert signals.margin(certain).item() == 1


def test_masked_tokens_count_for_nothing():
    logits = torch.tensor([[1.0, 2.0, 3.0]])
    masked = torch.tensor([[1.0, 2.0, 3.0, -math.inf]])
    for signal in (signals.entropy, signals.confidence, signals.margin):
        torch.testing.assert_close(signal(masked), signal(logits))
    torch.testing.assert_close(signals.divergence(masked, masked), torch.zeros(1))


def test_divergence_is_infinite_where_a_possible_token_is_ruled_out():
    reference, logits = torch.zeros(1, 2), torch.tensor([[0.0, -math.inf]])
    assert signals.divergence(logits, reference).item() == math.inf
    assert signals.divergence(reference, logits).item() == pytest.approx(math.log(2))


def test_a_vocabulary_of_one_token():
    one = torch.tensor([[3.0], [-7.0]])
    assert signals.entropy(one).tolist() == [0, 0]
    assert signals.confidence(one).tolist() == [1, 1]
    assert signals.margin(one).tolist() == [1, 1]
    assert signals.divergence(one, one).tolist() == [0, 0]


@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_huge_logits_stay_finite(scale):
    logits = torch.tensor([[1.0, -1.0, 0.0]]) * scale
    for signal in (signals.entropy, signals.confidence, signals.margin):
        assert torch.isfinite(signal(logits)).all()
    assert signals.confidence(logits).item() == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_in_float32(dtype):
    logits = random_logits(1, 50, 2.0).to(dtype)
    others = random_logits(2, 50, 2.0).to(dtype)
    for signal in (signals.entropy, signals.confidence, signals.margin):
        assert signal(logits).dtype == torch.float32
        torch.testing.assert_close(signal(logits), signal(logits.float()))
    for signal in (signals.divergence, signals.similarity, signals.drift):
        assert signal(logits, others).dtype == torch.float32
        torch.testing.assert_close(signal(logits, others), signal(logits.float(), others.float()))


def test_leading_axes_are_kept():
    logits = torch.randn(2, 3, 4, 11)
    for signal in (signals.entropy, signals.confidence, signals.margin):
        assert signal(logits).shape == (2, 3, 4)
    for signal in (signals.divergence, signals.similarity, signals.drift):
        assert signal(logits, logits + 1).shape == (2, 3, 4)


@given(seeds, st.integers(1, 20))
def test_similarity_and_drift_against_naive_formulas(seed, width):
    one, other = random_logits(seed, width, 1.0), random_logits(seed + 1, width, 1.0)
    a, b = one.double().numpy(), other.double().numpy()
    norms = np.linalg.norm(a, axis=-1), np.linalg.norm(b, axis=-1)
    np.testing.assert_allclose(signals.similarity(one, other), (a * b).sum(-1) / (norms[0] * norms[1]), atol=1e-5)
    np.testing.assert_allclose(signals.drift(one, other), np.linalg.norm(a - b, axis=-1) / norms[1], rtol=1e-4)


def test_broken_logits_are_not_hidden():
    broken, fine = torch.tensor([[math.nan, 1.0]]), torch.zeros(1, 2)
    for signal in (signals.entropy, signals.confidence, signals.margin):
        assert signal(broken).isnan().all()
    assert signals.divergence(broken, fine).isnan().all()
    assert signals.divergence(fine, broken).isnan().all()


def test_zero_vectors():
    zero, some = torch.zeros(1, 4), torch.ones(1, 4)
    assert signals.similarity(zero, some).item() == 0
    assert signals.drift(zero, zero).item() == 0
    assert torch.isfinite(signals.drift(some, zero)).all()
