"""Rows of different lengths in buckets: each token once, little padding."""

from __future__ import annotations

import pytest
import torch

from pertoken.core.packing import LIKE, buckets


@pytest.mark.parametrize("counts", [(3,), (4, 4, 4), (9, 1, 5, 8, 7, 1), (100, 76, 75, 74, 10)])
def test_every_token_is_in_one_bucket_and_little_is_padded(counts):
    made, flat = buckets(counts, torch.device("cpu")), torch.arange(sum(counts))
    places = []
    for bucket in made:
        lengths = [counts[row] for row in bucket.rows]
        assert min(lengths) >= LIKE * max(lengths) and bucket.index.shape == (len(lengths), max(lengths))
        assert (bucket.valid is None) == (min(lengths) == max(lengths))
        values, place = bucket.gathered(flat[bucket.index])
        assert torch.equal(values, place)
        for row, index in zip(bucket.rows, bucket.index, strict=True):
            start = sum(counts[:row])
            assert torch.equal(index[: counts[row]], torch.arange(start, start + counts[row]))
            assert (index[counts[row] :] == start).all()
        places.append(place)
    assert torch.equal(torch.cat(places).sort().values, flat)
