"""Pairs of a commit and a refresh rule, and the race of the best against Fast-dLLM and diffusers' pipeline."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from pertoken.bench import diffusion, peers, suite
from pertoken.bench.claims import Bench, Measurement
from pertoken.bench.commits import ruled, tasks
from pertoken.bench.diffusion import BLOCK, Task
from pertoken.denoise.dkv_cache import DKVCache
from pertoken.denoise.dual_cache import DualCache
from pertoken.denoise.elastic_cache import ElasticCache
from pertoken.denoise.ends import EndOfText
from pertoken.denoise.loop import Denoise
from pertoken.denoise.threshold import Threshold

REFRESHES = {"dual_cache": DualCache(), "dkv_cache": DKVCache(), "elastic_cache": ElasticCache()}
PAIRED = {
    "learn2pd": (0.7, 0.9, 0.96),
    "entropy_bound": (0.03, 0.1, 0.3),
    "factor": (0.5, 1.0),
    "threshold": (0.8, 0.9),
}


def pairs(bench: Bench, task: Task) -> dict[str, Denoise]:
    """Commit rules with refresh rules, all with end-of-text prediction; only the elastic cache's block slides, for
    which a filter of blocks is not made."""
    found = {}
    for name, dials in PAIRED.items():
        for dial in dials[1:2] if bench.quick else dials:
            for refresh, rule in REFRESHES.items():
                if (name, refresh) != ("learn2pd", "elastic_cache"):
                    more = {"refresh": rule, "canvas": EndOfText()}
                    found[f"{name} {dial:g} + {refresh}"] = ruled(bench, name, dial, task.length, **more)
    return found


def fast_dllm() -> Denoise:
    """Fast-dLLM as it is usually run."""
    return Denoise(Threshold(0.9), DualCache(), block=BLOCK)


def chosen(bench: Bench, task: Task) -> tuple[dict[str, Denoise], dict[str, Any]]:
    """The three cheapest pairs (one when quick) that agree with one commit per step at least as well as Fast-dLLM does;
    and figures."""
    (base,) = diffusion.points(bench, task, {"fast-dllm": fast_dllm()})
    decoders = pairs(bench, task)
    good = [p for p in diffusion.points(bench, task, decoders) if p.agreement >= base.agreement]
    good.sort(key=lambda p: p.steps + p.forwards / 60)  # a forward by itself costs about as much as 60 positions
    best = good[: 1 if bench.quick else 3]
    return {p.label: decoders[p.label] for p in best}, {"fast-dllm": base.plain, "chosen from": [p.plain for p in good]}


def racing(bench: Bench) -> tuple[list[dict[str, Tensor]], int]:
    """Prompts, one at a time, that did not serve for the choice of the pairs; and the canvas."""
    task = tasks(bench)[1]
    held = diffusion.unit_tests(bench, 56, 9, task.length).prompts[len(task.prompts) :]
    return [diffusion.loaded(bench).batch([prompt]) for prompt in held], task.length


def speeds(bench: Bench) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Tokens per second of Fast-dLLM, of diffusers' pipeline and of the best pairs, all in turn; and the choice."""

    def run() -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
        decoders, detail = chosen(bench, tasks(bench)[1])
        inputs, length = racing(bench)
        groups: dict[str, list[suite.Side]] = {"diffusers": [], "fast-dllm": []}
        groups |= {"pair": []} if decoders else {}
        for dtype in ("fp32",) if bench.quick else ("fp32", "bf16"):
            about = diffusion.loaded(bench, dtype)
            for group, contenders in {"fast-dllm": {"threshold 0.9": fast_dllm()}, "pair": decoders}.items():
                groups.get(group, []).extend(
                    diffusion.side(about, f"{label} {dtype}", one, length) for label, one in contenders.items()
                )
            groups["diffusers"] += [
                peer(about, f"{'whole canvas' if whole else 'up to the block'} {dtype}", length, whole)
                for whole in ((False,) if bench.quick else (False, True))
            ]
        return suite.race(groups, inputs), detail

    return bench.shared("commit and refresh speeds", run)


def peer(about: diffusion.Loaded, name: str, length: int, whole: bool) -> suite.Side:
    """diffusers' LLaDA2Pipeline at the same threshold on the same weights; see `bench.peers`."""
    end = about.model.generation_config.eos_token_id
    sampler = peers.llada2(about.model, BLOCK, threshold=0.9, whole=whole)

    def work(inputs: dict[str, Tensor]) -> Tensor:
        return diffusion.counted(sampler(inputs, length, end).tokens, end)

    return suite.Side(name, work)


def raced(bench: Bench, baseline: str) -> Measurement:
    results, detail = speeds(bench)
    if "pair" not in results:
        return Measurement(float("nan"), baseline, results[baseline]["tokens_per_second"], 0, detail)
    found = suite.ratio_of(results, "pair", baseline)
    return replace(found, detail=found.detail | detail)
