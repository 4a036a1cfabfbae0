"""What benches look at while a diffusion model runs: drift between steps, similarity, distance from a full forward."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pertoken.denoise.canvas import Canvas
from pertoken.denoise.elastic_cache import Axis, Drift, ElasticCache, similarity
from pertoken.denoise.model import DiffusionModel
from pertoken.denoise.rules import RefreshRule
from pertoken.denoise.watch import Watch

AXES: tuple[Axis, ...] = ("heads", "keys")
WINDOW, EVERY = 16, 8  # of the sliding block; steps between two comparisons of what may be reused


@dataclass
class Probe(Watch):
    """Runs the rule's narrow forward, asks for everything from layer 0, and notes what the narrow one did not know.

    Per step: sigma by axis, drift (1 - cosine, mean of keys and values, between this step and the last) of what would
    have been reused, of the tracked and of all decided tokens, each `[layer, row]`; mass: attention of the window to
    masks beyond twice its size, `[layer, row]`; shift: KL divergence of the window's predictions when the masks next
    behind the window, and when as many at the far end of the canvas are reused, `[row]` each.
    """

    drift: Drift = field(default_factory=lambda: Drift(ElasticCache(window=WINDOW)))
    notes: dict[str, list[Tensor]] = field(default_factory=dict)
    old: Any = None

    def wanted(self, canvas: Canvas) -> Tensor:
        return self.drift.wanted(canvas)

    def group(self, model: DiffusionModel, canvas: Canvas) -> int:
        self.drift.group(model, canvas)
        return model.depth

    def before(self, model: DiffusionModel, canvas: Canvas, first: int, last: int) -> None:
        assert model.states is not None and self.drift.tracked is not None
        self.old = (model.cache.buffer.clone(), model.states[-1:].clone(), self.drift.tracked.clone())
        self.drift.before(model, canvas, first, last)

    def after(self, model: DiffusionModel, canvas: Canvas, first: int, last: int) -> Tensor:
        now, seen = model.attention(canvas, self.drift.columns, first, last)
        assert self.drift.old is not None
        for axis in AXES:
            self.note(axis, similarity(self.drift.old, now, seen, self.drift.real, axis))
        return torch.zeros_like(canvas.step)

    def finish(self, model: DiffusionModel, canvas: Canvas) -> None:
        if self.old is not None:
            self.look(model, canvas, *self.old)
        self.old = None
        self.drift.finish(model, canvas)

    def look(self, model: DiffusionModel, canvas: Canvas, buffer: Tensor, outputs: Tensor, tracked: Tensor) -> None:
        pairs = (x[..., :-1, :].transpose(3, 4).flatten(4) for x in (buffer, model.cache.buffer))
        moved = 1 - torch.nn.functional.cosine_similarity(*pairs, dim=-1).mean(1)  # [layer, row, column]
        last = canvas.decided_last
        decided = canvas.valid & ~canvas.masked & ~last
        asked = canvas.masked & canvas.in_block
        for name, where in (
            ("reused", canvas.valid & ~last & ~tracked & ~asked),
            ("tracked", tracked & ~last),
            ("decided", decided),
        ):
            self.note(name, moved.masked_fill(~where, 0).sum(-1) / where.sum(-1))
        places = canvas.block_columns
        read = model.attention(canvas, (places - model.shift).clamp(min=0), 0, model.depth)[0]
        far = canvas.masked & (canvas.masked.long().cumsum(-1) > 2 * WINDOW)
        asks = canvas.masked.gather(1, places)
        mass = read.masked_fill(~far[:, None, None, : read.shape[-1]], 0).sum(-1).mean(2)
        self.note("mass", mass.masked_fill(~asks, 0).sum(-1) / asks.sum(-1))
        left = canvas.masked.sum(-1)
        if int(canvas.step[0]) % EVERY or int(left.min()) < 3 * WINDOW:
            return
        rank = canvas.masked.long().cumsum(-1)
        near = canvas.masked & (rank > WINDOW) & (rank <= 2 * WINDOW)
        back = canvas.masked & (rank > left[:, None] - WINDOW)
        exact = model.logits(places)
        for name, kept in (("near", near), ("far", back)):
            other = DiffusionModel(model.stack.adapter, canvas, model.shift)
            other.cache.buffer, other.states, other.known = buffer.clone(), outputs.clone(), canvas.valid.clone()
            kept = kept | torch.nn.functional.pad(kept[:, : canvas.width - model.shift], (model.shift, 0))
            other.forward(canvas, canvas.valid & ~kept)
            self.note(name, divergence(exact, other.logits(places)).mean(-1))

    def note(self, name: str, value: Tensor) -> None:
        self.notes.setdefault(name, []).append(value)

    def select(self, rows: Tensor) -> None:
        self.drift.select(rows)


@dataclass(frozen=True)
class Probed(RefreshRule):
    """The uncached trajectory with a probe on it."""

    probe: Probe

    def plan(self, canvas: Canvas, upcoming: Tensor | None) -> Tensor:
        return canvas.masked & canvas.in_block

    def watch(self) -> Watch:
        return self.probe


@dataclass
class Beside(Watch):
    """Compares every step of a run with what a model without a cache says of the same canvas: the KL divergence of the
    window's predictions, `[row]` nats per position. inner: what the rule under test has looking on."""

    inner: Watch | None
    notes: list[Tensor]

    def wanted(self, canvas: Canvas) -> Tensor:
        return torch.zeros_like(canvas.valid) if self.inner is None else self.inner.wanted(canvas)

    def group(self, model: DiffusionModel, canvas: Canvas) -> int:
        return model.depth if self.inner is None else self.inner.group(model, canvas)

    def before(self, model: DiffusionModel, canvas: Canvas, first: int, last: int) -> None:
        if self.inner is not None:
            self.inner.before(model, canvas, first, last)

    def after(self, model: DiffusionModel, canvas: Canvas, first: int, last: int) -> Tensor:
        if self.inner is None:
            return torch.full_like(canvas.step, model.depth)
        return self.inner.after(model, canvas, first, last)

    def finish(self, model: DiffusionModel, canvas: Canvas) -> None:
        if self.inner is not None:
            self.inner.finish(model, canvas)
        fresh, places = DiffusionModel(model.stack.adapter, canvas, model.shift), canvas.block_columns
        fresh.forward(canvas, canvas.valid)
        asks = canvas.masked.gather(1, places)
        apart = divergence(fresh.logits(places), model.logits(places))
        self.notes.append(apart.masked_fill(~asks, 0).sum(-1) / asks.sum(-1))

    def select(self, rows: Tensor) -> None:
        if self.inner is not None:
            self.inner.select(rows)


def divergence(exact: Tensor, other: Tensor) -> Tensor:
    """KL(exact || other) in nats of logits `[row, place, vocabulary]`."""
    one, two = exact.log_softmax(-1), other.log_softmax(-1)
    return (one.exp() * (one - two)).sum(-1)


@dataclass(frozen=True)
class Compared(RefreshRule):
    """A rule with a comparison beside it."""

    inner: RefreshRule
    notes: list[Tensor] = field(default_factory=list, compare=False)

    def plan(self, canvas: Canvas, upcoming: Tensor | None) -> Tensor:
        return self.inner.plan(canvas, upcoming)

    def watch(self) -> Watch:
        return Beside(self.inner.watch(), self.notes)


def calibrated(sigma: Tensor, wanted: float) -> float:
    """The gamma at which a share of `wanted` of the layers `[layer, step]` lies behind a layer that fails its test."""
    depth = len(sigma)
    for gamma in sigma.flatten().sort().values[:: max(sigma.numel() // 500, 1)]:
        stale = sigma < gamma
        first = torch.where(stale.any(0), stale.int().argmax(0) + 1, depth)
        if float((depth - first).double().mean()) / depth >= wanted:
            return float(gamma)
    return 1.0
