"""Claims of Elastic-Cache: exact where it should be, what its similarity knows about drift, what refreshing in time
saves over refreshing by the clock, and how fast it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from pertoken.bench import diffusion, suite
from pertoken.bench.claims import Bench, Measurement, claim
from pertoken.bench.diffusion import Output, Point, Task
from pertoken.denoise.canvas import Canvas
from pertoken.denoise.dual_cache import DualCache
from pertoken.denoise.elastic_cache import Drift, ElasticCache, similarity
from pertoken.denoise.ends import EndOfText
from pertoken.denoise.fixed_interval import FixedInterval
from pertoken.denoise.loop import Denoise
from pertoken.denoise.model import DiffusionModel
from pertoken.denoise.recompute import Recompute
from pertoken.denoise.rules import RefreshRule
from pertoken.denoise.threshold import Threshold
from pertoken.denoise.watch import Watch

WINDOW, EVERY = 16, 8
GAMMAS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
INTERVALS = (2, 3, 5, 8, 12, 20, 40)


def ruled(refresh: RefreshRule, **more: Any) -> Denoise:
    """A refresh rule with the paper's partners; the uncached run slides the same window."""
    more = {"sliding": WINDOW} | more
    return Denoise(Threshold(0.9), refresh, EndOfText(), **more)


def task(bench: Bench) -> Task:
    """Function bodies on a canvas that is long for this model."""
    return diffusion.functions(bench, 96 if bench.quick else 256, 48, 4)


def uncached(bench: Bench) -> Output:
    return diffusion.decode(bench, task(bench), ruled(Recompute()))


def layer_positions(out: Output) -> float:
    """Positions computed per row, counting those that ran some of the layers in part."""
    return out.token_layers / out.depth / len(out.ids)


def share(out: Output) -> float:
    """Share of (forward, layer) pairs of the rows that computed every position."""
    return out.whole_layers / (out.depth * out.row_steps)


def sweep(bench: Bench, name: str) -> list[tuple[float, Output, Point]]:
    """Elastic-Cache over gamma, or the fixed interval over its length, against the uncached run."""
    made: dict[str, tuple[tuple[float, ...], Callable[[float], RefreshRule]]] = {
        "elastic_cache": (GAMMAS, lambda gamma: ElasticCache(gamma=gamma)),
        "keys": (GAMMAS, lambda gamma: ElasticCache(gamma=gamma, axis="keys")),
        "fixed_interval": (INTERVALS, FixedInterval),
    }
    (dials, make), found = made[name], []
    for dial in dials[1::2] if bench.quick else dials:
        bench.status(f"{name} {dial:g}")
        out = diffusion.decode(bench, task(bench), ruled(make(dial)))
        alike = diffusion.agreement(out.ids, uncached(bench).ids)
        place = Point(f"{name} {dial:g}", out.steps, layer_positions(out), alike.positions, alike.rows)
        found.append((dial, out, place))
    return found


def table(bench: Bench, *names: str) -> dict[str, Any]:
    """Detail: every setting with its cost, refresh share and agreement."""
    return {
        "label, forwards, positions computed, agreement, identical rows, refresh share": [
            [*point.plain, round(share(out), 4)] for name in names for _, out, point in sweep(bench, name)
        ],
        "uncached forwards, positions": [uncached(bench).steps, layer_positions(uncached(bench))],
    }


def correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's, ties in order."""
    ranks = [x.flatten().argsort().argsort().double() for x in (a, b)]
    one, other = (r - r.mean() for r in ranks)
    return float((one * other).sum() / (one.norm() * other.norm()))


@claim(
    "elastic_cache",
    claim="Refreshed always it writes what the uncached loop with its window writes, one row at a time and eight",
    metric="share of identical rows",
    expected="== 1",
    compare="value",
    shown=True,
)
def exact(bench: Bench) -> Measurement:
    same = total = 0
    for batch in (1, 8):
        both = [
            diffusion.decode(bench, task(bench), ruled(rule), batch=batch)
            for rule in (Recompute(), ElasticCache(gamma=math.inf))
        ]
        same, total = same + int((both[0].ids == both[1].ids).all(-1).sum()), total + len(both[0].ids)
    return Measurement(same / total, "recompute", 1.0, total)


@claim(
    "elastic_cache",
    claim="The share of refreshed layers never falls as gamma rises",
    metric="share of neighbouring settings in order",
    expected="== 1",
    compare="value",
)
def monotone(bench: Bench) -> Measurement:
    shares = [share(out) for _, out, _ in sweep(bench, "elastic_cache")]
    right = [later >= earlier for earlier, later in pairwise(shares)]
    return Measurement(mean(right), "order", 1.0, len(right), table(bench, "elastic_cache"))


@claim(
    "elastic_cache",
    claim="Agreement with the uncached run rises with gamma",
    metric="rank correlation of gamma and agreement",
    expected="> 0.5",
    compare="value",
)
def agreement_rises(bench: Bench) -> Measurement:
    found = sweep(bench, "elastic_cache")
    value = correlation(torch.tensor([dial for dial, _, _ in found]), torch.tensor([p.agreement for *_, p in found]))
    return Measurement(value, "none", 0.0, len(found), table(bench, "elastic_cache"))


@claim(
    "elastic_cache",
    claim="At equal computation it agrees more with the uncached run than a fixed interval",
    metric="share of positions equal to the uncached run's, mean over settings",
    expected="> 1",
    shown=True,
)
def beats_the_clock(bench: Bench) -> Measurement:
    clock = [point for *_, point in sweep(bench, "fixed_interval")]
    full = Point("uncached", uncached(bench).steps, layer_positions(uncached(bench)), 1.0, 1.0)
    pairs = [
        (point.agreement, other)
        for *_, point in sweep(bench, "elastic_cache")
        if (other := diffusion.agreement_at([*clock, full], point.forwards, "forwards")) > 0
    ]
    detail = {"pairs": pairs} | table(bench, "elastic_cache", "fixed_interval")
    mine, theirs = (mean(pair[side] for pair in pairs) for side in (0, 1))
    return Measurement(mine, "fixed_interval", theirs, len(task(bench).prompts), detail)


@claim(
    "elastic_cache",
    claim="Reuse costs at most a tenth more forwards than the uncached run needs",
    metric="forwards per row",
    expected="<= 1.1",
)
def forwards(bench: Bench) -> Measurement:
    mine = diffusion.decode(bench, task(bench), ruled(ElasticCache()))
    return Measurement(mine.steps, "recompute", uncached(bench).steps, len(mine.ids), {"refresh share": share(mine)})


@claim(
    "elastic_cache",
    claim="What it writes is as like the original as what the uncached run writes",
    metric="similarity to the original function body",
    expected=">= 0.97",
    shown=True,
)
def quality(bench: Bench) -> Measurement:
    mine = diffusion.decode(bench, task(bench), ruled(ElasticCache()))
    both = [out.quality for out in (mine, uncached(bench))]
    alike = diffusion.agreement(mine.ids, uncached(bench).ids)
    detail = {"share that parses": [q.parses for q in both], "agreement": alike.positions, "identical": alike.rows}
    return Measurement(both[0].likeness, "recompute", both[1].likeness, len(mine.ids), detail)


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
        for axis in ("heads", "keys"):
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
        exact = model.logits(places).log_softmax(-1)
        for name, kept in (("near", near), ("far", back)):
            other = DiffusionModel(model.stack.adapter, canvas, model.shift)
            other.cache.buffer, other.states, other.known = buffer.clone(), outputs.clone(), canvas.valid.clone()
            kept = kept | torch.nn.functional.pad(kept[:, : canvas.width - model.shift], (model.shift, 0))
            other.forward(canvas, canvas.valid & ~kept)
            changed = other.logits(places).log_softmax(-1)
            self.note(name, (exact.exp() * (exact - changed)).sum(-1).mean(-1))

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


def notes(bench: Bench) -> dict[str, Tensor]:
    """Everything noted on the uncached trajectories, `[layer, step of a row]`, steps of all rows together."""

    def make() -> dict[str, Tensor]:
        bench.status("probing the uncached run")
        probe, about = Probe(), diffusion.loaded(bench)
        for part in suite.chunks(list(task(bench).prompts), 8):
            suite.generate(about.model, about.batch(part), task(bench).length, ruled(Probed(probe)))
            probe.drift.tracked = None
        return {name: torch.cat(values, -1) for name, values in probe.notes.items()}

    return bench.shared("elastic notes", make)


@claim(
    "elastic_cache",
    claim="Keys and values drift more from one step to the next in deeper layers",
    metric="rank correlation of layer and drift, from the second layer on (the first sees embeddings alone)",
    expected="> 0",
    compare="value",
)
def deeper_drifts_more(bench: Bench) -> Measurement:
    drift = notes(bench)["reused"]
    depth, count = drift.shape
    found = [correlation(torch.arange(1, depth), drift[1:, step]) for step in range(count)]
    detail = {"1 - cosine, by layer": drift.mean(-1)}
    return Measurement(mean(found), "none", 0.0, count, detail)


@claim(
    "elastic_cache",
    claim="The tokens that the window reads most drift less than the average decided token",
    metric="1 - cosine of keys and values between steps, mean over layers from the second on",
    expected="< 1",
)
def tracked_drift_less(bench: Bench) -> Measurement:
    tracked, decided = notes(bench)["tracked"], notes(bench)["decided"]
    good = tracked.isfinite().all(0) & decided.isfinite().all(0)
    both = [float(x[1:, good].mean()) for x in (tracked, decided)]
    detail = {"by layer": {"tracked": tracked[:, good].mean(-1), "decided": decided[:, good].mean(-1)}}
    return Measurement(both[0], "average decided token", both[1], int(good.sum()), detail)


@claim(
    "elastic_cache",
    claim="Reusing the far end of the canvas changes the window's predictions less than reusing the masks next to it",
    metric="nats of KL divergence per position of the window",
    expected="< 1",
)
def far_masks_matter_less(bench: Bench) -> Measurement:
    far, near = notes(bench)["far"], notes(bench)["near"]
    detail = {"attention to masks beyond twice the window, by layer": notes(bench)["mass"].mean(-1)}
    return Measurement(float(far.mean()), "masks behind the window", float(near.mean()), len(far), detail)


@claim(
    "elastic_cache",
    claim="The cosine over heads ranks steps by their true drift as well as the cosine over keys",
    metric="rank correlation of 1 - similarity and the drift of what is reused, mean over layers from the second on",
    expected=">= 1",
)
def heads_or_keys(bench: Bench) -> Measurement:
    found, drift = notes(bench), notes(bench)["reused"]
    good = drift.isfinite().all(0) & found["heads"].isfinite().all(0)

    def ranks(axis: str) -> float:
        return mean(correlation(1 - found[axis][layer, good], drift[layer, good]) for layer in range(1, len(drift)))

    detail = {
        "gamma for a refresh share of a tenth": {axis: calibrated(found[axis][:, good], 0.1) for axis in AXES},
        "similarity, quantiles .05 .25 .5 .75 .95": {
            axis: found[axis][:, good].flatten().quantile(torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])) for axis in AXES
        },
    }
    return Measurement(ranks("heads"), "keys", ranks("keys"), int(good.sum()), detail)


AXES = ("heads", "keys")


def calibrated(sigma: Tensor, wanted: float) -> float:
    """The gamma at which a share of `wanted` of the layers `[layer, step]` lies behind a layer that fails its test."""
    depth = len(sigma)
    for gamma in sigma.flatten().sort().values[:: max(sigma.numel() // 500, 1)]:
        stale = sigma < gamma
        first = torch.where(stale.any(0), stale.int().argmax(0) + 1, depth)
        if float((depth - first).double().mean()) / depth >= wanted:
            return float(gamma)
    return 1.0


def speeds(bench: Bench, batch: int) -> dict[str, dict[str, Any]]:
    """Tokens per second on the longest canvas, each side in its fastest dtype: with its cache, with none, and two other
    ways to refresh."""

    def run() -> dict[str, dict[str, Any]]:
        long = task(bench) if bench.quick else diffusion.functions(bench, 384, 48, 4)
        rules = {
            "elastic_cache": ruled(ElasticCache()),
            "recompute": ruled(Recompute()),
            "fixed_interval": ruled(FixedInterval()),
            "dual_cache": ruled(DualCache(), sliding=None, block=32),
        }
        groups = {
            name: [
                diffusion.side(diffusion.loaded(bench, dtype), f"{name} {dtype}", rule, long.length)
                for dtype in ("fp32", "bf16")
            ]
            for name, rule in rules.items()
        }
        texts, about = list(long.prompts), diffusion.loaded(bench)
        count = {1: 3, 8: 2}[batch] if bench.quick else {1: 15, 8: 8}[batch]
        batches = [(texts * batch)[batch * i : batch * (i + 1)] for i in range(count)]
        bench.status(f"racing, batch {batch}")
        return suite.race(groups, [about.batch(part) for part in batches], trial=1 if bench.quick else 3)

    return bench.shared(("elastic speeds", batch), run)


@claim(
    "elastic_cache",
    claim="One row at a time it writes at least twice as fast as without a cache (each in its fastest dtype)",
    metric="tokens per second",
    expected=">= 2",
    shown=True,
)
def fast_alone(bench: Bench) -> Measurement:
    return suite.ratio_of(speeds(bench, 1), "elastic_cache", "recompute")


@claim(
    "elastic_cache",
    claim="Eight rows at a time it writes at least twice as fast as without a cache (each in its fastest dtype)",
    metric="tokens per second",
    expected=">= 2",
    shown=True,
)
def fast_in_batches(bench: Bench) -> Measurement:
    return suite.ratio_of(speeds(bench, 8), "elastic_cache", "recompute")
