"""Claims of Elastic-Cache: exact where it should be, what its similarity knows about drift, what refreshing in time
saves over refreshing by the clock, and how fast it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from pertoken.bench import diffusion, suite
from pertoken.bench.canvas_probes import AXES, WINDOW, Compared, Probe, Probed, calibrated
from pertoken.bench.claims import Bench, Measurement, claim
from pertoken.bench.diffusion import Output, Point, Task
from pertoken.core.estimates import spearman
from pertoken.denoise.dual_cache import DualCache
from pertoken.denoise.elastic_cache import ElasticCache
from pertoken.denoise.ends import EndOfText
from pertoken.denoise.fixed_interval import FixedInterval
from pertoken.denoise.loop import Denoise
from pertoken.denoise.recompute import Recompute
from pertoken.denoise.rules import RefreshRule
from pertoken.denoise.threshold import Threshold

GAMMAS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
INTERVALS = (2, 3, 5, 8, 12, 20, 40)


def ruled(refresh: RefreshRule, **more: Any) -> Denoise:
    """A refresh rule with the paper's partners; the uncached run slides the same window."""
    more = {"sliding": WINDOW} | more
    return Denoise(Threshold(0.9), refresh, EndOfText(), **more)


def task(bench: Bench) -> Task:
    """Function bodies on a canvas that is long for this model."""
    return diffusion.functions(bench, 64 if bench.quick else 256, 32, 3)


def uncached(bench: Bench) -> Output:
    return diffusion.decode(bench, task(bench), ruled(Recompute()))


def layer_positions(out: Output) -> float:
    """Positions computed per row, counting those that ran some of the layers in part."""
    return out.token_layers / out.depth / len(out.ids)


def share(out: Output) -> float:
    """Share of (forward, layer) pairs of the rows that computed every position."""
    return out.whole_layers / (out.depth * out.row_steps)


MADE: dict[str, tuple[tuple[float, ...], Callable[[float], RefreshRule]]] = {
    "elastic_cache": (GAMMAS, lambda gamma: ElasticCache(gamma=gamma)),
    "whole": (GAMMAS, lambda gamma: ElasticCache(gamma=gamma, whole=True)),
    "fixed_interval": (INTERVALS, FixedInterval),
}


def settings(bench: Bench, name: str) -> list[tuple[float, RefreshRule]]:
    """A rule over its dial; a few settings when quick."""
    dials, make = MADE[name]
    return [(dial, make(dial)) for dial in (dials[1::3] if bench.quick else dials)]


def sweep(bench: Bench, name: str) -> list[tuple[float, Output, Point]]:
    """Every setting against the uncached run."""
    found = []
    for dial, rule in settings(bench, name):
        bench.status(f"{name} {dial:g}")
        out = diffusion.decode(bench, task(bench), ruled(rule))
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
    value = spearman(torch.tensor([dial for dial, _, _ in found]), torch.tensor([p.agreement for *_, p in found]))
    return Measurement(value, "none", 0.0, len(found), table(bench, "elastic_cache"))


@claim(
    "elastic_cache",
    claim="At equal computation it agrees more with the uncached run than a fixed interval",
    metric="share of positions equal to the uncached run's, mean over settings",
    expected="> 1",
)
def agrees_more_than_the_clock(bench: Bench) -> Measurement:
    mine, theirs = ([point for *_, point in sweep(bench, name)] for name in ("elastic_cache", "fixed_interval"))
    full = Point("uncached", uncached(bench).steps, layer_positions(uncached(bench)), 1.0, 1.0)
    pairs = at_equal_cost(mine, [*theirs, full])
    detail = {"pairs": pairs} | table(bench, "elastic_cache", "fixed_interval")
    return Measurement(*sides(pairs, "fixed_interval"), len(task(bench).prompts), detail)


def at_equal_cost(mine: list[Point], theirs: list[Point]) -> list[tuple[float, float]]:
    """Agreement of each of mine, and of mixtures of theirs that compute as many positions."""
    pairs = [(point.agreement, diffusion.agreement_at(theirs, point.forwards, "forwards")) for point in mine]
    return [pair for pair in pairs if math.isfinite(pair[1])]


def sides(pairs: list[tuple[float, float]], baseline: str) -> tuple[float, str, float]:
    return mean(pair[0] for pair in pairs), baseline, mean(pair[1] for pair in pairs)


def fidelity(bench: Bench, name: str) -> list[Point]:
    """Every setting on a few prompts: positions computed per forward, and minus the mean divergence as agreement."""

    def make() -> list[Point]:
        part, found = Task("", task(bench).prompts[:8], task(bench).originals[:8], task(bench).length), []
        for dial, rule in settings(bench, name):
            bench.status(f"{name} {dial:g} beside the full model")
            compared = Compared(rule)
            out = diffusion.decode(bench, part, ruled(compared))
            apart = float(torch.cat(compared.notes).mean())
            found.append(Point(f"{name} {dial:g}", out.steps, layer_positions(out) / out.steps, -apart, share(out)))
        return found

    return bench.shared(("elastic fidelity", name), make)


def nearer(bench: Bench, name: str, baseline: str) -> Measurement:
    """Divergence from the full model at equal computation, mean over the settings that the baseline can afford."""
    mine, theirs = fidelity(bench, name), fidelity(bench, baseline)
    pairs = [(-one, -other) for one, other in at_equal_cost(mine, theirs)]
    detail = {
        "pairs": pairs,
        "label, forwards, positions per forward, - divergence, refresh share": [p.plain for p in [*mine, *theirs]],
    }
    return Measurement(*sides(pairs, baseline), len(task(bench).prompts[:8]), detail)


@claim(
    "elastic_cache",
    claim="At equal computation its predictions are nearer to the full model's on the same canvas than with a fixed "
    "interval",
    metric="nats of KL divergence per position of the window, mean over settings",
    expected="< 1",
    shown=True,
)
def nearer_than_the_clock(bench: Bench) -> Measurement:
    return nearer(bench, "elastic_cache", "fixed_interval")


@claim(
    "elastic_cache",
    claim="Refreshing a stale row from its first layer (whole=True) is nearer to the full model at equal computation "
    "than refreshing the layers behind the stale one",
    metric="nats of KL divergence per position of the window, mean over settings",
    expected="< 1",
    shown=True,
)
def whole_is_nearer(bench: Bench) -> Measurement:
    return nearer(bench, "whole", "elastic_cache")


@claim(
    "elastic_cache",
    claim="With whole=True it is nearer to the full model at equal computation than with a fixed interval",
    metric="nats of KL divergence per position of the window, mean over settings",
    expected="< 1",
)
def whole_is_nearer_than_the_clock(bench: Bench) -> Measurement:
    return nearer(bench, "whole", "fixed_interval")


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
    found = [spearman(torch.arange(1, depth), drift[1:, step]) for step in range(count)]
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
        return mean(spearman(1 - found[axis][layer, good], drift[layer, good]) for layer in range(1, len(drift)))

    detail = {
        "gamma for a refresh share of a tenth": {axis: calibrated(found[axis][:, good], 0.1) for axis in AXES},
        "similarity, quantiles .05 .25 .5 .75 .95": {
            axis: found[axis][:, good].flatten().quantile(torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])) for axis in AXES
        },
    }
    return Measurement(ranks("heads"), "keys", ranks("keys"), int(good.sum()), detail)


def speeds(bench: Bench, batch: int) -> dict[str, dict[str, Any]]:
    """Tokens per second on a canvas of 384 (256 in batches, shorter when quick), each side in its fastest dtype: with
    this cache, with none and, in full, with two other ways to refresh."""

    def run() -> dict[str, dict[str, Any]]:
        long = diffusion.functions(bench, {1: (384, 192), 8: (256, 128)}[batch][bench.quick], 48, 8)
        rules = {
            "elastic_cache": ruled(ElasticCache()),
            "recompute": ruled(Recompute()),
            "fixed_interval": ruled(FixedInterval()),
            "dual_cache": ruled(DualCache(), sliding=None, block=32),
        }
        names, dtypes = (list(rules)[:2], ("fp32",)) if bench.quick else (list(rules), ("fp32", "bf16"))
        groups = {
            name: [
                diffusion.side(diffusion.loaded(bench, dtype), f"{name} {dtype}", rules[name], long.length)
                for dtype in dtypes
            ]
            for name in names
        }
        count, trial = ({1: 2, 8: 1}[batch], 0) if bench.quick else {1: (15, 3), 8: (3, 1)}[batch]
        texts, about = list(long.prompts) * batch, diffusion.loaded(bench)
        batches = [about.batch(texts[batch * i : batch * (i + 1)]) for i in range(count)]
        bench.status(f"racing, batch {batch}")
        return suite.race(groups, batches, trial)

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
