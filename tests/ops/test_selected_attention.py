"""The gathered attention against its definition: forward, gradients, odd sizes, poisoned memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pertoken.ops.selected_attention import naive
from pertoken.ops.selected_attention import torch as fast

torch.set_num_threads(1)


def inputs(seed, rows=2, kv_heads=2, each=2, groups=1, runs=3, length=2, keys=11, chosen=4, dim=4, bias=False):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    query, key, value = (
        draw(rows, kv_heads * each, runs, length, dim),
        draw(rows, kv_heads, keys, dim),
        draw(rows, kv_heads, keys, dim),
    )
    index = torch.rand(rows, groups, runs, keys, generator=generator).topk(min(chosen, keys), -1).indices
    allowed = torch.rand(rows, groups, runs, length, index.shape[-1], generator=generator) < 0.7
    added = draw(rows, groups, runs, 1 if seed % 2 else length, index.shape[-1]) if bias else None
    return query, key, value, index, allowed, 0.6, added


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([1, 3]),
    st.sampled_from([(1, 1), (2, 2), (2, 1), (1, 3)]),
    st.booleans(),
    st.integers(1, 3),
    st.sampled_from([1, 2, 9, 17]),
    st.integers(1, 13),
    st.booleans(),
    st.sampled_from([None, 2.0]),
    st.booleans(),
)
def test_it_is_the_definition(seed, rows, heads, shared, runs, length, chosen, bias, softcap, turn):
    kv_heads, each = heads
    given_ = inputs(seed, rows, kv_heads, each, 1 if shared else kv_heads, runs, length, 13, chosen, 4, bias)
    angles = torch.arange(given_[3].shape[-1])[:, None] * torch.tensor([1.0, 0.1, 1.0, 0.1])
    given_ += (softcap, (angles.cos(), angles.sin()) if turn else None)
    assert torch.allclose(fast.selected_attention(*given_), naive.selected_attention(*given_), atol=1e-5)


@pytest.mark.parametrize("length", [2, 9])
@pytest.mark.parametrize("bias", [False, True])
def test_gradients_are_those_of_the_definition(length, bias):
    found = []
    for op in (fast.selected_attention, naive.selected_attention):
        query, key, value, index, allowed, scale, added = inputs(4, length=length, bias=bias)
        leaves = [x.requires_grad_() for x in (query, key, value, added) if x is not None]
        out = op(query, key, value, index, allowed, scale, added)
        (out * torch.arange(out.numel()).view_as(out).cos()).sum().backward()
        found.append([leaf.grad for leaf in leaves])
    for mine, wanted in zip(*found, strict=True):
        assert torch.allclose(mine, wanted, atol=1e-5)


@pytest.mark.parametrize("length", [1, 9])
def test_what_is_not_chosen_is_never_touched(length):
    query, key, value, index, allowed, scale, _ = inputs(7, length=length, chosen=6)
    allowed[..., -1] = False
    clean = fast.selected_attention(query, key, value, index, allowed, scale)
    row = torch.arange(2)[:, None, None]
    unread = torch.ones(2, 11, dtype=torch.bool)
    unread[row, index[:, 0]] = False
    assert unread.any()
    for tensor in (key, value):
        tensor.masked_fill_(unread[:, None, :, None], torch.nan)
    assert torch.equal(fast.selected_attention(query, key, value, index, allowed, scale), clean)


def test_a_query_that_reads_nothing_gets_zeros():
    for length in (1, 9):
        query, key, value, index, allowed, scale, _ = inputs(1, length=length)
        allowed[0, :, 1] = False
        out = fast.selected_attention(query, key, value, index, allowed, scale)
        assert not out[0, :, 1].any() and out.isfinite().all() and out[0, :, 0].any()


def test_runs_done_in_turn_are_runs_done_at_once(monkeypatch):
    given_ = inputs(3, runs=5, length=3, bias=True)
    whole = fast.selected_attention(*given_)
    monkeypatch.setattr(fast, "GATHERED", 1)
    assert torch.equal(fast.selected_attention(*given_), whole)


def test_no_keys_give_zeros():
    query, key, value, index, allowed, scale, _ = inputs(1)
    assert not fast.selected_attention(query, key, value, index[..., :0], allowed[..., :0], scale).any()
