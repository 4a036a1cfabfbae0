"""Rank correlation against its definition, the correlation of mean ranks; the area under a curve, pair by pair."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pertoken.core.estimates import roc_area, spearman


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=3, max_size=12))
def test_ranks_of_ties_are_means(pairs):
    one, other = zip(*pairs, strict=True)
    ranks = [[sum(y < x for y in side) + sum(y == x for y in side) / 2 for x in side] for side in (one, other)]
    if min(map(np.std, ranks)) == 0:
        assert spearman(one, other) == 0
    else:
        assert spearman(one, other) == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-9)


def test_tensors_of_any_shape():
    assert spearman(
        torch.tensor([[1.0, 2.0], [3.0, 9.0]]), torch.tensor([[-1.0, -2.0], [-3.0, -4.0]])
    ) == pytest.approx(-1)


def test_area_counts_pairs_and_halves_ties():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 6, (60,), generator=generator).float()
    positive = torch.rand(60, generator=generator) < 0.3
    pairs = list(itertools.product(scores[positive].tolist(), scores[~positive].tolist()))
    wanted = sum(1.0 if one > other else 0.5 if one == other else 0.0 for one, other in pairs) / len(pairs)
    assert roc_area(scores, positive) == pytest.approx(wanted)
    assert roc_area(positive.float(), positive) == 1.0
    assert roc_area(scores, positive & False) == 0.0
