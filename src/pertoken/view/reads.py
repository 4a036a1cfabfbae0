"""Reads: how often each token was read, off a trace of a policy that chooses keys; or kept, off one that evicts.

Data only; nothing is drawn here. Columns are a row's real tokens, its padding left out. A step is one next token, and
what it reads besides itself: of a policy that chooses keys what it read, of an eviction what was kept for it. A forward
of several tokens belongs to the prompt. Requests that a trace holds one after the other give their rows in order.

Texts are `trace.about["rows"]`, one per row, as `bench.texts.texts` makes them: {"prompt": pieces, "output": pieces}. A
row ends with its text. An eviction does not record what is padding: without texts a row begins at the first place that
was ever kept. Traces in which a decoder took tokens back have no fixed columns and are not read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pertoken.core.decision import Select
from pertoken.core.trace import Trace

READ, KEPT = "read", "kept"
SITES = {READ: "attend.keys.", KEPT: "attend.kept."}


@dataclass(frozen=True, eq=False)
class Reads:
    """One batch row. Shares are of layers and, in each, of the groups of heads that choose for themselves.

    verb: "read" or "kept"; prompt: how many columns are prompt; before `[step]` int: columns before the step's token,
    which it may read; share `[step, column]` float: which of them it read; by_layer `[layer, column]`: how often it was
    read in each of `layers`, of the steps that could; by_prompt `[column]`: how often by later tokens of the prompt,
    those of its own run left out, NaN where none is later or it was not recorded; pieces: texts of its tokens.
    """

    number: int
    verb: str
    prompt: int
    before: Tensor
    share: Tensor
    layers: tuple[int, ...]
    by_layer: Tensor
    by_prompt: Tensor
    pieces: Sequence[str] = ()

    @property
    def steps(self) -> int:
        return len(self.share)

    @property
    def length(self) -> int:
        """Columns; a text may have one token more, the last one, which nothing could read."""
        return self.share.shape[1]

    @cached_property
    def could(self) -> Tensor:
        """`[column]` steps that could read it."""
        return (torch.arange(self.length)[:, None] < self.before).sum(-1)

    @cached_property
    def often(self) -> Tensor:
        """`[column]` how often it was read, as a share of the steps that could, their layers and groups."""
        return self.share.sum(0) / self.could.clamp(min=1)

    @cached_property
    def keys(self) -> Tensor:
        """`[step]` keys that a layer and head read besides the token itself, on average: what memory is read for."""
        return self.share.sum(-1)

    @property
    def part(self) -> float:
        """Share of the keys that could be read, over all steps."""
        return float(self.share.sum()) / max(int(self.before.sum()), 1)


def reads(trace: Trace) -> list[Reads]:
    """The rows in order; empty for a trace of another kind."""
    texts = trace.about.get("rows") or []
    for verb, site in SITES.items():
        steps = [(int(one.site.removeprefix(site)), one.decision) for one in trace.steps if one.site.startswith(site)]
        forwards = list(_forwards((layer, one) for layer, one in steps if isinstance(one, Select)))
        found: list[Reads] = []
        for request in (_chosen if verb == READ else _evicted)(forwards):
            if request is None:
                return []
            found += request.rows(verb, len(found), texts[len(found) :])
        if found:
            return found
    return []


Forward = dict[int, Select]


def _forwards(steps: Iterable[tuple[int, Select]]) -> Iterator[Forward]:
    """The decisions of each forward by layer: its layers come in order."""
    now: Forward = {}
    for layer, decision in steps:
        if now and layer <= max(now):
            yield now
            now = {}
        now[layer] = decision
    if now:
        yield now


@dataclass
class _Request:
    """Forwards of one batch. real `[row, column]`: columns with real tokens; steps: forwards of a next token; before
    `[row, step]`: columns before that token, -1 where the row has none; prompt: forwards of several tokens, each with
    its first column; padded: whether `real` tells padding, else it begins at the first place that was ever kept."""

    real: Tensor
    steps: list[Forward]
    before: Tensor
    prompt: list[tuple[int, Forward]]
    padded: bool

    def rows(self, verb: str, first: int, texts: Sequence[dict[str, Any]]) -> list[Reads]:
        """Its rows, numbered from `first`, without padding and what is behind their texts."""
        rows, columns = self.real.shape
        told = [texts[row] if row < len(texts) else {} for row in range(rows)]
        prompts = [list(one.get("prompt") or ()) for one in told]
        pieces = [[*prompt, *(one.get("output") or ())] for prompt, one in zip(prompts, told, strict=True)]
        lengths = torch.tensor([len(own) or columns + 1 for own in pieces])[:, None]
        real = self.real if self.padded or not any(pieces) else self._behind(prompts)
        ranks = F.pad(real.long().cumsum(-1), (1, 0))  # real tokens before each column
        real = real & (ranks[:, :-1] < lengths)
        before = ranks.gather(1, self.before.clamp(min=0))
        before = torch.where((self.before >= 0) & (before < lengths), before, -1)
        share, by_layer = self._shares(before >= 0)
        by_prompt, found = self._by_prompt(), []
        for row, own in enumerate(real):
            here = before[row] >= 0
            could = (torch.arange(int(own.sum()))[:, None] < before[row, here]).sum(-1)
            prompt = len(prompts[row]) if pieces[row] else int(before[row, here][0]) if here.any() else int(own.sum())
            found.append(
                Reads(
                    number=first + row,
                    verb=verb,
                    prompt=prompt,
                    before=before[row, here],
                    share=share[row, here][:, own],
                    layers=self.layers,
                    by_layer=by_layer[row][:, own] / could.clamp(min=1),
                    by_prompt=by_prompt[row, own],
                    pieces=pieces[row],
                )
            )
        return found

    @property
    def layers(self) -> tuple[int, ...]:
        every = [*self.steps, *(forward for _, forward in self.prompt)]
        return tuple(sorted({layer for forward in every for layer in forward}))

    def _behind(self, prompts: Sequence[Sequence[str]]) -> Tensor:
        """`real` for prompts of known lengths, the longest of which is not padded unless all are."""
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        whole = self.before.amax(0)
        whole = whole[whole >= lengths.amax()]
        end = whole[0] if len(whole) else lengths.amax()
        return torch.arange(self.real.shape[1]) >= (end - lengths)[:, None]

    def _shares(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        """`[row, step, column]` share of layers and groups, `[row, layer, column]` sums over the steps that count, both
        of columns before the step's token."""
        rows, columns = self.real.shape
        share, by_layer = torch.zeros(rows, len(self.steps), columns), torch.zeros(rows, len(self.layers), columns)
        for number, forward in enumerate(self.steps):
            others = torch.arange(columns) < self.before[:, number, None]
            for layer, decision in forward.items():
                hits = _hits(decision.index[:, :, :1], torch.ones(rows, 1), columns) * others
                hits *= counts[:, number, None]
                share[:, number] += hits / len(forward)
                by_layer[:, self.layers.index(layer)] += hits
        return share, by_layer

    def _by_prompt(self) -> Tensor:
        """`[row, column]` how often later queries of the prompt read it, NaN where none is later."""
        rows, columns = self.real.shape
        read, later = torch.zeros(rows, columns), torch.zeros(rows, columns)
        for first, forward in self.prompt:
            for decision in forward.values():
                order = torch.arange(decision.index.shape[2]) * decision.length[:, None]
                queries = (decision.valid.sum(-1, keepdim=True) - order).clamp(min=0).minimum(decision.length[:, None])
                starts = order + first + decision.valid.int().argmax(-1, keepdim=True)
                earlier = decision.index < starts[:, None, :, None]
                read += _hits(decision.index.where(earlier, -1), queries.float(), columns)
                ends = torch.zeros(rows, columns + 1).scatter_add_(1, starts.clamp(max=columns), queries.float())
                later += ends.flip(-1).cumsum(-1).flip(-1)[:, 1:]
        return torch.where(later > 0, read / later, torch.nan)


def _hits(index: Tensor, weight: Tensor, columns: int) -> Tensor:
    """`[row, column]` weight `[row, run]` of the runs that chose it, over the groups on average. index `[row, group,
    run, chosen]`, -1 for none."""
    weight = (weight[:, None, :, None] / index.shape[1]).expand(index.shape)
    places = torch.where(index < 0, columns, index).flatten(1)
    return torch.zeros(len(index), columns + 1).scatter_add_(1, places, weight.flatten(1))[:, :-1]


def _chosen(forwards: Sequence[Forward]) -> Iterator[_Request | None]:
    """The requests of a policy that chooses keys; None if tokens were taken back. A query always reads itself, so its
    own column is the largest that was chosen for it."""
    spans, now = [], []
    for forward in forwards:
        one = next(iter(forward.values()))
        asked = one.valid.any(-1)
        if not asked.any():
            continue
        slots = (torch.arange(one.valid.shape[1]) * one.valid).amax(-1)
        first = int((one.index.flatten(1).amax(-1) - slots)[asked].amax())
        if now and first == 0:
            spans.append(now)
            now = []
        now.append((first, one.valid, forward))
    for request in [*spans, now] if now else spans:
        ends = [first + valid.shape[1] for first, valid, _ in request]
        if any(first < end for (first, _, _), end in zip(request[1:], ends, strict=False)):
            yield None
            return
        real = torch.zeros(len(request[0][1]), max(ends), dtype=torch.bool)
        for first, valid, _ in request:
            real[:, first : first + valid.shape[1]] = valid
        single = [(first, valid, forward) for first, valid, forward in request if valid.shape[1] == 1]
        before = [torch.where(valid[:, 0], first, -1) for first, valid, _ in single]
        yield _Request(
            real=real,
            steps=[forward for _, _, forward in single],
            before=torch.stack(before, 1) if before else torch.zeros(len(real), 0, dtype=torch.long),
            prompt=[(first, forward) for first, valid, forward in request if valid.shape[1] > 1],
            padded=True,
        )


def _evicted(forwards: Sequence[Forward]) -> Iterator[_Request]:
    """The requests of an eviction: a new one begins where what was gone is back, or the latest places are."""
    now: list[tuple[Forward, int]] = []
    kept = torch.zeros(0, 0, dtype=torch.bool)
    for forward in forwards:
        columns = int(max(one.index.amax() for one in forward.values())) + 1
        held = torch.stack([_hits(one.index, torch.ones(len(one.index), 1), columns) for one in forward.values()])
        held = (held > 0).any(0)
        if now and _begins(kept, held, now[-1][1]):
            yield _kept(now)
            now = []
        now.append((forward, max(columns, now[-1][1] + 1 if now else 0)))
        kept = held
    if now:
        yield _kept(now)


def _begins(kept: Tensor, held: Tensor, seen: int) -> bool:
    """Whether what is held `[row, column]` now does not follow from what was, of `seen` columns."""
    if len(kept) != len(held):
        return True
    both = min(kept.shape[1], held.shape[1])
    back = held[:, :both] & ~kept[:, :both]
    fewer = held.shape[1] < kept.shape[1] and int(held.sum()) < int(kept.sum())
    return fewer or bool(back.any()) or bool(held[:, both:seen].any())


def _kept(request: Sequence[tuple[Forward, int]]) -> _Request:
    columns = request[-1][1]
    every = [one.index for forward, _ in request for one in forward.values()]
    held = sum(_hits(index, torch.ones(len(index), 1), columns) for index in every)
    assert isinstance(held, Tensor)
    seen = torch.tensor([seen for _, seen in request])
    return _Request(
        real=(held > 0).int().cummax(-1).values.bool(),
        steps=[forward for forward, _ in request],
        before=seen.expand(len(held), -1),
        prompt=[],
        padded=False,
    )
