"""TokenSelect: each run of queries reads the keys that a vote of all heads picks, one set for all heads of a layer
(arXiv 2411.02886).

With q_h the mean query of the run at head h (in decoding the query itself) and g(h) the key head that it reads, over
the candidates j, all keys but the first `sinks` and the last `recent`:

    s[h, j] = scale * q_h . k[g(h), j]             scores [batch, head, run, key]; paper: scale 1, not 1/sqrt(dim)
    soft:  vote[j] = sum_h softmax_j(s[h])         fp32; every head has one vote and spreads it
    sum:   vote[j] = sum_h s[h, j]                 heads with large norms decide alone
    head:  vote[j] = number of heads with j among their own best `budget`

The `budget` keys of the most votes are read, with the first and the last. Selection cache: in decoding, a row whose
query (all heads in one vector) has a cosine of at least `reuse` with the one that chose last reads what that one chose,
and the vote, a pass over all keys, is saved for it. Rows decide by themselves.

Differs from the paper and its code:
- The selection cache works (the code has it off, and its branch cannot run). Tokens that have left the last `recent`
  since the selection are in neither set of the paper's; here they take the places of the weakest choices, and when they
  would take half of them the row chooses anew. With `positions="original"` queries come turned by their positions, so
  that the cosine falls with the distance gone too; the paper compares queries that are not turned.
- Query heads are matched with the key heads that they attend to, h // (heads / key heads). The code matches
  h mod key heads, which are others in a model with grouped queries: `groups="modulo"`, for comparison.
- A run reads itself whole, also where it is longer than `recent`, and its tokens are no candidates. Chunks of a prefill
  that are multiples of `run` give what the whole gives.
- Of keys with even votes, by a tenth of a percent, the later one wins.
- No maximum over neighbouring keys (an option of the code, off). Nodes of a decoder's token tree vote each for itself,
  as do tokens of a static cache or under a mask of each query and key: there no selection is used again.

As in the paper keys are turned by their places among those that are read (`positions="compact"`), and vote as if
all stood `recent` tokens before the run. "original" keeps the positions of the text: nothing has to be turned again,
but the model must have been trained at that length.

It loses on short contexts, where the vote costs more than it saves; where heads need different keys, as all share one
set; and where a single token takes a head's whole vote, as there is no 1/sqrt(dim): lower `scale`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from pertoken.attend.history import Mark
from pertoken.attend.key_view import KeyView
from pertoken.attend.order import best
from pertoken.attend.selection import SITE, KeyPolicy
from pertoken.core.attach import Attachment
from pertoken.core.card import Paper, method
from pertoken.core.errors import BadRequest

VOTES = ("soft", "sum", "head")
GROUPS = ("division", "modulo")
SCORED = 2**26  # scores held at once; more runs than fit vote in turn


@method(
    question="attend",
    shape="policy",
    exactness="approximate",
    paper=Paper(
        "TokenSelect: Efficient Long-Context Inference and Length Extrapolation for LLMs via Dynamic Token-Level KV "
        "Cache Selection",
        "2411.02886",
    ),
    reads={"queries", "keys"},
    writes={"keys read"},
    baselines=("full", "random_keys", "sink_window", "block_topk"),
)
@dataclass(frozen=True)
class TokenSelect(KeyPolicy):
    """Read the keys that a soft vote of all heads picks, and pick anew only when the query has changed.

    reuse: cosine from which a selection is used again, above 1 never; vote: "soft", "sum" or "head"; scale: of the
    scores in the vote; groups: "division", or "modulo" as the paper's code.
    """

    positions: str = "compact"
    reuse: float = 0.9
    vote: str = "soft"
    scale: float = 1.0
    groups: str = "division"
    small: ClassVar[dict[str, Any]] = {**KeyPolicy.small, "run": 4}

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (("vote", VOTES), ("groups", GROUPS)):
            if getattr(self, name) not in allowed:
                raise BadRequest(f"{name}={getattr(self, name)!r} is unknown; choose one of {', '.join(allowed)}")
        if not self.scale > 0:
            raise BadRequest(f"scale={self.scale} would turn the vote around or void it; give a number above 0")

    def weigh(self, view: KeyView, index: Tensor) -> tuple[None, None]:
        return None, None

    def choose(self, view: KeyView, most: int, limits: Tensor) -> Tensor:
        if self.reuse <= 1 and view.runs.decoding:
            return self._decoded(view, most, limits)[:, None, None]
        view.state.pop("choice", None)
        kept, queries, keys = view.kept, view.mean_queries(self.recent), view.keys.detach()
        each = max(SCORED // (queries.shape[1] * keys.shape[2] * len(queries)), 1)
        chosen = []
        for at in range(0, view.runs.count, each):
            part = slice(at, at + each)
            mine = kept.candidates[:, part], kept.rank[:, part], kept.span
            chosen.append(self.elect(queries[:, :, part], keys, *mine, most, limits[:, part]))
        return torch.cat(chosen, 1)[:, None]

    def elect(
        self,
        queries: Tensor,
        keys: Tensor,
        candidates: Tensor,
        rank: Tensor,
        span: tuple[int, int, bool],
        most: int,
        limits: Tensor,
    ) -> Tensor:
        """`[batch, run, most]` columns, the best first. queries `[batch, heads, run, dim]`; keys `[batch, kv_heads,
        key, dim]`; candidates bool and rank (place in the text) `[batch, run, key]`; span: see `Kept`; limits `[batch,
        run]`: how many."""
        low, stop, all_of_it = span
        keys, rank = keys[:, :, low:stop], rank[..., low:stop]
        shut = None if all_of_it else ~candidates[..., low:stop]
        rows, _, runs, dim = queries.shape
        kv_heads = keys.shape[1]
        if self.groups == "division":
            asked = queries.view(rows, kv_heads, -1, runs, dim)
        else:
            asked = queries.view(rows, -1, kv_heads, runs, dim).transpose(1, 2)
        asked = asked.flatten(2, 3).to(keys.dtype)
        scores = products(asked, keys) if runs == 1 else torch.matmul(asked, keys.transpose(-1, -2))
        scores = scores.float().reshape(rows, -1, runs, keys.shape[2])
        if self.scale != 1:
            scores = scores * self.scale
        if self.vote == "sum":
            votes = scores.sum(1)
        else:
            if shut is not None:
                scores = scores.masked_fill_(shut[:, None], torch.finfo(scores.dtype).min)
            if self.vote == "soft":
                votes = scores.softmax(-1).sum(1)
            else:
                own = best(scores, rank[:, None], most)
                counted = (torch.arange(most, device=keys.device) < limits[:, None, :, None]).expand_as(own)
                votes = torch.zeros_like(scores).scatter_(-1, own, counted.float()).sum(1)
        if shut is not None:
            votes = votes.masked_fill(shut, -torch.inf)
        return low + best(votes, rank, most)

    def _decoded(self, view: KeyView, most: int, limits: Tensor) -> Tensor:
        """`[batch, most]` columns for the next token of each row: chosen before, or now."""
        kept, state = view.kept, view.state
        limits, counts, rank = limits[:, 0], kept.counts[:, 0], kept.rank[:, 0]
        query, keys = view.queries.detach().flatten(1).float(), view.keys.detach()
        choice: Choice | None = state.get("choice")
        if choice is None or choice.query.shape != query.shape:
            nothing = torch.zeros(len(query), 1, dtype=torch.long, device=query.device)
            choice = Choice(query, nothing, nothing[:, 0], Mark.now(view))
        whole = limits >= counts  # such a row reads everything, and chooses nothing that could be used again
        hit = (F.cosine_similarity(query, choice.query, dim=-1) >= self.reuse) & ~whole
        if bool(hit.any()):
            left = counts - choice.counts
            hit = hit & (left >= 0) & (2 * left <= limits) & choice.mark.holds(view)
        for name, rows in (("asked", ~whole), ("hits", hit)):
            state[name] = (rows & view.valid[:, 0]).sum() + state.get(name, 0)
        missed = (~hit & ~whole).nonzero().flatten()
        if len(missed) == len(query):
            mine = kept.candidates, kept.rank, kept.span
            fresh = self.elect(view.mean_queries(self.recent), keys, *mine, most, limits[:, None])
            state["choice"] = Choice(query, fresh[:, 0], counts, Mark.now(view))
            return fresh[:, 0]
        choice = replace(choice, counts=choice.counts.masked_fill(whole, 0))
        if len(missed):
            asked, fresh = view.mean_queries(self.recent), []
            for at in missed.tolist():  # one by one, as their keys would be copied to stand together
                row = slice(at, at + 1)
                mine = kept.candidates[row], kept.rank[row], kept.span
                fresh.append(self.elect(asked[row], keys[row], *mine, most, limits[row, None])[:, 0])
            choice = choice.put(missed, Choice(query, torch.cat(fresh), counts, Mark.now(view)))
        state["choice"] = choice
        return choice.columns_now(most, counts, rank, self.sinks)

    def reused(self, attached: Attachment) -> dict[int, tuple[int, int]]:
        """Of the last request, per layer: how many selections of decoded tokens were used again, of how many."""
        states = attached.state.get(SITE, {})
        return {layer: (int(s["hits"]), int(s["asked"])) for layer, s in states.items() if "asked" in s}


def products(asked: Tensor, keys: Tensor) -> Tensor:
    """`[batch, kv_heads, query, key]` of few queries `[batch, kv_heads, query, dim]` and all keys: nearly all of the
    time of a step, and on a CPU no form is fast in every precision."""
    if keys.device.type == "cpu" and keys.dtype != torch.float32:  # by head, 5x: a batch is compiled for each length
        heads = zip(asked.flatten(0, 1), (of for row in keys for of in row), strict=True)
        return torch.stack([one @ of.T for one, of in heads]).view(*asked.shape[:3], keys.shape[2])
    return torch.matmul(keys, asked.transpose(-1, -2)).transpose(-1, -2)  # keys first, 2x


@dataclass(frozen=True)
class Choice:
    """What each row chose last. query `[batch, heads * dim]`; columns `[batch, chosen]`, the best first; counts
    `[batch]`: candidates at that moment, 0 for a row that chose nothing; mark: of that moment."""

    query: Tensor
    columns: Tensor
    counts: Tensor
    mark: Mark

    def put(self, rows: Tensor, fresh: Choice) -> Choice:
        """With `rows` `[n]` as in `fresh`, whose columns are of these rows only."""
        query, counts = self.query.clone(), self.counts.clone()
        query[rows], counts[rows] = fresh.query[rows], fresh.counts[rows]
        width = max(self.columns.shape[1], fresh.columns.shape[1])
        columns = F.pad(self.columns, (0, width - self.columns.shape[1]))
        columns[rows, : fresh.columns.shape[1]] = fresh.columns
        return Choice(query, columns, counts, self.mark.put(rows, fresh.mark))

    def columns_now(self, most: int, counts: Tensor, rank: Tensor, sinks: int) -> Tensor:
        """`[batch, most]` columns: first the candidates that there are since, then the choices.

        counts `[batch]` candidates now; rank `[batch, key]`: places in the text, in which candidates follow on `sinks`.
        """
        left = (counts - self.counts).clamp(min=0)[:, None]
        slots = torch.arange(most, device=rank.device)
        columns = self.columns.gather(1, (slots - left).clamp(0, self.columns.shape[1] - 1))
        since = torch.searchsorted(rank, (sinks + 1 + self.counts)[:, None] + slots).clamp(max=rank.shape[1] - 1)
        return torch.where(slots < left, since, columns)
