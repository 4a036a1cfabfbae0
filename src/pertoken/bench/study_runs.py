"""What the claims of the dLLM code study share: tasks, settings, runs, clocks, and losses on long texts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pertoken.bench import diffusion, suite
from pertoken.bench.claims import Bench
from pertoken.bench.code_tasks import Judge, Problem, assertions, bodies
from pertoken.core.cost import synchronize
from pertoken.decode.full import Full
from pertoken.denoise.dllm_code_study import REFRESHES, RULES, study, sweeps
from pertoken.denoise.loop import Denoise
from pertoken.denoise.study import Setting, Study

NAME = "dllm_code_study"
BODIES, ASSERTIONS, FUNCTIONS = "function bodies", "unit tests", "held-out functions"
LONG = "function bodies on long canvases"  # the first half of the bodies: a canvas of 448 costs 43 times one of 64
BASE = {
    BODIES: Setting(64, 32, 8),
    LONG: Setting(64, 32, 8),
    ASSERTIONS: Setting(128, 32, 32),
    FUNCTIONS: Setting(64, 32, 64),
}
COUNTS = {BODIES: (64, 6), LONG: (32, 4), ASSERTIONS: (48, 4), FUNCTIONS: (32, 4)}  # full, quick
LONGEST = 448
MEASURES = ("passed", "parses", "likeness", "lines")
KEPT = ("canvas", "block", "steps", "share", "rule", "refresh", "temperature", "autoregressive", "prompts", "samples",
        *(f"{name}{end}" for name in MEASURES for end in ("", "_low", "_high", "@k")), "distinct", "nfe",
        "tokens_per_nfe", "token_forwards", "flops", "seconds", "length", "end_share")  # fmt: skip


@dataclass
class Held:
    """A task's problems, and what has been run of its study."""

    problems: list[Problem]
    study: Study | None = None


def grid(bench: Bench, task: str) -> dict[str, list[Setting]]:
    """Settings of a task by sweep."""
    base = BASE[task]
    made = sweeps(base, LONGEST, rule_shares=(1 / 8, 1 / 4), canvases=(64, 128, 256))
    fast = [replace(base, steps=None, rule="threshold", refresh=cache) for cache in ("recompute", "dual_cache")]
    fast += [replace(base, steps=n, refresh="dual_cache") for n in (base.canvas // 8, base.canvas // 4, base.canvas)]
    fast += [replace(base, block=None, steps=n) for n in (1, 2, 4)]
    made["fast"] = [*fast, base.twin]
    made["full"] = [replace(base, steps=base.canvas), base.twin]
    made["ends"] = [s for s in made["canvas"] if s.canvas in (64, LONGEST)]
    return made


def problems(bench: Bench, task: str) -> list[Problem]:
    full, quick = COUNTS[task]
    count = quick if bench.quick else full
    if task == FUNCTIONS:
        found = diffusion.functions(bench, BASE[task].canvas, full, quick)
        return [Problem(p, o, "") for p, o in zip(found.prompts, found.originals, strict=True)]
    return assertions(count) if task == ASSERTIONS else bodies(count)


def swept(bench: Bench, task: str, *names: str) -> Study:
    """The study of a task with these sweeps; what other claims have run already is taken from there."""
    held = bench.shared((NAME, task), lambda: Held(problems(bench, task)))
    about, twin = (diffusion.loaded(bench, "bf16", name) for name in (diffusion.MODEL, diffusion.TWIN))
    held.study = study(
        about.model,
        twin.model,
        about.tokenizer,
        [problem.prompt for problem in held.problems],
        Judge(held.problems),
        grid={name: grid(bench, task)[name] for name in names},
        samples=3 if bench.quick else 5,
        seed=bench.seed,
        about=f"{task}, {about.model.config.num_hidden_layers} layers",
        known=held.study,
        status=bench.status,
    )
    return held.study


def rows(found: Study, *names: str) -> dict[str, list[dict[str, Any]]]:
    """For a claim's detail: the rows of these sweeps, figures to four digits."""
    return {name: [{key: _short(row[key]) for key in KEPT if key in row} for row in found.rows(name)] for name in names}


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


LENGTHS, TAIL = (384, 768, 1536), 96


def tail_losses(bench: Bench) -> dict[str, Tensor]:
    """Nats per token `[length, window]` of both models on the same last tokens, with more and more text before them.

    The twin predicts all of the last `TAIL` tokens, the diffusion model a random half of them from the other half; what
    comes before is given to both.
    """

    def make() -> dict[str, Tensor]:
        from pertoken.zoo import corpus

        pair = {name: diffusion.loaded(bench, "bf16", name) for name in (diffusion.MODEL, diffusion.TWIN)}
        stream = corpus.token_stream(
            pair[diffusion.MODEL].tokenizer.backend_tokenizer, list(corpus.split_texts("heldout").values())
        ).astype(np.int64)
        windows = corpus.windows(stream, LENGTHS[-1] - 1, 0, bench.seed)[: 8 if bench.quick else 48]
        ids = torch.from_numpy(windows)
        hidden = torch.rand(len(ids), TAIL, generator=torch.Generator().manual_seed(bench.seed)) < 0.5
        return {
            name: torch.stack([window_losses(one, ids[:, -n:], hidden) for n in LENGTHS]) for name, one in pair.items()
        }

    return bench.shared((NAME, "tail losses"), make)


@torch.inference_mode()
def window_losses(about: diffusion.Loaded, ids: Tensor, hidden: Tensor, batch: int = 4) -> Tensor:
    """`[window]` mean cross-entropy over the hidden tokens of the tail, or over all of it for a causal model."""
    model, found = about.model, []
    mask_token = getattr(model.config, "mask_token_id", None)
    for part, at in zip(ids.split(batch), hidden.split(batch), strict=True):
        given, options = part.clone(), {}
        if mask_token is not None:
            given[:, -TAIL:][at] = mask_token
            width = part.shape[1]
            options["attention_mask"] = torch.zeros(len(part), 1, width, width, dtype=model.dtype)
        logits = model(given, use_cache=False, logits_to_keep=TAIL + 1, **options).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), part[:, -TAIL:], reduction="none")
        weight = at.float() if mask_token is not None else torch.ones_like(loss)
        found.append((loss * weight).sum(-1) / weight.sum(-1))
    return torch.cat(found)


def clocked(bench: Bench, settings: Sequence[Setting]) -> dict[Any, float]:
    """Median seconds per answer of each setting and of the twin's two loops, all in turn on the same batches of 8."""
    about, twin = (diffusion.loaded(bench, "bf16", name) for name in (diffusion.MODEL, diffusion.TWIN))
    contenders: dict[Any, tuple[Any, Any]] = {"generate": (twin.model, None), "full": (twin.model, Full())}
    for s in settings:
        contenders[s] = (
            about.model,
            Denoise(RULES[s.rule](s, 0), REFRESHES[s.refresh](), block=s.block, steps=s.steps),
        )
    batches = suite.chunks([p.prompt for p in bodies(8 if bench.quick else 32)], 8)
    taken: dict[Any, list[float]] = {name: [] for name in contenders}
    for number, part in enumerate([batches[0], *batches]):
        inputs = about.batch(part)
        for name, (model, decoder) in contenders.items():
            synchronize(model.device)
            start = time.perf_counter()
            suite.generate(model, inputs, BASE[BODIES].canvas, decoder)
            synchronize(model.device)
            if number:
                taken[name].append((time.perf_counter() - start) / len(part))
    return {name: statistics.median(values) for name, values in taken.items()}
