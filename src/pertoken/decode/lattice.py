"""A lattice of guesses from a masked-diffusion model, and the paths through it that read best from the left.

`MaskDrafter` reads every row's text and some masked positions behind it in one forward that looks both ways: a law per
position, none of which knows what the others become. `pruned` keeps the likely candidates of each position, `paths`
searches them for strings that a causal model of counts finds likely too.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pertoken.core.errors import BadRequest
from pertoken.decode.ngram import NGramCounts
from pertoken.decode.request import Row
from pertoken.models.slots import SlotCache, mask
from pertoken.models.stack import stack_of

Path = tuple[int, ...]
Places = list[list[tuple[int, float]]]  # per position: (token, log-probability), the likely ones first


class MaskDrafter:
    """A masked-diffusion model behind the committed text of each row.

    vocabulary: how many of its tokens are the target's; columns: positions that text and masks may take; beyond: masks
    read behind those asked for; refresh: the text itself is computed anew every so many calls (None: never), between
    which its keys and values are those of its last computation and only new tokens and masks are computed.
    """

    def __init__(self, model: Any, rows: int, columns: int, vocabulary: int, beyond: int, refresh: int | None):
        self.stack, self.vocabulary, self.beyond, self.refresh = stack_of(model), vocabulary, beyond, refresh
        self.mask_token, self.shift = model.config.mask_token_id, getattr(model.config, "prediction_shift", 0)
        self.cache = SlotCache(self.stack.adapter, rows, columns)
        self.known = [0] * rows
        self.calls = self.tokens = 0

    def read(self, rows: Sequence[Row], counts: Sequence[int]) -> Tensor:
        """Log-probabilities `[row, place, vocabulary]` float32 of the next `counts[row]` positions, in one forward; for
        a row without any, and behind them, they say nothing."""
        if self.refresh is not None and self.calls % self.refresh == 0:
            self.known = [0] * len(rows)
        most = self.cache.columns
        lengths = [len(row.tokens) for row in rows]
        ends = [min(n + c + self.beyond, most) if c else 0 for n, c in zip(lengths, counts, strict=True)]
        starts = [min(known, end) for known, end in zip(self.known, ends, strict=True)]
        width = max(end - start for start, end in zip(starts, ends, strict=True))
        ids = np.full((len(rows), width), self.mask_token, dtype=np.int64)
        for r, (row, start, end) in enumerate(zip(rows, starts, ends, strict=True)):
            if end:
                new = row.tokens[start:]
                ids[r, : len(new)] = new
                self.known[r] = len(row.tokens)
        device = self.stack.adapter.device
        first, stop = torch.tensor(starts, device=device)[:, None], torch.tensor(ends, device=device)[:, None]
        columns = first + torch.arange(width, device=device)
        real = columns < stop
        hidden = self._forward(torch.from_numpy(ids).to(device), columns.masked_fill(~real, 0), real, stop, max(ends))
        behind = torch.tensor(lengths, device=device)[:, None] - self.shift - first
        places = (behind + torch.arange(max(counts), device=device)).clamp(0, width - 1)
        outputs = hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1]))
        self.calls += 1
        self.tokens += sum(ends) - sum(starts)
        logits = self.stack.logits(outputs)[..., : self.vocabulary].float()
        if self.mask_token < self.vocabulary:
            logits[..., self.mask_token] = -torch.inf
        return logits.log_softmax(-1)

    def _forward(self, ids: Tensor, columns: Tensor, real: Tensor, stop: Tensor, read: int) -> Tensor:
        """Un-normed outputs at these columns `[row, query]`, each of which sees all columns before the row's `stop`."""
        stack, depth = self.stack, self.stack.adapter.depth
        positions = torch.arange(read, device=columns.device).expand(len(ids), -1)
        self.cache.open(columns, real, read)
        stack.announce(real)
        dtype = stack.adapter.dtype
        masks = {w: mask(positions < stop, positions, columns, read, w, dtype) for w in set(stack.windows)}
        return stack.run(stack.embed(ids, columns), columns, self.cache, masks, 0, depth)

    def select(self, rows: Sequence[int]) -> None:
        """Keep only these rows."""
        self.cache.select_rows(torch.tensor(rows, device=self.stack.adapter.device))
        self.known = [self.known[r] for r in rows]


def likely(log_p: Tensor, count: int, ends: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of log-probabilities `[row, place, vocabulary]`: the `count` most likely tokens and theirs `[row, place, count]`,
    and those of the tokens that end a text `[row, place, end]`."""
    best, tokens = log_p.topk(min(count, log_p.shape[-1]), -1)
    if not bool(torch.isfinite(best[..., 0]).all()):
        raise BadRequest(
            "the drafter gave nan or inf logits; they must be finite. Check its weights and dtype (fp16 overflows: try "
            "bf16 or fp32)"
        )
    ended = log_p[..., torch.tensor(list(ends), dtype=torch.long, device=log_p.device)]
    return tokens.cpu().numpy(), best.cpu().numpy(), ended.cpu().numpy()


def pruned(tokens: np.ndarray, log_p: np.ndarray, ended: np.ndarray, ends: Sequence[int], share: float) -> Places:
    """The fewest likely candidates per place that have this share of the probability, and every end of text.

    Arrays as `likely` gives them for one row. The lattice stops with the first place that has an end among its likely
    candidates; an end that is only added stops nothing.
    """
    places: Places = []
    masses = np.exp(log_p.astype(np.float64)).cumsum(-1)
    for ids, values, mass, others in zip(tokens.tolist(), log_p.tolist(), masses, ended.tolist(), strict=True):
        count = min(int((mass < share).sum()) + 1, len(ids))
        kept = [(t, v) for t, v in zip(ids[:count], values[:count], strict=True) if v > -math.inf]
        known = {token for token, _ in kept}
        places.append(kept + [(e, v) for e, v in zip(ends, others, strict=True) if e not in known and v > -math.inf])
        if not known.isdisjoint(ends):
            break
    return places


def paths(
    places: Places, text: Sequence[int], ends: Collection[int], counts: NGramCounts, weight: float, width: int
) -> list[tuple[float, Path]]:
    """(score, path) of what a beam of this width finds, the best mean score per token first.

    The score of a path is the sum over its tokens of  weight * log p_i(token) + (1 - weight) * log q(token | text, path
    before it), q from the counts. A path ends with an end of text, beside which others of its length go on.
    """
    behind = counts.context
    live: list[tuple[float, Path]] = [(0.0, ())]
    done: list[tuple[float, Path]] = []
    before = tuple(text[max(len(text) - behind, 0) :])
    for place in places:
        grown = []
        for total, path in live:
            history = (before + path)[-behind:] if behind else ()
            for token, log_p in place:
                causal = math.log(counts.probability(history, token)) if weight < 1 else 0.0
                grown.append((total + weight * log_p + (1 - weight) * causal, (*path, token)))
        best = heapq.nlargest(width, grown, key=lambda one: one[0])
        done += [one for one in best if one[1][-1] in ends]
        live = [one for one in best if one[1][-1] not in ends]
        if not live:
            break
    found = [one for one in done + live if one[1]]
    return sorted(found, key=lambda one: one[0] / len(one[1]), reverse=True)
