"""Claims of Learn2PD: exact where it should be, no more forwards than a fixed threshold at equal agreement, and what
its end-of-text rule saves; and of all commit rules: better than random, and fast together with a refresh rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from pertoken.bench import diffusion, pairs, peers, suite
from pertoken.bench.answers import judge
from pertoken.bench.claims import Bench, Measurement, claim
from pertoken.bench.commits import DIALS, ruled, sweep, tasks, trained
from pertoken.bench.diffusion import BLOCK, Task
from pertoken.denoise.dual_cache import DualCache
from pertoken.denoise.ends import EndOfText
from pertoken.denoise.learn2pd import Learn2PD, Oracle
from pertoken.denoise.loop import Denoise
from pertoken.denoise.schedule import Schedule
from pertoken.denoise.threshold import Threshold

LEVELS = (0.9, 0.95, 0.98)


def at_levels(bench: Bench, name: str, *over: Task) -> list[float]:
    """Forwards per row that a rule needs, for every task and level of agreement."""
    return [diffusion.cost_at(sweep(bench, task, name), level) for task in over for level in LEVELS]


def against(bench: Bench, baseline: str, *over: Task) -> Measurement:
    """Forwards per row at equal agreement: mean over tasks and levels, and each by itself."""
    costs = {name: at_levels(bench, name, *over) for name in ("learn2pd", baseline)}
    detail = {
        "agreements": LEVELS,
        "tasks": [task.name for task in over],
        "forwards": costs,
        "points (label, forwards, positions computed, agreement, identical rows)": {
            task.name: [p.plain for name in costs for p in sweep(bench, task, name)] for task in over
        },
    }
    count = sum(len(task.prompts) for task in over)
    return Measurement(mean(costs["learn2pd"]), baseline, mean(costs[baseline]), count, detail)


@claim(
    "learn2pd",
    claim="Going on with held-out code it needs no more forwards than the best fixed threshold of equal agreement",
    metric="forwards per row at equal agreement with one commit per step (mean over 0.9, 0.95, 0.98)",
    expected="<= 1",
    shown=True,
)
def beats_threshold_on_code(bench: Bench) -> Measurement:
    return against(bench, "threshold", tasks(bench)[0])


@claim(
    "learn2pd",
    claim="Writing unit tests it needs no more forwards than the best fixed threshold of equal agreement",
    metric="forwards per row at equal agreement with one commit per step (mean over 0.9, 0.95, 0.98)",
    expected="<= 1",
    shown=True,
)
def beats_threshold_on_tests(bench: Bench) -> Measurement:
    return against(bench, "threshold", tasks(bench)[1])


@claim(
    "learn2pd",
    claim="On both tasks it needs no more forwards than Fast-dLLM's factor rule of equal agreement",
    metric="forwards per row at equal agreement with one commit per step (mean over 0.9, 0.95, 0.98)",
    expected="<= 1",
)
def beats_factor(bench: Bench) -> Measurement:
    return against(bench, "factor", *tasks(bench))


@claim(
    "learn2pd",
    claim="On both tasks it needs no more forwards than the entropy bound of equal agreement",
    metric="forwards per row at equal agreement with one commit per step (mean over 0.9, 0.95, 0.98)",
    expected="<= 1",
)
def beats_entropy_bound(bench: Bench) -> Measurement:
    return against(bench, "entropy_bound", *tasks(bench))


@claim(
    "learn2pd",
    claim="Every commit rule agrees better with one commit per step than random commits in as many forwards",
    metric="agreement at half and a quarter of the forwards, the worst rule (mean over both tasks)",
    expected="> 1",
)
def rules_beat_random(bench: Bench) -> Measurement:
    found: dict[str, list[tuple[float, float]]] = {}
    for task in tasks(bench):
        control = sweep(bench, task, "random_commit")
        for name in DIALS:
            if name == "random_commit":
                continue
            mine = sweep(bench, task, name)
            for share in (2,) if bench.quick else (2, 4):
                value = diffusion.agreement_at(mine, task.length / share)
                if value > float("-inf"):  # an adaptive rule's cheapest setting may be dearer than this
                    base = diffusion.agreement_at(control, task.length / share)
                    found.setdefault(name, []).append((value, base))
    means = {name: (mean(v for v, _ in pairs), mean(b for _, b in pairs)) for name, pairs in found.items()}
    worst = min(means, key=lambda name: means[name][0] / means[name][1])
    detail = {"rule: its agreement, random's": means, "worst": worst}
    return Measurement(*_first(means[worst]), sum(len(task.prompts) for task in tasks(bench)), detail)


def _first(pair: tuple[float, float]) -> tuple[float, str, float]:
    return pair[0], "random_commit", pair[1]


@claim(
    "learn2pd",
    claim="Tokens per forward fall with every step of the threshold, to 1 above 1",
    metric="share of neighbouring settings in this order",
    expected="== 1",
    compare="value",
)
def threshold_is_monotone(bench: Bench) -> Measurement:
    rates = {task.name: [task.length / p.steps for p in sweep(bench, task, "threshold")] for task in tasks(bench)}
    ordered = [a >= b for found in rates.values() for a, b in pairwise(found)]
    ordered += [found[-1] == 1 for found in rates.values()]
    count = sum(len(task.prompts) for task in tasks(bench))
    return Measurement(mean(ordered), "order", 1.0, count, {"tokens per forward": rates})


def by_the_letter(model: Any, prompt: Tensor, length: int, block: int, steps: int) -> list[int]:
    """LLaDA's sampler for one prompt `[token]`: every step a forward of the model itself, n_i = m // S commits, one
    more at the first m % S steps; outputs shifted as the configuration says."""
    mask, shift = model.config.mask_token_id, getattr(model.config, "prediction_shift", 0)
    start, ids = len(prompt), torch.cat([prompt, torch.full((length,), mask)])
    for first in range(start, start + length, block):
        per_block = steps // (length // block)
        for step in range(per_block):
            places = [c for c in range(first, first + block) if ids[c] == mask]
            full = torch.zeros(1, 1, len(ids), len(ids), dtype=model.dtype)
            logits = model(ids[None], attention_mask=full, use_cache=False).logits[0].double()
            logits[:, mask] = -torch.inf
            law = {c: logits[c - shift].softmax(-1).max(-1) for c in places}
            count = block // per_block + (step < block % per_block)
            for column in sorted(places, key=lambda c: -float(law[c].values))[:count]:
                ids[column] = int(law[column].indices)
    return ids[start:].tolist()


@claim(
    "learn2pd",
    claim="With tau=1, like a threshold above 1, it is LLaDA's sampler token for token (fp32, ragged batch)",
    metric="share of rows identical to a sampler written by the letter",
    expected="== 1",
    compare="value",
)
def is_lladas_sampler(bench: Bench) -> Measurement:
    task = diffusion.excerpts(bench, 64, 16, 3)
    about, same, total = diffusion.loaded(bench), 0, 0
    for steps, rules in {
        64: (Learn2PD(trained(bench), 1.0), Threshold(1.5)),
        16: (Learn2PD(trained(bench), 1.0), Schedule()),
    }.items():
        inputs = about.batch(task.prompts)
        with torch.inference_mode():
            rows = zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True)
            wanted = [by_the_letter(about.model, ids[kept], 64, BLOCK, steps) for ids, kept in rows]
        for rule in rules:
            decoder = Denoise(rule, block=BLOCK, steps=steps)
            out = diffusion.decode(bench, task, decoder, batch=len(task.prompts), eos_token_id=None)
            same += sum(ids.tolist() == row for ids, row in zip(out.ids, wanted, strict=True))
            total += len(wanted)
    return Measurement(same / total, "LLaDA's sampler by the letter", 1.0, total, {"steps": [64, 16]})


@claim(
    "learn2pd",
    claim="Rows of ragged batches of 8 are what each is alone, with a dual cache and end-of-text prediction (fp32)",
    metric="share of rows with identical ids",
    expected="== 1",
    compare="value",
)
def rows_are_independent(bench: Bench) -> Measurement:
    task = diffusion.excerpts(bench, 64, 64, 8)
    decoder = Denoise(Learn2PD(trained(bench), 0.9), DualCache(), EndOfText())
    together, alone = (diffusion.decode(bench, task, decoder, batch=batch) for batch in (8, 1))
    alike = diffusion.agreement(together.ids, alone.ids)
    return Measurement(alike.rows, "alone", 1.0, len(task.prompts), {"positions": alike.positions})


@claim(
    "learn2pd",
    claim="An oracle that commits every guess that is already right needs less than a third of the forwards",
    metric="forwards per row",
    expected="<= 0.3333",
)
def oracle_headroom(bench: Bench) -> Measurement:
    task = diffusion.excerpts(bench, 64 if bench.quick else 128, 16, 4)
    options: dict[str, Any] = {"batch": len(task.prompts), "eos_token_id": None}
    wanted = diffusion.reference(bench, task, **options)
    rule = Oracle(wanted.ids)
    out = diffusion.decode(bench, task, Denoise(rule, block=BLOCK), **options)
    stuck = sum(int((~(right & undecided).any(-1)).sum()) for _, right, undecided in rule.records)
    mine = diffusion.decode(bench, task, ruled(bench, "learn2pd", 0.96, task.length), **options)
    detail = {
        "rows identical": diffusion.agreement(out.ids, wanted.ids, None).rows,
        "row steps without a right guess": stuck,
        "row steps": out.row_steps,
        "learn2pd at tau 0.96": mine.steps,
    }
    return Measurement(out.steps, "schedule", wanted.steps, len(task.prompts), detail)


def too_long(bench: Bench, when: Any, cost: str) -> Measurement:
    """The end-of-text rule on a canvas of 256 for bodies of at most 64 tokens, against the canvas that fits."""
    fits = 32 if bench.quick else 64
    task, found = diffusion.functions(bench, fits, 48, 4), {}
    for length in (fits, 4 * fits):
        for label, canvas in {"with": EndOfText(when), "without": None}.items():
            decoder = ruled(bench, "learn2pd", 0.96, length, canvas=canvas)
            found[length, label] = diffusion.decode(bench, task.on(length), decoder)
    long, fitting = found[4 * fits, "with"], found[fits, "with"]
    detail = {
        f"canvas {length}, {label} it (forwards, positions computed, likeness)": [
            round(out.steps, 2),
            round(out.forwards, 1),
            round(out.quality.likeness, 4),
        ]
        for (length, label), out in found.items()
    }
    pick: Callable[[diffusion.Output], float] = (
        (lambda out: out.forwards) if cost == "forwards" else (lambda out: out.quality.likeness)
    )
    return Measurement(pick(long), "canvas that fits", pick(fitting), len(task.prompts), detail)


@claim(
    "learn2pd",
    claim="On a canvas four times too long, cutting at a decided end of text (the paper's rule) costs no more than 1.2 "
    "times the canvas that fits",
    metric="positions computed per row",
    expected="<= 1.2",
)
def decided_end_saves(bench: Bench) -> Measurement:
    return too_long(bench, "decided", "forwards")


@claim(
    "learn2pd",
    claim="On a canvas four times too long, cutting at a predicted end of text (the code's rule) costs no more than "
    "1.2 times the canvas that fits",
    metric="positions computed per row",
    expected="<= 1.2",
)
def predicted_end_saves(bench: Bench) -> Measurement:
    return too_long(bench, "predicted", "forwards")


for _when, _rule in (("decided", "the paper's rule"), ("predicted", "the code's rule")):
    claim(
        "learn2pd",
        claim=f"On a canvas four times too long, cutting at a {_when} end of text ({_rule}) keeps the quality",
        metric="likeness of the function bodies to the originals",
        expected=">= 0.98",
    )(partial(too_long, when=_when, cost="likeness"))


@claim(
    "learn2pd",
    claim="A filter of two layers needs fewer forwards than one of a single layer at an equal rate of wrong commits",
    metric="forwards per row (mean over rates of 0.5, 1, 2 and 5 % and both tasks)",
    expected="< 1",
)
def two_layers_beat_one(bench: Bench) -> Measurement:
    rates, steps, detail = ("0.02",) if bench.quick else ("0.005", "0.01", "0.02", "0.05"), {}, {}
    for layers in (2, 1):
        net, found = trained(bench, layers), []
        for task in tasks(bench):
            decoders = {rate: Denoise(Learn2PD(net, net.about["tau"][rate]), block=BLOCK) for rate in rates}
            found += diffusion.points(bench, task, decoders)
        steps[layers] = mean(p.steps for p in found)
        detail[f"{layers} layers: rate, forwards, positions, agreement, identical"] = [p.plain for p in found]
    count = sum(len(task.prompts) for task in tasks(bench))
    return Measurement(steps[2], "one layer", steps[1], count, detail)


@claim(
    "learn2pd",
    claim="The best pair of a commit and a refresh rule, with end-of-text prediction, is at least 1.3 times as fast as "
    "Fast-dLLM's threshold with dual cache at equal agreement (unit tests, batch 1)",
    metric="tokens per second",
    expected=">= 1.3",
    shown=True,
)
def best_pair_is_fast(bench: Bench) -> Measurement:
    return pairs.raced(bench, "fast-dllm")


@claim(
    "learn2pd",
    claim="The same pair is at least three times as fast as diffusers' LLaDA2 pipeline on the same weights (unit "
    "tests, batch 1)",
    metric="tokens per second",
    expected=">= 3",
    shown=True,
)
def best_pair_beats_diffusers(bench: Bench) -> Measurement:
    found = pairs.raced(bench, "diffusers")
    task, about = tasks(bench)[1], diffusion.loaded(bench)
    sampler, rows = peers.llada2(about.model, BLOCK, threshold=0.9), []
    for part in suite.chunks(list(task.prompts), 16):
        rows.append(sampler(about.batch(part), task.length, about.model.generation_config.eos_token_id).tokens)
    texts = about.tokenizer.batch_decode(torch.cat(rows), skip_special_tokens=True)
    theirs = judge(list(task.prompts), texts, list(task.originals), task.tests)
    ours = diffusion.decode(bench, task, pairs.fast_dllm()).quality
    stated = {"likeness to the originals (theirs, threshold 0.9 with dual cache)": [theirs.likeness, ours.likeness]}
    return replace(found, detail=found.detail | stated)
