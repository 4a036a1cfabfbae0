"""Claims of dKV-Cache-Greedy: what it computes does not grow with the canvas, and when it is worth its errors."""

from __future__ import annotations

from pertoken.bench import diffusion
from pertoken.bench.claims import Bench, Measurement, claim
from pertoken.bench.diffusion import BLOCK, Point
from pertoken.bench.dkv_cache import NEVER, functions, greedy, raced
from pertoken.denoise.loop import Denoise
from pertoken.denoise.random_commit import RandomCommit


@claim(
    "dkv_cache_greedy",
    claim="It agrees better with its own random order uncached than fewer steps do, for as many computed positions",
    metric="agreement with one commit per step in the same random order, at equal positions computed",
    expected="> 1",
)
def greedy_beats_few_steps(bench: Bench) -> Measurement:
    task, order = functions(bench), RandomCommit(bench.seed)
    wanted = diffusion.decode(bench, task, Denoise(order, block=BLOCK))

    def point(name: str, decoder: Denoise) -> Point:
        out = diffusion.decode(bench, task, decoder)
        alike = diffusion.agreement(out.ids, wanted.ids)
        return Point(name, out.steps, out.forwards, alike.positions, alike.rows)

    mine = point("greedy", greedy(bench))
    theirs = [point(f"{k} per step", Denoise(order, steps=task.length // k, block=BLOCK)) for k in (2, 4)]
    theirs.append(Point("one per step", wanted.steps, wanted.forwards, 1.0, 1.0))
    base = diffusion.agreement_at(theirs, mine.forwards, "forwards")
    detail = {"greedy": mine.plain, "fewer steps": [p.plain for p in theirs]}
    return Measurement(mine.agreement, "fewer steps", base, len(task.prompts), detail)


@claim(
    "dkv_cache_greedy",
    claim="Between renewals, the positions that it computes per step do not grow with the canvas",
    metric="positions per step and row on a canvas of 256 against 64",
    expected="<= 1.1",
)
def greedy_is_constant(bench: Bench) -> Measurement:
    task, found = diffusion.functions(bench, 64, 8, 2), {}
    prompt = diffusion.loaded(bench).batch(task.prompts)["attention_mask"].sum(-1).float().mean()
    for length in (64, 256):
        out = diffusion.decode(bench, task.on(length), greedy(bench, NEVER), eos_token_id=None)
        blocks = length // BLOCK
        found[length] = (out.forwards - blocks * (float(prompt) + length)) / (out.steps - blocks)
    return Measurement(found[256], "canvas of 64", found[64], len(task.prompts), {"positions per step": found})


@claim(
    "dkv_cache_greedy",
    claim="Behind a prompt of 128 tokens, on a canvas of 256, it is at least twice as fast as the same random order "
    "uncached (batch 1, each at its fastest setting)",
    metric="tokens per second",
    expected=">= 2",
    shown=True,
)
def greedy_twice_as_fast(bench: Bench) -> Measurement:
    plain = Denoise(RandomCommit(bench.seed), block=BLOCK)
    return raced(bench, "greedy", "random order uncached", lambda interval: greedy(bench, interval), plain)
