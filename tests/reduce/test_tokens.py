"""Ragged tokens: bookkeeping of counts, sizes and places, attention in buckets, and what comes back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from pertoken.core.decision import Assign
from pertoken.core.errors import BadRequest
from pertoken.reduce.tokens import Tokens


def random_decision(tokens, generator, leave=True):
    """Every patch goes into a random group or leaves; at least one stays."""
    valid = tokens.valid
    group = torch.full(valid.shape, -1)
    for row, count in enumerate(tokens.counts):
        free = count - tokens.prefix
        drawn = torch.randint(-1 if leave else 0, max(free * 2 // 3, 1), (free,), generator=generator)
        drawn[0] = drawn[0].clamp(min=0)
        names = {int(name): i for i, name in enumerate(drawn[drawn >= 0].unique())}
        group[row, : tokens.prefix] = torch.arange(tokens.prefix)
        patches = [names[int(d)] + tokens.prefix if d >= 0 else -1 for d in drawn]
        group[row, tokens.prefix : count] = torch.tensor(patches)
    return Assign(valid, group)


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(2, 9), st.integers(0, 2), st.booleans())
@settings(max_examples=60, deadline=None)
def test_merging_conserves_mass_and_places(seed, rows, patches, prefix, leave):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, patches + prefix, 5, generator=generator, dtype=torch.float64)
    tokens, now = Tokens.of(hidden, prefix), hidden
    members = [[[i] for i in range(patches + prefix)] for _ in range(rows)]
    last = {}
    for _ in range(3):
        decision = random_decision(tokens, generator, leave)
        flat = now.reshape(tokens.total, -1)
        for row in range(rows):
            fresh = {}
            for i, own in enumerate(members[row]):
                g = int(decision.group[row, i])
                if g < 0:
                    last |= {(row, m): flat[int(tokens.starts[row]) + i] for m in own}
                else:
                    fresh.setdefault(g, []).extend(own)
            members[row] = [fresh[g] for g in range(len(fresh))]
        now, tokens = tokens.reduced(now, decision, keep_left=True)
        assert tokens.counts == tuple(map(len, members))
        sizes = tokens.padded_sizes
        for row in range(rows):
            assert [int(s) for s in sizes[row] if s > 0] == [len(m) for m in members[row]]
    grid = tokens.grid(now)
    for row in range(rows):
        for own in members[row]:
            mean = hidden[row, own].mean(0)
            for m in own:
                assert torch.allclose(grid[row, m], mean)
    for (row, m), state in last.items():
        assert torch.allclose(grid[row, m], state) and tokens.place[row, m] == -1


def test_an_untouched_token_keeps_every_bit():
    hidden = torch.randn(2, 6, 4)
    group = torch.tensor([[0, 1, 1, 2, 3, 4], [0, 1, 2, 3, 4, -1]])
    now, after = Tokens.of(hidden, 1).reduced(hidden, Assign(torch.ones(2, 6, dtype=torch.bool), group), True)
    grid = after.grid(now)
    assert torch.equal(grid[0, [0, 3, 4, 5]], hidden[0, [0, 3, 4, 5]]) and torch.equal(grid[1], hidden[1])


@pytest.mark.parametrize("counts", [(7, 7, 7), (9, 2, 5, 8, 3)], ids=str)
def test_attention_in_buckets_is_attention_over_repeats(counts):
    torch.manual_seed(3)
    total = sum(counts)
    tokens = Tokens(counts, torch.zeros(len(counts), 12, dtype=torch.long), 0, torch.randint(1, 4, (total,)).float())
    q, k, v = (torch.randn(total, 2, 6, dtype=torch.float64) for _ in range(3))

    def run(q, k, v, mask):
        return scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)

    shaped = [tokens.shaped(x).transpose(1, 2) for x in (q, k, v)]
    found = tokens.attended(run, *shaped).reshape(total, 2, 6)
    start = 0
    for count in counts:
        own = slice(start, start + count)
        copies = tokens.sizes[own].long()
        ks, vs = (x[own].repeat_interleave(copies, 0).transpose(0, 1) for x in (k, v))
        expected = scaled_dot_product_attention(q[own].transpose(0, 1), ks, vs).transpose(0, 1)
        assert torch.allclose(found[own], expected, atol=1e-6)
        start += count


def test_rows_filled_up_keep_the_mean_over_patches():
    counts = (4, 2)
    tokens = Tokens(counts, torch.zeros(2, 4, dtype=torch.long), 1)
    flat = torch.randn(6, 3)
    kept = tokens.kept(flat[None])
    assert torch.allclose(kept[1, 1:].mean(0), flat[5]) and torch.equal(kept[0], flat[:4])


def test_decisions_that_do_not_fit_are_refused():
    hidden = torch.randn(2, 5, 3)
    tokens, valid = Tokens.of(hidden, 1), torch.ones(2, 5, dtype=torch.bool)
    with pytest.raises(BadRequest, match="without gaps"):
        tokens.reduced(hidden, Assign(valid, torch.tensor([[0, 1, 3, 3, 4]] * 2)), True)
    with pytest.raises(BadRequest, match="in place"):
        tokens.reduced(hidden, Assign(valid, torch.tensor([[-1, 0, 1, 2, 3]] * 2)), True)
    with pytest.raises(BadRequest, match="recorded"):
        tokens.reduced(hidden, Assign(valid[:, :4], torch.zeros(2, 4, dtype=torch.long)), True)
