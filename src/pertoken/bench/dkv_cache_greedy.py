"""Claims of dKV-Cache-Greedy: what it computes does not grow with the canvas, and when it is worth its errors."""

from __future__ import annotations

from pertoken.bench import diffusion
from pertoken.bench.claims import Bench, Measurement, claim
from pertoken.bench.diffusion import BLOCK
from pertoken.bench.dkv_cache import NEVER, code, fewer_steps, greedy, raced
from pertoken.denoise.random_commit import RandomCommit
from pertoken.denoise.rules import CommitRule
from pertoken.denoise.schedule import Schedule


def against_few_steps(bench: Bench, rule: CommitRule) -> Measurement:
    intervals = (2,) if bench.quick else (2, 4, 8)
    return fewer_steps(bench, code(bench), {f"interval {n}": greedy(n, rule) for n in intervals}, rule)


@claim(
    "dkv_cache_greedy",
    claim="In the paper's random order it agrees better with no cache than fewer steps do, for as many computed "
    "positions",
    metric="agreement with one commit per step at equal positions computed (mean over intervals)",
    expected="> 1",
)
def random_order_beats_few_steps(bench: Bench) -> Measurement:
    return against_few_steps(bench, RandomCommit(bench.seed))


@claim(
    "dkv_cache_greedy",
    claim="By confidence it agrees better with no cache than fewer steps do, for as many computed positions",
    metric="agreement with one commit per step at equal positions computed (mean over intervals)",
    expected="> 1",
    shown=True,
)
def confidence_beats_few_steps(bench: Bench) -> Measurement:
    return against_few_steps(bench, Schedule())


@claim(
    "dkv_cache_greedy",
    claim="Between renewals, the positions that it computes per step do not grow with the canvas",
    metric="positions per step and row on a canvas of 256 against 64",
    expected="<= 1.1",
)
def constant_work(bench: Bench) -> Measurement:
    task, found = diffusion.excerpts(bench, 64, 8, 2), {}
    prompt = diffusion.loaded(bench).batch(task.prompts)["attention_mask"].sum(-1).float().mean()
    for length in (64, 256):
        decoder = greedy(NEVER, RandomCommit(bench.seed))
        out = diffusion.decode(bench, task.on(length), decoder, eos_token_id=None)
        blocks = length // BLOCK
        found[length] = (out.forwards - blocks * (float(prompt) + length)) / (out.steps - blocks)
    return Measurement(found[256], "canvas of 64", found[64], len(task.prompts), {"positions per step": found})


@claim(
    "dkv_cache_greedy",
    claim="Behind a prompt of 128 tokens, on a canvas of 256, it is at least twice as fast as no cache (batch 1, each "
    "at its fastest setting)",
    metric="tokens per second",
    expected=">= 2",
    shown=True,
)
def twice_as_fast(bench: Bench) -> Measurement:
    return raced(bench, "greedy", greedy)
