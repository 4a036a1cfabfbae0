"""Claims of AdaDec: greedy at an infinite threshold; better than greedy, beam search and random pauses at their cost.

The model is the zoo's autoregressive twin, the task unit tests of functions: a line of an answer is right if it is a
true test. The threshold is learnt from such tests with other seeds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from pertoken.bench import diffusion, suite
from pertoken.bench.answers import judge
from pertoken.bench.claims import Bench, Measurement, claim
from pertoken.core.estimates import roc_area
from pertoken.decode.adadec import AdaDec, Threshold, learn_threshold, teacher_forced
from pertoken.decode.random_pause import RandomPause

LENGTH, METRIC = 96, "share of the lines written that are true tests"
LEARN_FROM = 5 * 10**6  # seeds that neither training nor the tasks use


@dataclass(frozen=True)
class Made:
    """Quality of a side's answers, and per token of them: forwards of the model (batch 1), tokens read, pauses."""

    lines: float
    tests: float
    forwards: float
    read: float
    pauses: float
    n: int


def taught(bench: Bench) -> tuple[list[list[int]], list[int]]:
    """Functions with their tests as ids, and how many tokens of each are the function's."""
    from pertoken.zoo.unit_tests import unit_tests

    tokenizer = diffusion.loaded(bench, name=diffusion.TWIN).tokenizer
    pairs = unit_tests(32 if bench.quick else 256, LEARN_FROM, ("python",))
    ids = lambda text: tokenizer(text)["input_ids"]  # noqa: E731
    return [[*ids(a + b), tokenizer.eos_token_id] for a, b in pairs], [len(ids(a)) for a, _ in pairs]


def threshold(bench: Bench) -> Threshold:
    texts, given = taught(bench)
    model = diffusion.loaded(bench, name=diffusion.TWIN).model
    return bench.shared("adadec threshold", lambda: learn_threshold(model, texts, given=given))


def made(bench: Bench, label: str, decoder: Any = None, beams: int = 1) -> Made:
    """Answers of a decoder, or of transformers' own greedy or beam search, one prompt at a time."""

    def measure() -> Made:
        about = diffusion.loaded(bench, name=diffusion.TWIN)
        task = diffusion.unit_tests(bench, 64, 4)
        end, texts = about.model.generation_config.eos_token_id, []
        tokens = forwards = read = pauses = 0
        calls = [0, 0]

        def count(module: Any, args: Any, kwargs: Any) -> None:
            ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
            calls[0], calls[1] = calls[0] + 1, calls[1] + len(ids)

        for prompt in task.prompts:
            inputs, calls[:] = about.batch([prompt]), [0, 0]
            if decoder is None:
                hook = about.model.register_forward_pre_hook(count, with_kwargs=True)
                try:
                    ids = suite.generate(about.model, inputs, LENGTH, num_beams=beams)
                finally:
                    hook.remove()
                forwards, read = forwards + calls[0], read + calls[1]
            else:
                ids = suite.generate(about.model, inputs, LENGTH, decoder)
                forwards, read = forwards + decoder.stats.forwards, read + decoder.stats.token_forwards
                pauses += decoder.stats.pauses
            tokens += len(diffusion.counted(ids, end))
            texts.append(about.tokenizer.decode(ids[0], skip_special_tokens=True))
        quality = judge(list(task.prompts), texts, list(task.originals), True)
        rates = {"forwards": forwards / tokens, "read": read / tokens, "pauses": pauses / tokens}
        return Made(lines=quality.lines, tests=quality.tests, **rates, n=len(texts))

    return bench.shared(("adadec", label), measure)


def ours(bench: Bench) -> Made:
    return made(bench, "adadec", AdaDec(threshold(bench)))


def against(mine: Made, name: str, other: Made, **more: Any) -> Measurement:
    detail = {"adadec": vars(mine), name: vars(other)} | more
    return Measurement(mine.lines, name, other.lines, mine.n, detail)


@claim(
    "adadec",
    claim="At an infinite threshold its ids equal greedy decoding's on every held-out prompt in batches of 8 (fp32)",
    metric="share of prompts with identical ids",
    expected="== 1",
    compare="value",
)
def never_pausing_is_greedy(bench: Bench) -> Measurement:
    return suite.identical(bench, lambda models: AdaDec(math.inf), 8)


@claim(
    "adadec",
    claim="More of the lines that it writes are true than of greedy decoding's",
    metric=METRIC,
    expected="> 1",
    shown=True,
)
def beats_greedy(bench: Bench) -> Measurement:
    return against(ours(bench), "generate", made(bench, "greedy"))


@claim(
    "adadec",
    claim="More of the lines that it writes are true than of beam search's with at least as many tokens read",
    metric=METRIC,
    expected="> 1",
    shown=True,
)
def beats_beam(bench: Bench) -> Measurement:
    mine = ours(bench)
    sides = {width: made(bench, f"beam {width}", beams=width) for width in (2, 3, 5)}
    fair = [width for width, side in sides.items() if side.read >= mine.read] or [5]
    return against(mine, f"beam search of {fair[0]}", sides[fair[0]], beams={w: vars(s) for w, s in sides.items()})


@claim(
    "adadec",
    claim="More of the lines that it writes are true than with random pauses at an equal rate",
    metric=METRIC,
    expected="> 1",
    shown=True,
)
def beats_random(bench: Bench) -> Measurement:
    mine = ours(bench)
    return against(mine, "random_pause", made(bench, "random", RandomPause(mine.pauses, seed=bench.seed)))


@claim(
    "adadec",
    claim="Reusing the continuation, it needs at most 10 % more forwards per token than greedy decoding",
    metric="forwards of the model per token, one prompt at a time",
    expected="<= 1.1",
)
def reuse_pays(bench: Bench) -> Measurement:
    mine, plain = ours(bench), made(bench, "greedy")
    without = made(bench, "no reuse", AdaDec(threshold(bench), reuse=False))
    return Measurement(mine.forwards, "generate", plain.forwards, mine.n, {"without reuse": vars(without)})


@claim(
    "adadec",
    claim="Where the model is unsure it is wrong: its entropy ranks wrong tokens above right ones",
    metric="area under the ROC curve",
    expected="> 0.85",
    compare="value",
)
def entropy_predicts(bench: Bench) -> Measurement:
    texts, given = taught(bench)
    entropies, right = teacher_forced(diffusion.loaded(bench, name=diffusion.TWIN).model, texts, given=given)
    found = threshold(bench)
    return Measurement(roc_area(entropies, ~right), "chance", 0.5, len(right), {"threshold": vars(found)})
