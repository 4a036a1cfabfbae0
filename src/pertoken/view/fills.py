"""Fills: when each position of a canvas was committed and when it was computed, off a trace of the denoising loop.

Data only; nothing is drawn here. A step of the loop records one decision on what it computed and one on what it
committed, for the rows that were still open. The canvas begins at the first column that any row ever committed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pertoken.core.decision import Decision, Depth, Keep
from pertoken.core.trace import Step, Trace
from pertoken.denoise import COMMIT, REFRESH


@dataclass(frozen=True, eq=False)
class Fill:
    """One batch row. Columns are its real prompt tokens, then the canvas; steps count from 1.

    prompt: how many columns are prompt; committed `[position]` int: the step of each canvas position, 0 where it was
    cut off undecided; computed `[step, column]` float: share of the layers run on it; block `[step]`: the block that
    was open; tokens `[position]`: ids, None where nothing was committed or none was recorded; pieces: texts of the
    prompt's tokens, and of the output's, one per position up to its end.
    """

    number: int
    prompt: int
    committed: Tensor
    computed: Tensor
    block: tuple[int, ...]
    tokens: tuple[int | None, ...]
    prompt_pieces: Sequence[str] = ()
    pieces: Sequence[str] = ()

    @property
    def text(self) -> list[tuple[int, str, int]]:
        """What can be read of the output: positions, their text or id, and the step that committed them."""
        steps = self.committed.tolist()
        if self.pieces:
            return [(place, piece, steps[place]) for place, piece in enumerate(self.pieces[: self.length])]
        return [(place, f"⟨{token}⟩", steps[place]) for place, token in enumerate(self.tokens) if token is not None]

    @property
    def steps(self) -> int:
        return len(self.computed)

    @property
    def length(self) -> int:
        """Positions of the canvas."""
        return len(self.committed)

    @property
    def again(self) -> Tensor:
        """`[position]` how many times it was computed after the step that committed it."""
        step = torch.arange(1, self.steps + 1)[:, None]
        after = (step > self.committed) & (self.committed > 0)
        return ((self.computed[:, self.prompt :] > 0) & after).sum(0)

    @property
    def borders(self) -> list[int]:
        """First positions of the blocks after the first."""
        block = torch.tensor(self.block)[(self.committed - 1).clamp(min=0)].masked_fill(self.committed == 0, -1)
        found = [int((block == b).nonzero()[0]) for b in sorted(set(block.tolist()) - {-1})]
        return sorted(found)[1:]


@dataclass(frozen=True)
class Spent:
    """Over all rows. steps: forwards; row_steps: the same per row; committed: positions; computed: positions, a layer's
    share each; whole: what computing every column at every step would have been."""

    steps: int
    row_steps: int
    committed: int
    computed: float
    whole: int


def fills(trace: Trace) -> list[Fill]:
    """The rows in order; empty for a trace of another kind."""
    commits, refreshes = list(trace.at(COMMIT)), list(trace.at(REFRESH))
    if not commits or len(commits) != len(refreshes):
        return []
    every = torch.stack([_keep(step.decision).any(0) for step in commits]).any(0)
    start = int(every.int().argmax())
    rows = sorted({row for step in commits for row in step.rows})
    given = trace.about.get("rows") or []
    return [_fill(row, start, commits, refreshes, given[row] if row < len(given) else {}) for row in rows]


def _fill(row: int, start: int, commits: list[Step], refreshes: list[Step], texts: dict[str, Any]) -> Fill:
    own = [
        (step.rows.index(row), step, work) for step, work in zip(commits, refreshes, strict=True) if row in step.rows
    ]
    at, first, _ = own[0]
    real = first.decision.valid[at].clone()
    real[start:] = True  # behind its end a canvas stays a canvas
    chosen = torch.stack([_keep(step.decision)[at] for at, step, _ in own])[:, start:]
    order = torch.arange(1, len(own) + 1)[:, None]
    tokens: list[int | None] = [None] * chosen.shape[1]
    for (at, step, _), places in zip(own, chosen, strict=True):
        for place, token in zip(places.nonzero().flatten().tolist(), _noted(step, "tokens", at, ()), strict=False):
            tokens[place] = token
    return Fill(
        number=row,
        prompt=int(real[:start].sum()),
        committed=(chosen * order).amax(0),
        computed=torch.stack([_share(work.decision)[at] for at, _, work in own])[:, real],
        block=tuple(_noted(step, "block", at, 0) for at, step, _ in own),
        tokens=tuple(tokens),
        prompt_pieces=texts.get("prompt") or (),
        pieces=texts.get("output") or (),
    )


def _noted(step: Step, name: str, at: int, default: Any) -> Any:
    """What a step's note says about its row `at`."""
    values = step.note.get(name)
    return default if values is None else values[at]


def _keep(decision: Decision) -> Tensor:
    assert isinstance(decision, Keep)
    return decision.keep & decision.valid


def _share(decision: Decision) -> Tensor:
    """`[row, column]` share of the layers that were run."""
    if isinstance(decision, Depth):
        return (decision.layers & decision.valid[..., None]).float().mean(-1)
    return _keep(decision).float()


def spent(found: Sequence[Fill]) -> Spent:
    """The figures that a caption needs."""
    return Spent(
        steps=max((fill.steps for fill in found), default=0),
        row_steps=sum(fill.steps for fill in found),
        committed=sum(int((fill.committed > 0).sum()) for fill in found),
        computed=sum(float(fill.computed.sum()) for fill in found),
        whole=sum(fill.computed.numel() for fill in found),
    )
