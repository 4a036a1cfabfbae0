"""Fills: when each position of a canvas was committed and when it was computed, off a trace of the denoising loop; and
when each token of a text was inserted, off one of insertions.

Data only; nothing is drawn here. A step of the loop records one decision on what it computed and one on what it
committed, for the rows that were still open. The canvas begins at the first column that any row ever committed. A step
of insertions records behind which positions tokens were put; positions here are those of the finished text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pertoken.core.decision import Decision, Depth, Keep
from pertoken.core.trace import Step, Trace
from pertoken.denoise import COMMIT, INSERT, REFRESH

GIVEN = "⟨given⟩"


@dataclass(frozen=True, eq=False)
class Fill:
    """One batch row. Columns are its real prompt tokens, then the canvas; steps count from 1.

    prompt: how many columns are prompt; committed `[position]` int: the step of each canvas position, 0 where it was
    cut off undecided; computed `[step, column]` float: share of the layers run on it; block `[step]`: the block that
    was open; tokens `[position]`: ids, None where nothing was committed or none was recorded; pieces: texts of the
    prompt's tokens, and of the output's, one per position up to its end. Of insertions, whose whole text is canvas:
    given `[position]`: what was there from the start, committed at step 0; stop `[step]`: P(stop).
    """

    number: int
    prompt: int
    committed: Tensor
    computed: Tensor
    block: tuple[int, ...]
    tokens: tuple[int | None, ...]
    prompt_pieces: Sequence[str] = ()
    pieces: Sequence[str] = ()
    given: Tensor | None = None
    stop: tuple[float, ...] = ()

    @property
    def verb(self) -> str:
        """What happens to a position at its step."""
        return "committed" if self.given is None else "inserted"

    @property
    def text(self) -> list[tuple[int, str, int]]:
        """What can be read of the output: positions, their text or id, and the step that committed them."""
        steps = self.committed.tolist()
        if self.pieces:
            return [(place, piece, steps[place]) for place, piece in enumerate(self.pieces[: self.length])]
        given = [False] * self.length if self.given is None else self.given.tolist()
        named = [GIVEN if known else f"⟨{token}⟩" for known, token in zip(given, self.tokens, strict=True)]
        shown = [known or token is not None for known, token in zip(given, self.tokens, strict=True)]
        return [(place, name, steps[place]) for place, name in enumerate(named) if shown[place]]

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
    if inserts := list(trace.at(INSERT)):
        return _inserted(inserts, trace.about.get("rows") or [])
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


def _inserted(steps: list[Step], texts: list[dict[str, Any]]) -> list[Fill]:
    rows = sorted({row for step in steps for row in step.rows})
    found = []
    for row in rows:
        own = [(step.rows.index(row), step) for step in steps if row in step.rows]
        found.append(_grown(row, own, texts[row].get("output") or () if row < len(texts) else ()))
    return found


def _grown(row: int, own: list[tuple[int, Step]], pieces: Sequence[str]) -> Fill:
    """A row of insertions, without the token that begins it and its gap markers, which are open before the first."""
    at, first = own[0]
    assert isinstance(first.decision, Keep)
    markers = first.decision.valid[at]
    given = _noted(first, "given", at, len(markers) - int(markers.sum()))
    opened = [*markers.tolist(), *[False] * len(markers)][: given + int(markers.sum())]
    line: list[tuple[int, int | None] | None] = [None if marker else (0, None) for marker in opened]
    for number, (at, step) in enumerate(own, 1):
        places = _keep(step.decision)[at].nonzero().flatten().tolist()
        tokens = _noted(step, "tokens", at, [None] * len(places))
        for place, token in reversed(list(zip(places, tokens, strict=True))):
            line.insert(place + 1, (number, token))
    born = [one for one in line[1:] if one is not None]
    committed = torch.tensor([step for step, _ in born], dtype=torch.long)
    return Fill(
        number=row,
        prompt=0,
        committed=committed,
        computed=(torch.arange(1, len(own) + 1)[:, None] > committed).float(),
        block=(0,) * len(own),
        tokens=tuple(token for _, token in born),
        pieces=pieces[max(len(pieces) - len(born), 0) :],
        given=committed == 0,
        stop=tuple(_noted(step, "stop", at, 0.0) for at, step in own),
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
