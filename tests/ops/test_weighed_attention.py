"""Attention with its mass against the definition: blocks, padding, gradients, poisoned memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pertoken.ops.weighed_attention import attention_mass, naive, weighed_attention
from pertoken.ops.weighed_attention import torch as fast

torch.set_num_threads(1)


def inputs(seed, rows=2, kv_heads=2, each=2, groups=2, queries=3, keys=7, dim=4):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    places = torch.rand(rows, groups, 2 * keys, generator=generator).topk(keys, -1).indices.sort(-1).values
    real = torch.rand(rows, groups, keys, generator=generator) < 0.7
    until = torch.randint(-1, 2 * keys, (rows, queries), generator=generator)
    return (
        draw(rows, kv_heads * each, queries, dim),
        draw(rows, kv_heads, keys, dim),
        draw(rows, kv_heads, keys, dim),
        torch.where(real, places, -1),
        real,
        until,
        0.6,
    )


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([1, 3]),
    st.sampled_from([(1, 1), (2, 2), (2, 1), (1, 3)]),
    st.booleans(),
    st.sampled_from([0, 1, 5]),
    st.sampled_from([1, 63, 7000]),
    st.sampled_from([None, 2.0]),
)
def test_it_is_the_definition_in_blocks_of_any_size(seed, rows, heads, shared, queries, block, softcap):
    kv_heads, each = heads
    given_ = (*inputs(seed, rows, kv_heads, each, 1 if shared else kv_heads, queries), softcap)
    before, fast.BLOCK = fast.BLOCK, block
    try:
        out, mass = weighed_attention(*given_)
        alone = attention_mass(*given_[:2], *given_[3:])
    finally:
        fast.BLOCK = before
    wanted, weights = naive.weighed_attention(*given_)
    assert torch.allclose(out, wanted, atol=1e-5) and torch.allclose(mass, weights, atol=1e-5)
    assert torch.allclose(alone, weights, atol=1e-5)


def test_gradients_are_those_of_the_definition():
    found = []
    for op in (weighed_attention, naive.weighed_attention):
        query, key, value, *rest = inputs(4)
        leaves = [x.requires_grad_() for x in (query, key, value)]
        out, mass = op(*leaves, *rest)
        (out.square().sum() + mass.square().sum()).backward()
        found.append([leaf.grad for leaf in leaves])
    for mine, wanted in zip(*found, strict=True):
        assert mine.isfinite().all() and torch.allclose(mine, wanted, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_query_that_reads_nothing_gets_zeros_and_mass_is_one_per_query(dtype):
    query, key, value, places, real, until, scale = inputs(1)
    real[:, :, 0], places[:, :, 0] = True, 0
    until[0], until[1] = -1, 3
    out, mass = weighed_attention(query.to(dtype), key.to(dtype), value.to(dtype), places, real, until, scale)
    assert out.dtype == dtype and mass.dtype == torch.float32
    assert not out[0].any() and not mass[0].any() and out[1].any()
    assert torch.allclose(mass[1].sum(-1), torch.tensor(6.0))
