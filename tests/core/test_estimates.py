"""Rank correlation against its definition: the correlation of mean ranks, pair by pair."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pertoken.core.estimates import spearman


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
