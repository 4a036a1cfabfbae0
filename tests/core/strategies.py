"""Hypothesis strategies for decisions of every kind, with ragged validity."""

import torch
from hypothesis import strategies as st

from pertoken.core.decision import KINDS, Assign, Commit, Decision, Depth, Exit, Keep, Select, Weight


@st.composite
def decisions(draw, kind: type[Decision] | None = None) -> Decision:
    """A random decision of `kind` (any if None), 1 to 4 rows of 0 to 7 tokens."""
    kind = kind or draw(st.sampled_from(sorted(KINDS.values(), key=lambda k: k.kind)))
    batch, tokens, extra = draw(st.integers(1, 4)), draw(st.integers(0, 7)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def flags(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator) < 0.6

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randint(-1, 6, shape, generator=generator)

    valid = flags(batch, tokens)
    if kind is Keep:
        return Keep(valid, flags(batch, tokens))
    if kind is Assign:
        return Assign(valid, numbers(batch, tokens))
    if kind is Depth:
        small = flags(batch, tokens, extra) if bool(flags(1)) else None
        return Depth(valid, flags(batch, tokens, extra), small)
    if kind is Exit:
        return Exit(valid, numbers(batch, tokens))
    if kind is Weight:
        return Weight(valid, torch.randn(batch, tokens, generator=generator))
    if kind is Select:
        return Select(valid, numbers(batch, 2, tokens, extra), torch.ones(batch, dtype=torch.long))
    assert kind is Commit
    return Commit(
        valid,
        tokens=numbers(batch, tokens),
        parents=numbers(batch, tokens),
        value=torch.rand(batch, tokens, generator=generator),
        source=numbers(batch, tokens),
        accepted=flags(batch, tokens),
        committed=numbers(batch, extra),
        count=numbers(batch),
    )
