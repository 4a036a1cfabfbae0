"""Elastic-Cache: refresh keys and values when, and from the layer where, the attention of well-read tokens has moved.

Source: Nguyen-Tri et al., "Attention Is All You Need for KV Cache in Diffusion LLMs", arXiv 2510.14973, and its code.
The block slides: W is the first `window` undecided positions. The first forward computes everything. A later one
computes Q = T + D + W, the tracked tokens, those decided at the step before and the window, against the kept keys and
values of the rest. In layer l, with A `[head, tracked, key]` the attention of the tracked tokens,

    sigma_l = mean over tracked tokens and keys of cosine over heads(A before, A now)

where "A before" is rebuilt from the queries and keys kept before this layer overwrote those of Q. At the first l with
sigma_l < gamma the row is stale: its layers l+1.. are computed at every position, from the kept inputs of layer l+1
(renewed in Q). After the forward T is, over all layers, the `track` decided tokens of each that the window reads most:
s_l[key] = sum over heads and the window's queries. sigma is tested with all of T in every layer.

- axis="heads" is the released code's cosine, for which gamma=0.9 is calibrated; "keys", the paper's formula as it
  reads, takes it over the keys of each head. A gamma does not carry over from one to the other.
- gamma=inf refreshes from the first layer at every step: no cache. A finite gamma above 1 is not that: layer 0 never
  fails its own test, and what enters layer 1 outside Q stays old.
- whole=True, not in the paper, refreshes a stale row from its first layer. Otherwise what layer 0 makes of tokens
  outside Q is never renewed after the first forward, however often deeper layers are: in a shallow model that is much
  of what there is to renew.
- far=False computes all undecided positions at every step (the code's block_caching=False); still only W is committed.

What differs: rows of a batch refresh each for itself. Layers are run in groups and tested together, which saves
operations and a wait for the device per layer; the layers behind the stale one are then run again, so the result is
that of one test per layer. Padding is excluded from keys and means, and so is what `EndOfText` cuts (the code leaves
such positions in place as masks). A row with nothing to track counts as stale. Where the output at i - 1 predicts
token i, the rows that predict the window are its queries, and are computed along.

It loses where refreshes are frequent (every one costs the narrow layers too) or the canvas is short, and it is no exact
method: on LLaDA's MATH an independent run found most answers changed and 12 % more forwards at equal accuracy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from pertoken.core.card import Dial, Paper, method
from pertoken.core.errors import BadRequest
from pertoken.denoise.canvas import Canvas
from pertoken.denoise.ends import EndOfText
from pertoken.denoise.model import DiffusionModel
from pertoken.denoise.rules import RefreshRule
from pertoken.denoise.threshold import Threshold
from pertoken.denoise.watch import Watch

LARGEST = 2**24  # elements of one attention tensor: bounds how many layers are tested together

TINY = torch.finfo(torch.float32).tiny

Axis = Literal["heads", "keys"]


@method(
    question="denoise",
    shape="decoder",
    exactness="approximate",
    paper=Paper("Attention Is All You Need for KV Cache in Diffusion LLMs", "2510.14973"),
    reads={"attention"},
    writes={"refresh"},
    needs={"diffusion"},
    baselines=("recompute", "fixed_interval", "dual_cache"),
    dial=Dial("gamma", (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)),
)
@dataclass(frozen=True)
class ElasticCache(RefreshRule):
    """Refresh the layers behind the first whose attention has drifted; compute a sliding window otherwise.

    window: undecided positions of the sliding block, None for the loop's own blocks; gamma: similarity below which a
    layer is stale; track: tokens per layer; whole: a stale row is refreshed from the first layer on; group: layers per
    test, None for as many as memory allows.
    """

    window: int | None = 16
    gamma: float = 0.9
    track: int = 1
    axis: Axis = "heads"
    far: bool = True
    whole: bool = False
    group: int | None = None
    full: ClassVar[dict[str, Any]] = {"gamma": torch.inf}
    beside: ClassVar[dict[str, Any]] = {"commit": Threshold(0.9), "canvas": EndOfText()}

    def __post_init__(self) -> None:
        if self.axis not in ("heads", "keys"):
            raise BadRequest(f"axis={self.axis!r} is unknown; choose 'heads' (gamma 0.9 is made for it) or 'keys'")
        for name in ("window", "track", "group"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BadRequest(f"{name}={value} is too few; give at least 1")
        if self.gamma != self.gamma:
            raise BadRequest("gamma is not a number; give a similarity such as 0.9, or inf to refresh always")

    @property
    def sliding(self) -> int | None:
        return self.window

    def plan(self, canvas: Canvas, upcoming: Tensor | None) -> Tensor:
        asked = canvas.masked & canvas.in_block if self.far else canvas.masked
        return canvas.valid if self.gamma == torch.inf else asked

    def watch(self) -> Watch:
        return Drift(self)


class Drift(Watch):
    """The tracked tokens `[row, column]` of one call, and the similarities `[layer, row]` last found."""

    def __init__(self, rule: ElasticCache):
        self.rule = rule
        self.tracked: Tensor | None = None
        self.columns = self.real = torch.zeros(0)
        self.old: Tensor | None = None
        self.sigma: list[Tensor] = []

    def wanted(self, canvas: Canvas) -> Tensor:
        if self.tracked is None:
            self.tracked = torch.zeros_like(canvas.valid)
        self.tracked &= canvas.valid
        self.sigma.clear()
        return canvas.decided_last | self.tracked

    def group(self, model: DiffusionModel, canvas: Canvas) -> int:
        assert self.tracked is not None
        self.columns, self.real = gathered(self.tracked)
        return self._size(model, canvas, self.columns.shape[1])

    def _size(self, model: DiffusionModel, canvas: Canvas, queries: int) -> int:
        """Layers whose attention is looked at together."""
        largest = LARGEST // max(canvas.rows * model.cache.heads * queries * model.cache.read, 1)
        return self.rule.group or min(max(largest, 1), model.depth)

    def before(self, model: DiffusionModel, canvas: Canvas, first: int, last: int) -> None:
        self.old = model.attention(canvas, self.columns, first, last)[0]

    def after(self, model: DiffusionModel, canvas: Canvas, first: int, last: int) -> Tensor:
        now, seen = model.attention(canvas, self.columns, first, last)
        assert self.old is not None
        sigma = similarity(self.old, now, seen, self.real, self.rule.axis)
        self.sigma.append(sigma)
        stale = sigma < self.rule.gamma
        level = first + 1 + stale.int().argmax(0)
        return torch.where(stale.any(0), torch.zeros_like(level) if self.rule.whole else level, model.depth)

    def finish(self, model: DiffusionModel, canvas: Canvas) -> None:
        places = canvas.block_columns
        asks = canvas.masked.gather(1, places)
        queries = torch.where(asks, places, places[:, :1]).sub(model.shift).clamp(min=0)
        size, decided, columns = self._size(model, canvas, places.shape[1]), canvas.valid & ~canvas.masked, []
        for first in range(0, model.depth, size):
            last = min(first + size, model.depth)
            weights = model.attention(canvas, queries, first, last)[0]
            score = torch.einsum("lrhqk,rq->rlk", weights, asks.float())
            score = score.masked_fill(~decided[:, None, : score.shape[-1]], -1)
            columns.append(score.topk(min(self.rule.track, score.shape[-1]), -1).indices.flatten(1))
        self.tracked = torch.zeros_like(decided).scatter_(1, torch.cat(columns, 1), True) & decided

    def select(self, rows: Tensor) -> None:
        if self.tracked is not None:
            self.tracked = self.tracked[rows]


def similarity(old: Tensor, now: Tensor, seen: Tensor, real: Tensor, axis: Axis) -> Tensor:
    """sigma `[layer, row]` of attention weights `[layer, row, head, query, key]` before and now; minus infinity without
    a query. seen `[layer or 1, row, query, key]`: keys that count; real `[row, query]`: queries that count.

    The cosine takes no notice of a common factor: dividing by the largest of the heads keeps small weights in range. A
    key that no head reads, before and now, is unchanged.
    """
    if axis == "heads":
        old, now = (x / x.amax(2, keepdim=True) for x in (old + TINY, now + TINY))
        over, counts = 2, seen & real[None, :, :, None]
    else:
        over, counts = 4, real[None, :, None]
    cosine = (old * now).sum(over) / ((old * old).sum(over) * (now * now).sum(over)).sqrt()
    counts = counts.expand(cosine.shape)
    total = counts.sum((2, 3))
    mean = cosine.masked_fill(~counts, 0).sum((2, 3)) / total
    return mean.masked_fill(total == 0, -torch.inf)


def gathered(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of the chosen places `[row, column]`, and which of them are real, `[row, most of any row]`."""
    count = chosen.sum(-1)
    width = int(count.max())
    columns = chosen.int().argsort(dim=-1, descending=True, stable=True)[:, :width]
    return columns, torch.arange(width, device=columns.device) < count[:, None]
