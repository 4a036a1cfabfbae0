"""Sequence-level unlikelihood: a model learns not to loop from its own greedy continuations (Welleck et al., arXiv
1908.04319, section 5.2).

The model continues a prefix greedily; every token of the continuation that belongs to an n-gram seen earlier in it adds
`-(1 - q(token)) log(1 - p(token))`, averaged over all continued tokens. Differences: q is the probability at the
model's first exit, which knows how words and indents go on but copies little, so that tokens which can only be that one
(the rest of a word) are left alone and the places where the text could have gone elsewhere are not; the continuation is
batched and cut at the end of text; the n-grams of the prefix do not count as seen (code rightly repeats what stands
before it).
"""

from __future__ import annotations

from typing import Any

import torch


def in_repeats(tokens: torch.Tensor, n: int = 4) -> torch.Tensor:
    """Mask `[batch, token]` of the tokens that belong to an n-gram which occurred earlier in their row."""
    if tokens.shape[1] < n:
        return torch.zeros_like(tokens, dtype=torch.bool)
    grams = tokens.unfold(1, n, 1)
    same = (grams[:, :, None] == grams[:, None]).all(-1)
    again = same.tril(-1).any(-1)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    for offset in range(n):
        mask[:, offset : offset + again.shape[1]] |= again
    return mask


@torch.no_grad()
def greedy_continuations(model: Any, prefixes: torch.Tensor, new: int) -> torch.Tensor:
    """Up to `new` greedy tokens after each prefix `[batch, token]`, filled up with the end of text."""
    mask, end = torch.ones_like(prefixes), model.config.eos_token_id
    ids = model.generate(prefixes, attention_mask=mask, do_sample=False, max_new_tokens=new, pad_token_id=end)
    return ids[:, prefixes.shape[1] :]


def probability(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """p(token) `[batch, token]` under `logits` `[batch, token, vocabulary]`."""
    return logits.float().log_softmax(-1).gather(-1, tokens[..., None])[..., 0].exp()


def unlikelihood(model: Any, prefixes: torch.Tensor, new: int = 96, n: int = 4) -> torch.Tensor:
    """The loss, a scalar in nats per continued token, on greedy continuations of `prefixes` `[batch, token]`."""
    tokens = greedy_continuations(model, prefixes, new)
    ids = torch.cat([prefixes, tokens], dim=1)
    alive = (tokens == model.config.eos_token_id).cumsum(1) == 0
    out = model(ids[:, :-1], logits_to_keep=tokens.shape[1], use_cache=False, output_hidden_states=[1])
    with torch.no_grad():
        early = model.lm_head(model.model.norm(out.hidden_states[1][:, -tokens.shape[1] :]))
        free = 1 - probability(early, tokens)
    wrong = in_repeats(tokens, n) & alive
    loss = -torch.log1p(-probability(out.logits, tokens).clamp(max=1 - 1e-4)) * free * wrong
    return loss.sum() / alive.sum().clamp(min=1)
