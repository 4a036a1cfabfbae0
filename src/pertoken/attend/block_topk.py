"""Pages of keys by their summaries: each key head reads the pages of which a bound says the most (as Quest, arXiv
2406.10774).

Candidates, all keys but the first `sinks` and the last `recent`, are cut into pages of `page` in the order of the text.
With q_h the mean query of the run at head h (in decoding the query itself) and k[j] the keys of the candidates j of a
page:

    summary="bound":  score[page, h] = sum_d max(q_h[d] * max_j k[j, d], q_h[d] * min_j k[j, d]) >= max_j q_h . k[j]
    summary="mean":   score[page, h] = q_h . mean_j k[j]

A key head reads the pages with the best score of any of its query heads until its budget is spent; of the last one, the
first keys. Decoding reads one summary per page, 2 / page of the bytes of the keys, and keeps those of full pages from
step to step.

Differs from the paper: several query heads share a key head and so its pages; a prefill chooses too, by runs; no layers
are left dense. It loses where single keys matter, as each brings its page along.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from pertoken.attend.history import Mark
from pertoken.attend.key_view import KeyView
from pertoken.attend.order import best
from pertoken.attend.selection import KeyPolicy
from pertoken.attend.sight import Causal, Kept, Runs, packed
from pertoken.core.card import Paper, method
from pertoken.core.errors import BadRequest

SUMMARIES = ("bound", "mean")
ROOM = 64  # pages that a table grows by


@method(
    question="attend",
    shape="policy",
    exactness="approximate",
    paper=Paper("Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference", "2406.10774"),
    reads={"queries", "keys"},
    writes={"keys read"},
    baselines=("full", "random_keys", "sink_window"),
    baseline=True,
)
@dataclass(frozen=True)
class BlockTopK(KeyPolicy):
    """Read the best pages of keys, by the bound of each page's scores or by its mean key; `page` in tokens."""

    page: int = 16
    summary: str = "bound"
    small: ClassVar[dict[str, Any]] = {**KeyPolicy.small, "run": 4, "page": 2}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.summary not in SUMMARIES:
            raise BadRequest(f"summary={self.summary!r} is unknown; choose one of {', '.join(SUMMARIES)}")
        if self.page < 1:
            raise BadRequest(f"page={self.page} is too small; give 1 or more tokens")

    def weigh(self, view: KeyView, index: Tensor) -> tuple[None, None]:
        return None, None

    def choose(self, view: KeyView, most: int, limits: Tensor) -> Tensor:
        known = view.kept.worked_out
        if self.page not in known:
            known[self.page] = Pages(view.runs, view.kept, self.page)
        pages: Pages = known[self.page]
        queries, keys = view.mean_queries(self.recent), view.keys.detach()
        rows, _, runs, dim = queries.shape
        asked = queries.view(rows, keys.shape[1], -1, runs, dim)
        if self.summary == "bound":
            asked = torch.cat((asked.clamp(min=0), asked.clamp(max=0)), -1)
        asked = asked.to(keys.dtype)
        table = self.table(view, keys, pages)[:, :, : pages.count]
        scores = torch.matmul(asked.flatten(2, 3), table.transpose(-1, -2)).float().unflatten(2, (-1, runs)).amax(2)
        beyond = torch.arange(pages.count, device=keys.device) >= pages.full[:, None, :, None]
        scores = scores.masked_fill(beyond, -torch.inf)
        if pages.rest.shape[2]:
            rest = self.summaries(keys, pages.rest, pages.resting)
            last = torch.matmul(asked.transpose(2, 3), rest.transpose(-1, -2)).float().amax(3)
            scores = torch.cat((scores, last.masked_fill(~pages.resting.any(-1)[:, None], -torch.inf)), -1)
        order = torch.arange(scores.shape[-1], device=keys.device)
        return pages.keys(best(scores, order, min(-(-most // self.page) + 1, len(order))))[..., :most]

    def summaries(self, keys: Tensor, columns: Tensor, real: Tensor) -> Tensor:
        """`[batch, kv_heads, ..., page, dim]` of pages `[batch, ..., page, slot]` of columns, of which `real` count;
        with "bound" the greatest and then the least of each dimension, twice as many numbers."""
        row = torch.arange(len(keys), device=keys.device)[:, None]
        found = keys.transpose(1, 2)[row, columns.flatten(1)].transpose(1, 2).unflatten(2, columns.shape[1:])
        real = real[:, None, ..., None]
        if self.summary == "mean":
            return (found.float().masked_fill(~real, 0).sum(-2) / real.sum(-2).clamp(min=1)).to(keys.dtype)
        bounds = found.masked_fill(~real, -torch.inf).amax(-2), found.masked_fill(~real, torch.inf).amin(-2)
        return torch.cat(bounds, -1).masked_fill(~real.any(-2), 0)

    def table(self, view: KeyView, keys: Tensor, pages: Pages) -> Tensor:
        """`[batch, kv_heads, page, dim]` summaries of full pages; those of earlier forwards of a text are kept."""
        sight, table = view.runs.sight, view.state.pop("table", None)
        if not isinstance(sight, Causal):
            return self.summaries(keys, *pages.at(torch.arange(pages.count, device=keys.device).expand(len(keys), -1)))
        full = pages.full.amax(1)
        end, new = sight.first + sight.queries, -1
        if table is not None:
            new = table.lacks(view, end, full)
        if table is None or new < 0:
            made = self.summaries(keys, *pages.at(torch.arange(pages.count, device=keys.device).expand(len(keys), -1)))
        else:
            made = table.summaries
            if made.shape[2] < pages.count:
                made = F.pad(made, (0, 0, 0, pages.count + ROOM - made.shape[2]))
            if new:
                last = (full[:, None] - new + torch.arange(new, device=keys.device)).clamp(min=0)
                fresh = self.summaries(keys, *pages.at(last))
                made.scatter_(2, last[:, None, :, None].expand_as(fresh), fresh)
        view.state["table"] = Table(made, end, full, Mark.now(view))
        return made


@dataclass(frozen=True)
class Table:
    """summaries `[batch, kv_heads, page, dim]`, with room for more; end: columns that there were; full `[batch]`: full
    pages that there were; mark: of then."""

    summaries: Tensor
    end: int
    full: Tensor
    mark: Mark

    def lacks(self, view: KeyView, end: int, full: Tensor) -> int:
        """How many pages the row that grew most has that are not here; -1 if some row is not the one that it was."""
        known = self.summaries
        if len(known) != len(view.keys) or end <= self.end or known.is_inference() > torch.is_inference_mode_enabled():
            return -1
        new = (full - self.full).max().clamp(min=0)
        return int(torch.where(self.mark.holds(view).all(), new, -1))


class Pages:
    """Candidates in pages of `size`. full `[batch, run]`: full pages, which all runs that have them share; count: the
    most of these; rest and resting `[batch, run, page, slot]`: columns of each run's other candidates, and which slots
    hold one."""

    def __init__(self, runs: Runs, kept: Kept, size: int):
        candidates = kept.candidates
        if isinstance(runs.sight, Causal):  # each run has the candidates of the one before it, and more
            shared = candidates.any(1)
        else:
            none = ~runs.real.any(-1)
            shared = (candidates | none[..., None]).all(1) & ~none.all(1, keepdim=True)
        self.size, self.numbers = size, shared.cumsum(-1)
        self.full = (candidates & shared[:, None]).sum(-1) // size
        self.count = int(self.full.max())
        rest = packed(candidates & ~(shared[:, None] & (self.numbers[:, None] <= self.full[..., None] * size)))
        rest = F.pad(rest, (0, -rest.shape[-1] % size), value=-1).unflatten(-1, (-1, size))
        self.rest, self.resting = rest.clamp(min=0), rest >= 0

    def at(self, page: Tensor) -> tuple[Tensor, Tensor]:
        """Columns `[batch, ..., slot]` of full pages `[batch, ...]`, and that all of them count."""
        wanted = (page[..., None] * self.size + torch.arange(self.size, device=page.device) + 1).flatten(1)
        found = torch.searchsorted(self.numbers, wanted).clamp(max=self.numbers.shape[1] - 1)
        columns = found.view(*page.shape, self.size)
        return columns, torch.ones_like(columns, dtype=torch.bool)

    def keys(self, page: Tensor) -> Tensor:
        """`[batch, group, run, slot]` columns of pages `[batch, group, run, page]`, of which those from `count` on are
        the rest; what is no candidate stands last."""
        columns, _ = self.at(page)
        real = (page < self.full[:, None, :, None])[..., None].expand_as(columns)
        if self.rest.shape[2]:
            where = (page - self.count).clamp(min=0)[..., None].expand_as(columns)
            mine = [
                x[:, None].expand(-1, page.shape[1], -1, -1, -1).gather(3, where) for x in (self.rest, self.resting)
            ]
            other = (page >= self.count)[..., None]
            columns, real = torch.where(other, mine[0], columns), torch.where(other, mine[1], real)
        order = (~real).flatten(3).to(torch.uint8).argsort(dim=-1, stable=True)
        return columns.flatten(3).gather(-1, order)
