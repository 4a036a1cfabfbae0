"""How claims about chosen keys show exactness: what reads everything is dense attention, a prefill in chunks is the
whole, and rows of a ragged batch are each row alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pertoken.bench import suite
from pertoken.bench.claims import Bench, Measurement
from pertoken.core.attach import attach
from pertoken.core.policy import Policy

TOKENS, SHORTER = 60, 47


@torch.inference_mode()
def logits(model: Any, ids: Tensor, policy: Policy | None, mask: Tensor | None = None, chunk: int = 0) -> Tensor:
    """`[batch, token, vocabulary]`, read at once or in chunks."""
    if policy is not None:
        with attach(model, policy):
            return logits(model, ids, None, mask, chunk)
    if not chunk:
        places = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)
        return model(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False).logits
    cache, found = None, []
    for part in ids.split(chunk, 1):
        out = model(input_ids=part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        found.append(out.logits)
    return torch.cat(found, 1)


def exactness(
    bench: Bench,
    families: tuple[str, ...],
    made: Callable[[Any, str], tuple[Policy, dict[str, Policy]]],
    chunk: int = 8,
) -> Measurement:
    """The largest difference of logits over their largest size, on random models in fp32. made: for a model of a
    family a policy that leaves keys out, and by name those that read everything."""
    found, generator = {}, torch.Generator().manual_seed(bench.seed)
    for family in families:
        model = suite.tiny(family, 3, 1)
        ids = torch.randint(1, 211, (2, TOKENS), generator=generator)
        some, whole = made(model, family)
        dense, read = logits(model, ids, None), logits(model, ids, some)
        mask = torch.stack([torch.arange(TOKENS) >= TOKENS - n for n in (TOKENS, SHORTER)]).long()
        ragged = logits(model, ids, some, mask)
        alone = [logits(model, ids[i : i + 1, TOKENS - n :], some)[0] for i, n in enumerate((TOKENS, SHORTER))]
        gaps = {name: logits(model, ids, policy) - dense for name, policy in whole.items()}
        gaps |= {
            "chunks": logits(model, ids, some, chunk=chunk) - read,
            "ragged": torch.cat([ragged[0] - alone[0], ragged[1, TOKENS - SHORTER :] - alone[1]]),
        }
        assert not torch.equal(read, dense), f"{family}: nothing was left out, so that nothing is shown"
        found[family] = {name: float(gap.abs().max() / dense.abs().max()) for name, gap in gaps.items()}
    worst = [value for one in found.values() for value in one.values()]
    return Measurement(max(worst), "dense", 0.0, len(worst), found)
