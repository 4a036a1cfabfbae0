"""Depths: how many layers each token of an output ran, off a trace of a policy that chooses layers before a forward
(`depth.layers`) or lets tokens leave between them (`depth.exits`); of one that chooses feed-forward blocks
(`depth.modules`), in how many a token ran the layer's own one.

Data only; nothing is drawn here. A token's layers are those of the forward that it came out of. A forward of several
tokens belongs to the prompt, unless one of a single token came before it: then a decoder of token trees ran, whose
tokens have no fixed places, and the trace is not read; nor is one in which rows left the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pertoken.core.decision import Depth, Exit
from pertoken.core.trace import Trace


@dataclass(frozen=True, eq=False)
class Depths:
    """One batch row. depth: of the model, in layers; layers `[token]` tuples: which of them the token ran, None where
    it is not known; stopped `[token]` bool: whether the policy ended the text with it; pieces: texts of its tokens."""

    number: int
    depth: int
    layers: tuple[tuple[int, ...] | None, ...]
    stopped: tuple[bool, ...]
    prompt_pieces: Sequence[str] = ()
    pieces: Sequence[str] = ()

    @property
    def counts(self) -> list[int]:
        """Layers run, of the tokens of which that is known."""
        return [len(own) for own in self.layers if own is not None]

    def told(self, place: int) -> str:
        """What a token ran, for a tooltip."""
        own = self.layers[place]
        if own is None:
            return "not recorded"
        name = f"ran {len(own)} of {self.depth} layers" + (f": {spans(own)}" if len(own) < self.depth else "")
        return f"{name}; ended the text" if self.stopped[place] else name


def spans(numbers: Sequence[int]) -> str:
    """Rising numbers with runs drawn together: 0, 3–5."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][-1] + 1:
            found[-1].append(number)
        else:
            found.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in found) or "none"


def depths(trace: Trace) -> list[Depths]:
    """The rows in order; empty for a trace of another kind, or one that is not read."""
    forwards = list(_forwards(trace))
    singles = [valid.shape[1] == 1 for valid, _, _ in forwards]
    if not forwards or True not in singles or False in singles[singles.index(True) :]:
        return []
    first = singles.index(True)
    rows = {len(valid) for valid, _, _ in forwards}
    if len(rows) > 1:
        return []
    texts: list[dict[str, Any]] = trace.about.get("rows") or []
    found = []
    for row in range(rows.pop()):
        told = texts[row] if row < len(texts) else {}
        prompt, pieces = told.get("prompt") or [], told.get("output") or []
        read = sum(int(valid[row].sum()) for valid, _, _ in forwards[:first])
        own = [(ran[row, 0], bool(stop[row, 0])) for _, ran, stop in forwards[first:]]
        if first and (not prompt or read == len(prompt)):  # the first token came out of the prompt
            valid, ran, stop = forwards[first - 1]
            last = int(valid[row].nonzero().max()) if valid[row].any() else 0
            own = [(ran[row, last], bool(stop[row, last])), *own]
        if pieces:
            own = own[: len(pieces)]
        layers: list[tuple[int, ...] | None] = [tuple(ran.nonzero().flatten().tolist()) for ran, _ in own]
        layers += [None] * (len(pieces) - len(own))
        stopped = [stop for _, stop in own] + [False] * (len(pieces) - len(own))
        found.append(Depths(row, forwards[0][1].shape[-1], tuple(layers), tuple(stopped), prompt, pieces))
    return found


Forward = tuple[Tensor, Tensor, Tensor]  # valid [batch, token]; ran [batch, token, layer]; stopped [batch, token]


def _forwards(trace: Trace) -> Iterator[Forward]:
    """What each forward decided; of one with several decisions on leaving, the last."""
    exits = [(int(s.site.rsplit(".", 1)[1]), s.decision) for s in trace.steps if isinstance(s.decision, Exit)]
    depth = max((int(one.left.abs().max()) for _, one in exits), default=0)
    for number, (ran, one) in enumerate(exits):
        if number + 1 == len(exits) or exits[number + 1][0] <= ran:
            yield one.valid, torch.arange(depth) < one.left.abs()[..., None], one.left < 0
    for step in trace.steps:
        if isinstance(step.decision, Depth) and step.site in ("depth.layers", "depth.modules"):
            yield step.decision.valid, step.decision.layers, torch.zeros_like(step.decision.valid)
    single = [(s.site, s.decision) for s in trace.steps if s.site.startswith("depth.modules.")]
    count = len({site for site, _ in single})  # a decision for each layer
    for start in range(0, len(single), count or 1):
        own = [one for _, one in single[start : start + count] if isinstance(one, Depth)]
        yield own[0].valid, torch.cat([one.layers for one in own], -1), torch.zeros_like(own[0].valid)
