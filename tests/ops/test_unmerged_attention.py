"""Attention of tokens that stand at several positions, against its definition."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from pertoken.core.rotation import rotated
from pertoken.ops.unmerged_attention import exact_attention, naive, unmerged_attention


def angles(rows, count, dim, base=50.0):
    rates = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    turns = torch.arange(count)[:, None] * rates
    turns = torch.cat([turns, turns], -1).expand(rows, -1, -1)
    return turns.cos(), turns.sin()


def case(seed, first, dtype=torch.float64, turned=6):
    """Two rows of 11 positions: tokens at several places, some positions empty, and a row padded at the left."""
    generator = torch.Generator().manual_seed(seed)
    columns = torch.tensor([[0, 1, 2, 1, 1, 3, -1, 3, 4, 5, 6], [-1, -1, 1, 2, 3, 2, 2, 4, 4, 5, 6]])
    asked = 7 if first == 0 else 2
    q = torch.randn(2, 4, asked, 6, generator=generator, dtype=dtype)
    k, v = (torch.randn(2, 2, 7, 6, generator=generator, dtype=dtype) for _ in range(2))
    cos, sin = angles(2, 11, turned)
    return q, k, v, columns, first, cos.to(dtype), sin.to(dtype), 0.4


@pytest.mark.parametrize("made", [unmerged_attention, exact_attention])
@pytest.mark.parametrize("first", [0, 9])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("turned", [6, 4])
def test_it_is_its_definition(made, first, window, turned):
    given = case(3, first, turned=turned)
    found = made(*given, window)
    assert torch.allclose(found, naive.unmerged_attention(*given, window), atol=1e-9)


@pytest.mark.parametrize("made", [unmerged_attention, exact_attention])
def test_gradients_are_those_of_the_definition(made):
    given = case(4, 0)
    for x in given[:3]:
        x.requires_grad_()
    weight = torch.randn(2, 7, 4, 6, dtype=torch.float64)
    expected = torch.autograd.grad((naive.unmerged_attention(*given) * weight).sum(), given[:3])
    found = torch.autograd.grad((made(*given) * weight).sum(), given[:3])
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-9)


def test_each_token_at_one_place_is_plain_attention():
    q, k, v = (torch.randn(2, 3, 9, 8) for _ in range(3))
    cos, sin = (x.float() for x in angles(2, 9, 8))
    plain = scaled_dot_product_attention(
        rotated(q, cos[:, None], sin[:, None]), rotated(k, cos[:, None], sin[:, None]), v, is_causal=True, scale=0.3
    )
    columns = torch.arange(9).expand(2, -1)
    found = unmerged_attention(q, k, v, columns, 0, cos, sin, 0.3)
    assert torch.equal(found, plain.transpose(1, 2))


def test_tokens_that_are_equal_are_as_if_they_had_not_been_merged():
    u = torch.tensor([[0, 1, 1, 2, 1, 3]])
    q, k, v = (torch.randn(1, 2, 4, 8, dtype=torch.float64) for _ in range(3))
    cos, sin = angles(1, 6, 8)
    full = [x[:, :, u[0]] for x in (q, k, v)]
    whole = unmerged_attention(*full, torch.arange(6)[None], 0, cos, sin, 0.3)
    found = unmerged_attention(q, k, v, u, 0, cos, sin, 0.3)
    for token in range(4):
        assert torch.allclose(found[0, token], whole[0, u[0] == token].mean(0))


def test_memory_that_is_not_read_may_hold_anything():
    given = list(case(5, 0))
    expected = unmerged_attention(*given)
    for x in given[1:3]:
        x[1, :, 0] = torch.nan  # no position of row 1 is that token's
    given[0][1, :, 0] = torch.nan
    found = unmerged_attention(*given)
    assert torch.allclose(found, expected, equal_nan=False)
