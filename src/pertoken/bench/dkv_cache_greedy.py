"""Claims of dKV-Cache-Greedy: what it computes does not grow with the canvas, and when it is worth its errors."""

from __future__ import annotations

from pertoken.bench import diffusion
from pertoken.bench.claims import Bench, Measurement, claim
from pertoken.bench.diffusion import BLOCK
from pertoken.bench.dkv_cache import NEVER, code, fewer_steps, greedy, raced
from pertoken.denoise.loop import Denoise
from pertoken.denoise.random_commit import RandomCommit


@claim(
    "dkv_cache_greedy",
    claim="It agrees better with its own random order uncached than fewer steps do, for as many computed positions",
    metric="agreement with one commit per step in the same random order, at equal positions computed (mean over "
    "intervals)",
    expected="> 1",
)
def greedy_beats_few_steps(bench: Bench) -> Measurement:
    decoders = {f"interval {n}": greedy(bench, n) for n in ((2,) if bench.quick else (2, 4, 8))}
    return fewer_steps(bench, code(bench), decoders, RandomCommit(bench.seed))


@claim(
    "dkv_cache_greedy",
    claim="Between renewals, the positions that it computes per step do not grow with the canvas",
    metric="positions per step and row on a canvas of 256 against 64",
    expected="<= 1.1",
)
def greedy_is_constant(bench: Bench) -> Measurement:
    task, found = diffusion.excerpts(bench, 64, 8, 2), {}
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
