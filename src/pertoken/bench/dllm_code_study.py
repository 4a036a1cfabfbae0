"""Claims of the dLLM code study, on the zoo's diffusion model and its twin of equal size, start and data.

The tasks are those of `bench.code_tasks`: bodies of functions, on a canvas of 64 positions, and unit tests, on 128; and
the bodies of held-out functions of the standard library. Models of this size get few of them right, too few to tell
two settings of most knobs apart: steps, canvas, block and temperature are judged by whether answers are valid Python.
Which positions to commit does not show there (a wrong token parses as well as the right one), so remasking rules, like
the two models, are judged by whether answers are right. All measures of every setting are in the claims' details, and
charts are made of those. Both models run in bf16.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from pertoken.bench import diffusion, suite
from pertoken.bench.claims import Bench, Measurement, claim
from pertoken.bench.code_tasks import Judge, bodies
from pertoken.bench.study_runs import (
    ASSERTIONS,
    BASE,
    BODIES,
    COUNTS,
    FUNCTIONS,
    LENGTHS,
    LONG,
    NAME,
    clocked,
    rows,
    swept,
    tail_losses,
)
from pertoken.core.estimates import difference
from pertoken.denoise.dllm_code_study import study
from pertoken.denoise.loop import COMMIT, Denoise
from pertoken.denoise.study import Outcome, Setting, Study

INFORMED = ("low_confidence", "margin", "entropy")
VALID = "parses"
SHARE = "share of answers that are valid Python"


def over(outcomes: Sequence[Outcome], measure: str) -> list[float]:
    """Mean of a measure over outcomes, one per prompt."""
    return [statistics.mean(values) for values in zip(*(o.means(measure) for o in outcomes), strict=True)]


# ---- 1. exactness


@claim(
    NAME,
    claim="With one step per position every rule commits exactly one token per forward",
    metric="forwards per position of the canvas",
    expected="== 1",
)
def one_per_forward(bench: Bench) -> Measurement:
    settings = [Setting(16, None, 16, rule) for rule in (*INFORMED, "random")]
    about = diffusion.loaded(bench, "bf16")
    prompts = [p.prompt for p in bodies(4)]
    found = study(
        about.model,
        None,
        about.tokenizer,
        prompts,
        Judge(bodies(4)),
        grid={"one": settings},
        samples=1,
        seed=bench.seed,
    )
    forwards = [found.of(s).row()["nfe"] for s in settings]
    return Measurement(statistics.mean(forwards), "positions", 16, len(forwards) * len(prompts), {"forwards": forwards})


@claim(
    NAME,
    claim="With blocks of one position the canvas is filled from left to right",
    metric="share of commits at the first undecided position",
    expected="== 1",
    compare="value",
)
def left_to_right(bench: Bench) -> Measurement:
    about = diffusion.loaded(bench, "bf16")
    inputs, share = about.batch(p.prompt for p in bodies(4)), {}
    for block in (1, None):
        decoder = Denoise(block=block)
        with decoder.record() as trace:
            suite.generate(about.model, inputs, 16, decoder, eos_token_id=None)
        start, first = inputs["input_ids"].shape[1], []
        for number, step in enumerate(trace.at(COMMIT)):
            first += step.decision.keep[:, start:].int().argmax(-1).eq(number).tolist()  # type: ignore[union-attr]
        share[block] = statistics.mean(first)
    return Measurement(share[1], "one block", share[None], len(first))


# ---- 2. steps


@claim(
    NAME,
    claim="Twice the steps never make significantly fewer answers valid",
    metric="doublings of the steps whose 95 % interval of the change is below 0",
    expected="== 0",
    compare="value",
)
def more_steps_no_worse(bench: Bench) -> Measurement:
    worse, total, changes, charts = 0, 0, {}, {}
    for task in (BODIES, ASSERTIONS):
        found = swept(bench, task, "steps")
        outcomes = [found.of(s) for s in found.sweeps["steps"] if not s.autoregressive]
        for few, many in pairwise(outcomes):
            low, high = difference(many.means(VALID), few.means(VALID))
            worse, total = worse + (high < 0), total + 1
            changes[f"{task}: {few.setting.steps} to {many.setting.steps} steps"] = [round(low, 3), round(high, 3)]
        charts[task] = rows(found, "steps")
    return Measurement(worse, "doublings", total, COUNTS[BODIES][bench.quick], {"changes": changes, "charts": charts})


@claim(
    NAME,
    claim="From a quarter of the steps to a sixteenth more is lost than from all of them to a quarter",
    metric="valid answers lost below a quarter, minus those lost above, as a share",
    expected="> 0",
    compare="value",
)
def loss_is_below_a_quarter(bench: Bench) -> Measurement:
    def at(share: float) -> list[list[float]]:
        found = {task: swept(bench, task, "steps") for task in (BODIES, ASSERTIONS)}
        return [s.of(_at(s, "steps", share)).means(VALID) for s in found.values()]

    few, quarter, full = at(1 / 16), at(1 / 4), at(1.0)
    below = [q - f for some, others in zip(quarter, few, strict=True) for q, f in zip(some, others, strict=True)]
    above = [a - q for some, others in zip(full, quarter, strict=True) for a, q in zip(some, others, strict=True)]
    detail = {"interval of the difference": difference(below, above), "loss below": statistics.mean(below)}
    return Measurement(
        statistics.mean(below) - statistics.mean(above), "loss above", statistics.mean(above), len(below), detail
    )


def _at(found: Study, sweep: str, share: float) -> Setting:
    return next(s for s in found.sweeps[sweep] if not s.autoregressive and abs(s.share - share) < 1e-9)


# ---- 3. remasking


def against_random(bench: Bench, rule: str) -> Measurement:
    """Share of bodies that pass with a rule, over that with random commits, at equal steps and temperature 0."""
    found = swept(bench, BODIES, "remasking")

    def of(name: str, measure: str = "passed") -> list[float]:
        return over([found.of(s) for s in found.sweeps["remasking"] if s.rule == name], measure)

    mine, control = of(rule), of("random")
    detail: dict[str, Any] = {
        "interval of the difference": difference(mine, control),
        "origin": statistics.mean(of("origin")),
        "other measures": {
            measure: {name: statistics.mean(of(name, measure)) for name in (rule, "random", "origin")}
            for measure in (VALID, "likeness")
        },
    }
    if rule == INFORMED[0]:
        detail["charts"] = {BODIES: rows(found, "remasking")}
    return Measurement(statistics.mean(mine), "random_commit", statistics.mean(control), len(mine), detail)


def _remasking(rule: str) -> None:
    words = rule.replace("_", " ").capitalize()

    @claim(
        NAME,
        claim=f"{words} remasking passes more bodies than random commits with as many steps",
        metric="share of answers that pass, mean of an eighth and a quarter of the steps",
        expected="> 1",
        shown=rule == INFORMED[0],
    )
    def beats_random(bench: Bench) -> Measurement:
        return against_random(bench, rule)


for _rule in INFORMED:
    _remasking(_rule)


# ---- 4. canvas, block


@claim(
    NAME,
    claim="A canvas of 448 positions is as good as one of 64 where padding with the end of text was trained",
    metric=SHARE,
    expected=">= 0.9",
)
def canvas_is_flat(bench: Bench) -> Measurement:
    sweep = "ends" if bench.quick else "canvas"
    found = swept(bench, LONG, sweep)
    outcomes = [found.of(s) for s in found.sweeps[sweep] if not s.autoregressive]
    detail = {
        "interval of the difference": difference(outcomes[-1].means(VALID), outcomes[0].means(VALID)),
        "share of the canvas that is end of text": [o.row()["end_share"] for o in outcomes],
        "charts": {BODIES: {"canvas": rows(found, sweep)[sweep]}},
    }
    return Measurement(
        outcomes[-1].mean(VALID),
        f"canvas of {outcomes[0].setting.canvas}",
        outcomes[0].mean(VALID),
        outcomes[0].answers,
        detail,
    )


@claim(
    NAME,
    claim="With one step per position token-forwards grow nearly as the square of the canvas",
    metric="exponent of the growth from 32 to 128 positions",
    expected=">= 1.7",
    compare="value",
)
def forwards_grow_as_the_square(bench: Bench) -> Measurement:
    about, forwards = diffusion.loaded(bench, "bf16"), []
    inputs = about.batch(p.prompt for p in bodies(2))
    for canvas in (32, 128):
        decoder = Denoise(block=32)
        suite.generate(about.model, inputs, canvas, decoder)
        forwards.append(decoder.stats.token_forwards)
    exponent = torch.tensor(forwards[1] / forwards[0]).log2().item() / 2
    return Measurement(exponent, "a twin with a cache", 1.0, 2, {"token-forwards": forwards})


@claim(
    NAME,
    claim="Blocks of 32 make at least as many bodies valid as one block of the whole canvas",
    metric=f"{SHARE}, an eighth of the steps",
    expected=">= 1",
)
def blocks_help(bench: Bench) -> Measurement:
    found = swept(bench, BODIES, "block")
    by = {s.block: found.of(s) for s in found.sweeps["block"] if not s.autoregressive}
    whole = by[BASE[BODIES].canvas]
    detail = {
        "interval of the difference": difference(by[32].means(VALID), whole.means(VALID)),
        "charts": {BODIES: rows(found, "block")},
    }
    return Measurement(by[32].mean(VALID), "one block", whole.mean(VALID), whole.answers, detail)


# ---- 5. temperature


def warm(bench: Bench) -> tuple[Outcome, Outcome, Outcome, Study]:
    """Outcomes at temperatures 0, 0.2 and 1."""
    found = swept(bench, BODIES, "temperature")
    at = {s.temperature: found.of(s) for s in found.sweeps["temperature"] if not s.autoregressive}
    return at[0.0], at[0.2], at[1.0], found


@claim(
    NAME,
    claim="At temperature 1 fewer single answers are valid than at 0",
    metric=SHARE,
    expected="< 1",
)
def warm_is_worse_at_once(bench: Bench) -> Measurement:
    greedy, _, hot, found = warm(bench)
    detail = {
        "interval of the difference": difference(hot.means(VALID), greedy.means(VALID)),
        "charts": {BODIES: rows(found, "temperature")},
    }
    return Measurement(hot.mean(VALID), "temperature 0", greedy.mean(VALID), hot.answers, detail)


@claim(
    NAME,
    claim="At temperature 1 answers differ more than at 0.2",
    metric="different answers per prompt, as a share of its samples",
    expected="> 1",
)
def warm_is_diverse(bench: Bench) -> Measurement:
    _, mild, hot, _ = warm(bench)
    return Measurement(hot.distinct, "temperature 0.2", mild.distinct, hot.answers, {"samples": hot.samples})


@claim(
    NAME,
    claim="At temperature 1 several answers gain more over one than at 0.2",
    metric="chance of a valid answer among all samples, minus that of one",
    expected="> 0",
    compare="value",
)
def warm_gains_from_several(bench: Bench) -> Measurement:
    _, mild, hot, _ = warm(bench)
    gains = [outcome.pass_at(outcome.samples, VALID) - outcome.mean(VALID) for outcome in (mild, hot)]
    return Measurement(gains[1] - gains[0], "gain at 0.2", gains[0], hot.answers, {"gain at 1": gains[1]})


# ---- 6. long contexts


def long_context(bench: Bench, length: int) -> Measurement:
    losses, at = tail_losses(bench), LENGTHS.index(length)
    ratio = {name: float(found[at].mean() / found[0].mean()) for name, found in losses.items()}
    mine, theirs = ((losses[name][at] / losses[name][0]).tolist() for name in (diffusion.MODEL, diffusion.TWIN))
    detail = {
        "nats per token": {name: [round(float(v), 4) for v in found.mean(1)] for name, found in losses.items()},
        "lengths": LENGTHS,
        "interval of the difference of ratios": difference(mine, theirs),
    }
    return Measurement(ratio[diffusion.MODEL], "the twin's", ratio[diffusion.TWIN], len(mine), detail)


def _long(times: int) -> None:
    @claim(
        NAME,
        claim=f"At {times} times the longest trained context the diffusion model's loss rises less than its twin's",
        metric=f"loss with {384 * times} tokens of text over loss with 384, on the same tokens",
        expected="< 1",
    )
    def rises_less(bench: Bench) -> Measurement:
        return long_context(bench, 384 * times)


for _times in (2, 4):
    _long(_times)


# ---- against the twin


def beside_twin(bench: Bench, task: str, measure: str) -> Measurement:
    """A measure with one step per position, beside the twin's."""
    found = swept(bench, task, "full")
    mine, theirs = (found.of(s) for s in found.sweeps["full"])
    low, high = difference(mine.means(measure), theirs.means(measure))
    detail: dict[str, Any] = {"interval of the difference": [low, high], "rows": rows(found, "full")["full"]}
    return Measurement(mine.mean(measure), "code-twin", theirs.mean(measure), mine.answers, detail)


@claim(
    NAME,
    claim="With one step per position the diffusion model passes as many bodies as its twin",
    metric="share of answers that pass",
    expected=">= 0.9",
    shown=True,
)
def bodies_as_the_twin(bench: Bench) -> Measurement:
    return beside_twin(bench, BODIES, "passed")


@claim(
    NAME,
    claim="With one step per position the diffusion model writes as many true unit tests as its twin",
    metric="share of lines that are true tests",
    expected=">= 0.9",
)
def tests_as_the_twin(bench: Bench) -> Measurement:
    return beside_twin(bench, ASSERTIONS, "lines")


@claim(
    NAME,
    claim="With one step per position the diffusion model's bodies of held-out functions are as like as its twin's",
    metric="likeness to the original",
    expected=">= 0.9",
)
def functions_as_the_twin(bench: Bench) -> Measurement:
    return beside_twin(bench, FUNCTIONS, "likeness")


@claim(
    NAME,
    claim="For the twin's operations per answer the diffusion model passes fewer bodies, also with a cache",
    metric="share of answers that pass",
    expected="< 1",
)
def equal_operations(bench: Bench) -> Measurement:
    found = swept(bench, BODIES, "fast", "steps")
    twin = found.of(BASE[BODIES].twin)
    budget = twin.row()["flops"]
    mine = {s: found.of(s) for name in ("fast", "steps") for s in found.sweeps[name] if not s.autoregressive}
    within = [o for o in mine.values() if o.row()["flops"] <= budget]
    best = max(within, key=lambda o: o.mean(), default=None)
    reaching = [o.row()["flops"] for o in mine.values() if o.mean() >= 0.95 * twin.mean()]
    detail = {
        "operations of the twin": budget,
        "settings within": len(within),
        "best": str(best.setting) if best else None,
        "operations to reach 95 % of the twin, over the twin's": min(reaching) / budget if reaching else None,
        "charts": {BODIES: rows(found, "fast")},
    }
    return Measurement(best.mean() if best else 0.0, "code-twin", twin.mean(), twin.answers, detail)


@claim(
    NAME,
    claim="In the twin's time per answer, in batches of 8, the diffusion model passes fewer bodies, also with a cache",
    metric="share of answers that pass",
    expected="< 1",
)
def equal_time(bench: Bench) -> Measurement:
    found = swept(bench, BODIES, "fast", "steps")
    twin = found.of(BASE[BODIES].twin)
    steps = [s for s in found.sweeps["steps"] if s.share <= 1 / 4]
    mine = [found.of(s) for s in dict.fromkeys([*found.sweeps["fast"], *steps]) if not s.autoregressive]
    seconds = clocked(bench, [o.setting for o in mine])
    fastest = min(seconds[name] for name in ("generate", "full"))
    within = [o for o in mine if seconds[o.setting] <= fastest]
    best = max(within, key=lambda o: o.mean(), default=None)
    reaching = [seconds[o.setting] for o in mine if o.mean() >= 0.95 * twin.mean()]
    detail = {
        "seconds per answer of the twin": {name: round(seconds[name], 4) for name in ("generate", "full")},
        "seconds per answer": {str(o.setting): [round(seconds[o.setting], 4), round(o.mean(), 4)] for o in mine},
        "time to reach 95 % of the twin, over the twin's": min(reaching) / fastest if reaching else None,
    }
    return Measurement(best.mean() if best else 0.0, "code-twin", twin.mean(), twin.answers, detail)
