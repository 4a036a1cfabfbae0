"""Claims of dKV-Cache: exact when it always renews, why it waits one step, what it saves, and when it is faster."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from pertoken.bench import diffusion, suite
from pertoken.bench.claims import Bench, Measurement, claim
from pertoken.bench.diffusion import BLOCK, Point, Task
from pertoken.denoise.canvas import Canvas
from pertoken.denoise.dkv_cache import DKVCache, DKVCacheGreedy
from pertoken.denoise.loop import Denoise
from pertoken.denoise.model import DiffusionModel
from pertoken.denoise.random_commit import RandomCommit
from pertoken.denoise.recompute import Recompute
from pertoken.denoise.rules import CommitRule, Guess, RefreshRule, top
from pertoken.denoise.schedule import Schedule
from pertoken.denoise.watch import Watch

NEVER = 10**6
INTERVALS = (2, 4, 8, 16, NEVER)


def code(bench: Bench) -> Task:
    return diffusion.excerpts(bench, 64 if bench.quick else 128, 32, 4)


def tests(bench: Bench) -> Task:
    return diffusion.unit_tests(bench, 64, 6)


def cached(interval: int) -> Denoise:
    return Denoise(refresh=DKVCache(interval), block=BLOCK)


def greedy(interval: int = 2, rule: CommitRule | None = None) -> Denoise:
    """By confidence, with the window around what was decided last, or with another commit rule."""
    return Denoise(rule or Schedule(), DKVCacheGreedy(interval), block=BLOCK)


def label(interval: int) -> str:
    return "only at the start of a block" if interval == NEVER else f"every {interval} steps"


@claim(
    "dkv_cache",
    claim="Renewed at every step it is no cache at all, bit for bit, and so is the greedy variant",
    metric="share of rows with identical ids",
    expected="== 1",
    compare="value",
)
def renewed_always_is_exact(bench: Bench) -> Measurement:
    task = diffusion.excerpts(bench, 64, 16, 4)
    order = RandomCommit(bench.seed)
    sides = {
        "decode": (Denoise(refresh=DKVCache(1)), Denoise()),
        "greedy": (Denoise(order, DKVCacheGreedy(1)), Denoise(order)),
    }
    found = {}
    for name, (ours, plain) in sides.items():
        ids, wanted = (diffusion.decode(bench, task, one).ids for one in (ours, plain))
        found[name] = diffusion.agreement(ids, wanted).rows
    return Measurement(mean(found.values()), "recompute", 1.0, 2 * len(task.prompts), found)


@dataclass(frozen=True)
class NoDelay(RefreshRule):
    """Keep a token's keys and values from the forward at which it was still undecided: dKV-Cache without its delay."""

    interval: int = 8

    def plan(self, canvas: Canvas, upcoming: Tensor | None) -> Tensor:
        step = canvas.block_step[:, None]
        return (step == 0) | (step % self.interval == 0) | canvas.masked


Step = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Following(CommitRule):
    """Commit what an uncached run committed, so that guesses are compared on the same canvases.

    run: the steps to follow (empty: go by confidence); noted: guessed tokens, which places are undecided and which of
    these are committed, each `[row, place]`, of every step.
    """

    run: list[Step] = field(default_factory=list, compare=False)
    noted: list[Step] = field(default_factory=list, compare=False)

    def choose(self, guess: Guess, canvas: Canvas) -> Tensor:
        if not self.run:
            chosen = top(guess.ranked, guess.quota)
            self.noted.append((guess.tokens, guess.masked, chosen))
            return chosen
        tokens, _, chosen = self.run[len(self.noted)]
        self.noted.append((guess.tokens, guess.masked, chosen))
        guess.tokens = torch.where(chosen, tokens, guess.tokens)
        return chosen


def followed(bench: Bench, task: Task, refresh: RefreshRule | None = None) -> list[Step]:
    """The guesses of a refresh rule along the uncached run, or that run."""

    def make() -> list[Step]:
        rule = Following(followed(bench, task)) if refresh is not None else Following()
        decoder = Denoise(rule, refresh or Recompute(), block=BLOCK)
        batch = len(task.prompts)
        suite.generate(about.model, about.batch(task.prompts), task.length, decoder, eos_token_id=None)
        assert all(len(tokens) == batch for tokens, _, _ in rule.noted), "rows of one pace end together"
        return rule.noted

    about = diffusion.loaded(bench)
    bench.status(f"{task.name}: {refresh or 'uncached'}")
    return bench.shared(("followed", task, refresh), make)


def same_guesses(bench: Bench, task: Task, refresh: RefreshRule) -> float:
    """Share of undecided places, over all steps, whose guess is the one without a cache on the same canvas."""
    pairs = zip(followed(bench, task, refresh), followed(bench, task), strict=True)
    same = torch.cat([(mine == theirs)[masked] for (mine, _, _), (theirs, masked, _) in pairs])
    return float(same.double().mean())


def delays(bench: Bench) -> dict[int, tuple[float, float]]:
    """For each interval the share of same guesses with and without the delay."""
    task, intervals = code(bench), (2, 8) if bench.quick else INTERVALS
    return {n: (same_guesses(bench, task, DKVCache(n)), same_guesses(bench, task, NoDelay(n))) for n in intervals}


@claim(
    "dkv_cache",
    claim="Keeping keys and values one step late changes fewer guesses than keeping them at once (renewed every 8 "
    "steps)",
    metric="share of guesses at undecided places that are not those without a cache on the same canvas",
    expected="< 1",
    shown=True,
)
def delay_helps(bench: Bench) -> Measurement:
    found = delays(bench)
    late, at_once = found[8]
    detail = {"same guesses, late and at once": {label(n): both for n, both in found.items()}}
    return Measurement(1 - late, "no delay", 1 - at_once, len(code(bench).prompts), detail)


@claim(
    "dkv_cache",
    claim="What the delay saves grows with the interval between renewals",
    metric="share of guesses that the delay keeps from changing: renewed every 8 steps, against every 2",
    expected="> 1",
)
def delay_saves_more(bench: Bench) -> Measurement:
    gains = {n: late - at_once for n, (late, at_once) in delays(bench).items()}
    detail = {"saved": {label(n): gain for n, gain in gains.items()}}
    return Measurement(gains[8], "every 2 steps", gains[2], len(code(bench).prompts), detail)


@dataclass(frozen=True)
class Changes(RefreshRule):
    """Recompute, and note how far every position's keys and values move from forward to forward.

    moved: after a call, `[position]` |K_t - K_(t-1)| / |K_(t-1)| over all layers, keys and values together, and
    whether the position was decided at step t - 1, so that this forward is the first to read its token.
    """

    moved: list[tuple[Tensor, Tensor]] = field(default_factory=list, compare=False)

    def plan(self, canvas: Canvas, upcoming: Tensor | None) -> Tensor:
        return canvas.valid

    def watch(self) -> Watch:
        return _Mover(self.moved)


class _Mover(Watch):
    """Sees a forward that computes everything, and compares the cache with the last one."""

    def __init__(self, moved: list[tuple[Tensor, Tensor]]):
        self.moved, self.last = moved, None

    def wanted(self, canvas: Canvas) -> Tensor:
        return canvas.valid

    def group(self, model: DiffusionModel, canvas: Canvas) -> int:
        return model.depth

    def before(self, model: DiffusionModel, canvas: Canvas, first: int, last: int) -> None:
        """Nothing is needed of what is overwritten: `finish` keeps a copy."""

    def after(self, model: DiffusionModel, canvas: Canvas, first: int, last: int) -> Tensor:
        return torch.full((canvas.rows,), model.depth, device=canvas.ids.device)

    def finish(self, model: DiffusionModel, canvas: Canvas) -> None:
        now = model.cache.buffer[:, :, :, :, : canvas.width].float().clone()
        if self.last is not None:
            over = (0, 1, 3, 5)
            moved = (now - self.last).square().sum(over).sqrt() / self.last.square().sum(over).sqrt().clamp(min=1e-9)
            seen = canvas.valid & (canvas.columns >= canvas.start)
            self.moved.append((moved[seen], (canvas.decided_at == canvas.step[:, None] - 1)[seen]))
        self.last = now

    def select(self, rows: Tensor) -> None:
        if self.last is not None:
            self.last = self.last[:, :, rows]


@claim(
    "dkv_cache",
    claim="Keys and values of a position change most when it is decided",
    metric="relative change from one forward to the next (mean)",
    expected="> 2",
)
def change_is_largest_at_decision(bench: Bench) -> Measurement:
    task, rule = diffusion.excerpts(bench, 64, 16, 4), Changes()
    diffusion.decode(bench, task, Denoise(refresh=rule, block=BLOCK))
    moved, decided = (torch.cat(parts) for parts in zip(*rule.moved, strict=True))
    at, else_ = moved[decided], moved[~decided]
    detail = {"medians": [float(at.median()), float(else_.median())], "changes": [len(at), len(else_)]}
    return Measurement(float(at.mean()), "at other steps", float(else_.mean()), len(task.prompts), detail)


def by_interval(bench: Bench, task: Task) -> dict[int, Point]:
    intervals = (4, NEVER) if bench.quick else INTERVALS
    found = diffusion.points(bench, task, {label(n): cached(n) for n in intervals})
    return dict(zip(intervals, found, strict=True))


@claim(
    "dkv_cache",
    claim="The rarer the renewals, the more guesses change",
    metric="share of neighbouring intervals in this order (2, 4, 8, 16 steps, block starts only)",
    expected="== 1",
    compare="value",
)
def changes_grow(bench: Bench) -> Measurement:
    found, task = delays(bench), code(bench)
    ordered = [found[a][0] >= found[b][0] for a, b in pairwise(found)]
    detail: dict[str, Any] = {"same guesses": {label(n): late for n, (late, _) in found.items()}}
    detail["label, forwards, positions, agreement of whole outputs, identical"] = [
        p.plain for p in by_interval(bench, task).values()
    ]
    return Measurement(mean(ordered), "order", 1.0, len(task.prompts), detail)


@claim(
    "dkv_cache",
    claim="Renewed every 4 steps, the unit tests written are as good as without a cache",
    metric="likeness of Python unit tests to the originals",
    expected=">= 0.98",
    shown=True,
)
def quality_is_kept(bench: Bench) -> Measurement:
    task = tests(bench)
    plain = diffusion.reference(bench, task).quality
    found = {n: diffusion.decode(bench, task, cached(n)).quality for n in by_interval(bench, task)}
    detail = {
        "likeness, share of true lines, of answers all true": {
            name: [round(q.likeness, 4), round(q.lines, 4), round(q.tests, 4)]
            for name, q in ({label(n): q for n, q in found.items()} | {"uncached": plain}).items()
        }
    }
    return Measurement(found[4].likeness, "recompute", plain.likeness, len(task.prompts), detail)


@claim(
    "dkv_cache",
    claim="For as many computed positions it agrees better than fewer steps without a cache",
    metric="agreement with one commit per step at equal positions computed (mean over intervals)",
    expected="> 1",
    shown=True,
)
def beats_few_steps(bench: Bench) -> Measurement:
    task = code(bench)
    return fewer_steps(bench, task, {label(n): cached(n) for n in by_interval(bench, task)}, Schedule())


def fewer_steps(bench: Bench, task: Task, decoders: dict[str, Denoise], rule: CommitRule) -> Measurement:
    """Each decoder against the uncached rule with as few steps as compute no fewer positions; agreement with the
    uncached rule at one commit per step."""
    wanted, blocks = diffusion.decode(bench, task, Denoise(rule, block=BLOCK)), task.length // BLOCK
    found = {}
    for name, decoder in decoders.items():
        bench.status(f"{task.name}: {name}")
        out = diffusion.decode(bench, task, decoder)
        steps = blocks * math.ceil(task.length * out.forwards / wanted.forwards / blocks)
        fewer = diffusion.decode(bench, task, Denoise(rule, steps=steps, block=BLOCK))
        alike = [diffusion.agreement(one.ids, wanted.ids).positions for one in (out, fewer)]
        found[name] = {"agreements": alike, "positions": [out.forwards, fewer.forwards], "steps": steps}
    mine, theirs = (mean(one["agreements"][i] for one in found.values()) for i in (0, 1))
    return Measurement(mine, "fewer steps", theirs, len(task.prompts), found)


@dataclass(frozen=True)
class RandomRefresh(RefreshRule):
    """The control: as many positions as dKV-Cache computes, the same renewals, but drawn at random."""

    interval: int = 8
    seed: int = 0

    def plan(self, canvas: Canvas, upcoming: Tensor | None) -> Tensor:
        wanted = DKVCache(self.interval).plan(canvas, upcoming) & canvas.valid
        generator = torch.Generator().manual_seed(self.seed + int(canvas.step.max()))
        drawn = torch.rand(canvas.width, generator=generator).to(canvas.ids.device).expand(canvas.rows, -1)
        ranked = drawn.masked_fill(~canvas.valid, -1.0).argsort(-1, descending=True).argsort(-1)
        return ranked < wanted.sum(-1, keepdim=True)


@claim(
    "dkv_cache",
    claim="It agrees better with the uncached output than computing as many positions at random",
    metric="agreement with the uncached output (every 8 steps renewed)",
    expected="> 1",
)
def beats_random_refresh(bench: Bench) -> Measurement:
    task, n = code(bench), 4 if bench.quick else 8
    both = {"dkv_cache": cached(n), "random": Denoise(refresh=RandomRefresh(n, bench.seed), block=BLOCK)}
    mine, control = diffusion.points(bench, task, both)
    detail = {"label, forwards, positions, agreement, identical": [mine.plain, control.plain]}
    return Measurement(mine.agreement, "random positions", control.agreement, len(task.prompts), detail)


def sides(bench: Bench, length: int, dtypes: tuple[str, ...]) -> dict[str, list[suite.Side]]:
    """Uncached, Decode and Greedy, all by confidence, at their intervals."""
    contenders = {
        "uncached": {"uncached": Denoise(block=BLOCK)},
        "decode": {f"interval {n}": cached(n) for n in ((8,) if bench.quick else (8, 16, NEVER))},
        "greedy": {f"interval {n}": greedy(n) for n in ((2,) if bench.quick else (2, 4, 8))},
    }
    return {
        group: [
            diffusion.side(diffusion.loaded(bench, dtype), f"{name} {dtype}", decoder, length, eos_token_id=None)
            for name, decoder in decoders.items()
            for dtype in dtypes
        ]
        for group, decoders in contenders.items()
    }


def speeds(bench: Bench, length: int) -> dict[str, dict[str, Any]]:
    """Tokens per second at batch 1 on a canvas of `length`, each side at its fastest dtype and interval."""

    def run() -> dict[str, dict[str, Any]]:
        task = diffusion.excerpts(bench, length, 10, 3, whole=True)
        inputs = [diffusion.loaded(bench).batch([prompt]) for prompt in task.prompts]
        trial = 1 if bench.quick else 2
        return suite.race(sides(bench, length, ("fp32",) if bench.quick else ("fp32", "bf16")), inputs, trial)

    return bench.shared(("dkv_cache speeds", length), run)


def raced(bench: Bench, group: str, decoder: Callable[[int], Denoise]) -> Measurement:
    """Speed of a group over no cache, and the agreement of its fastest setting with that."""
    length = 128 if bench.quick else 256
    results = speeds(bench, length)
    setting = results[group]["setting"].split()
    task, options = diffusion.excerpts(bench, length, 16, 2, whole=True), {"dtype": setting[-1], "eos_token_id": None}
    outs = [
        diffusion.decode(bench, task, one, **options).ids for one in (decoder(int(setting[1])), Denoise(block=BLOCK))
    ]
    found = suite.ratio_of(results, group, "uncached")
    stated = {"canvas": length, "agreement at this setting": diffusion.agreement(*outs, end=None).positions}
    return replace(found, detail=found.detail | stated)


@claim(
    "dkv_cache",
    claim="Behind a prompt of 128 tokens, on a canvas of 256, it is at least twice as fast as no cache (batch 1, each "
    "at its fastest setting)",
    metric="tokens per second",
    expected=">= 2",
    shown=True,
)
def twice_as_fast(bench: Bench) -> Measurement:
    return raced(bench, "decode", cached)


@claim(
    "dkv_cache",
    claim="Behind a prompt of 128 tokens it is faster than no cache from a canvas of 64 on",
    metric="shortest canvas of 32, 64, 128, 256 positions from which on it is faster",
    expected="<= 64",
    compare="value",
)
def breaks_even(bench: Bench) -> Measurement:
    lengths = (32, 64) if bench.quick else (32, 64, 128, 256)
    ratios = {n: suite.ratio_of(speeds(bench, n), "decode", "uncached").ratio for n in lengths}
    good = [n for i, n in enumerate(lengths) if all(ratios[m] > 1 for m in lengths[i:])]
    value = float(good[0]) if good else float("inf")
    return Measurement(value, "canvas", 64.0, 8, {"speed over no cache by canvas": ratios})
