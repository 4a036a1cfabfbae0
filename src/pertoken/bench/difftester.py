"""Claims of DiffTester: steps saved at equal coverage of the tests written, what its parts and its rows contribute, and
what its comparison costs.

Coverage is the number of distinct tests, true or not, that can run and that the rows of a prompt write together: the
branches of a function of one expression are covered by any. In Java and C++, which do not run here, it is the number of
distinct lines that are whole calls. How many of the tests are true is in the details: the zoo's model gets few right,
too few to compare two settings by. One block and two positions per step are the paper's, its temperature of 1 is not:
at 1 this model mostly writes lines that are no tests. Temperature and measure were chosen on other functions than those
measured.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from pertoken.bench import diffusion, suite
from pertoken.bench.answers import defined, is_true, parses
from pertoken.bench.claims import Bench, Measurement, claim
from pertoken.bench.code_tasks import UNSEEN
from pertoken.denoise.canvas import Canvas
from pertoken.denoise.difftester import DiffTester
from pertoken.denoise.ends import PaddingFill
from pertoken.denoise.loop import Denoise
from pertoken.denoise.rules import CommitRule, Guess, top
from pertoken.denoise.schedule import Schedule
from pertoken.denoise.syntax import LITERALS, STRING_TEXT
from pertoken.denoise.threshold import Threshold

TIGHT, WIDE = 72, 288  # positions; the tests of every prompt fit the first
STEPS = {TIGHT: 36, WIDE: 72}
TEMPERATURE, DRAWN = 0.5, 0.05
PLAIN = Schedule(alg_temp=DRAWN, sharpened=True)
SHARES, RAW, TAUS = (0.0, 0.005, 0.01, 0.02), (0.3, 0.5, 0.7, 0.9), (0.5, 0.7, 0.8, 0.9, 0.95)
KEPT = 0.95  # of the base's coverage: what counts as equal
COLUMNS = "steps, distinct tests, of these true, share of lines that are tests, diversity, extra commits"
CALL = re.compile(r"assertEquals\(.+, \w+\(.*\)\);|EXPECT_EQ\(\w+\(.*\), .+\);")


@dataclass(frozen=True)
class RandomExtra(CommitRule):
    """The control: as many extra commits per row and step as DiffTester makes, at random undecided places."""

    inner: DiffTester

    def fitted(self, settings: Any) -> RandomExtra:
        return RandomExtra(self.inner.fitted(settings))

    def choose(self, guess: Guess, canvas: Canvas) -> Tensor:
        chosen = self.inner.base.choose(guess, canvas) & guess.masked
        count = self.inner.extra(guess, canvas, chosen).sum(-1)
        free = guess.masked & ~chosen
        return chosen | top(torch.rand_like(guess.confidence).masked_fill(~free, -torch.inf), count)


@dataclass(frozen=True)
class Watched(CommitRule):
    """A DiffTester, and for every row and step how many places were undecided and how many it added."""

    inner: DiffTester
    seen: list[tuple[int, int]] = field(default_factory=list, compare=False)

    def fitted(self, settings: Any) -> Watched:
        return Watched(self.inner.fitted(settings), self.seen)

    def choose(self, guess: Guess, canvas: Canvas) -> Tensor:
        chosen = self.inner.base.choose(guess, canvas) & guess.masked
        extra = self.inner.extra(guess, canvas, chosen)
        self.seen.extend(zip(guess.masked.sum(-1).tolist(), extra.sum(-1).tolist(), strict=True))
        return chosen | extra


@dataclass(frozen=True)
class Written:
    """What was written for each prompt, all rows together. steps: forwards per row; seconds, compared: of all, and of
    the comparison of lines; added: extra commits per row."""

    prompts: tuple[str, ...]
    texts: tuple[tuple[str, ...], ...]
    steps: float
    seconds: float
    compared: float
    added: float

    @cached_property
    def tests(self) -> list[list[str]]:
        """The tests of each prompt that can run."""
        return [
            [line for text in texts for line in text.splitlines() if can_run(line, prompt)]
            for prompt, texts in zip(self.prompts, self.texts, strict=True)
        ]

    @property
    def coverage(self) -> float:
        """Distinct tests per prompt."""
        return mean(len(set(lines)) for lines in self.tests)

    @property
    def true(self) -> float:
        """Distinct true tests per prompt; nothing in Java and C++."""
        return mean(
            sum(is_true(line, defined(prompt)) for line in set(lines)) if prompt.startswith("def ") else 0
            for prompt, lines in zip(self.prompts, self.tests, strict=True)
        )

    @property
    def valid(self) -> float:
        """Share of the lines that are tests."""
        return sum(map(len, self.tests)) / max(sum(len(t.splitlines()) for texts in self.texts for t in texts), 1)

    @property
    def diversity(self) -> float:
        """Distinct tests over tests."""
        return sum(len(set(lines)) for lines in self.tests) / max(sum(map(len, self.tests)), 1)

    @property
    def plain(self) -> list[float]:
        """For a claim's detail, in the order of `COLUMNS`."""
        return [round(v, 3) for v in (self.steps, self.coverage, self.true, self.valid, self.diversity, self.added)]


def can_run(line: str, prompt: str) -> bool:
    """Whether a line is a test of the prompt's function, true or not."""
    if not prompt.startswith("def "):
        return CALL.fullmatch(line) is not None
    name, parameters = re.findall(r"def (\w+)\((.*)\):", prompt)[0]
    if not parses(line):
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        body = ast.parse(line).body
    match body:
        case [ast.Assert(ast.Compare(ast.Call(ast.Name(called), given, []), [ast.Eq()], [result]), None)]:
            return called == name and len(given) == parameters.count(",") + 1 and all(map(literal, [*given, result]))
    return False


def literal(node: ast.expr) -> bool:
    try:
        ast.literal_eval(node)
    except (ValueError, TypeError, MemoryError, RecursionError):
        return False
    return True


def rows(bench: Bench) -> int:
    """Rows per prompt."""
    return 3 if bench.quick else 5


def prompts(bench: Bench, language: str = "python") -> tuple[str, ...]:
    """Unseen functions whose tests fit the tight canvas."""
    from pertoken.zoo.unit_tests import unit_tests

    def make() -> tuple[str, ...]:
        about, count = diffusion.loaded(bench), 2 if bench.quick else 16
        pairs = dict.fromkeys(unit_tests(20 * count, UNSEEN + 1, (language,)))
        return tuple(p for p, tests in pairs if about.length(tests) < TIGHT)[:count]

    return bench.shared(("difftester prompts", language), make)


def tester(bench: Bench, base: CommitRule = PLAIN, share: float | None = DRAWN, **options: Any) -> DiffTester:
    return DiffTester(diffusion.loaded(bench).tokenizer, base, share=share, **options)


def write(
    bench: Bench, commit: CommitRule, fill: bool = True, length: int = TIGHT, many: int = 0, language: str = "python"
) -> Written:
    """What `many` rows of each prompt become, a few prompts to a batch; the seed is the bench's for every setting."""
    about, many = diffusion.loaded(bench), many or rows(bench)
    texts = prompts(bench, language)[: 1 if bench.quick and length == WIDE else None]

    def make() -> Written:
        decoder = Denoise(commit, canvas=PaddingFill() if fill else None, block=None, steps=STEPS[length])
        stats = getattr(getattr(commit, "inner", commit), "stats", None)
        torch.manual_seed(bench.seed)
        found, sums = [], dict.fromkeys(("row_steps", "seconds"), 0.0) | {"compared": 0.0, "added": 0.0}
        for part in suite.chunks(list(texts), max(20 // many, 1)):
            bench.status(
                f"{type(commit).__name__}, {language}, canvas {length}, {many} rows: {len(found)} prompts done"
            )
            inputs = about.batch([prompt for prompt in part for _ in range(many)])
            ids = suite.generate(about.model, inputs, length, decoder, do_sample=True, temperature=TEMPERATURE, top_k=0)
            lines = about.tokenizer.batch_decode(ids, skip_special_tokens=True)
            found += [tuple(lines[i * many : (i + 1) * many]) for i in range(len(part))]
            sums["row_steps"] += decoder.stats.row_steps
            sums["seconds"] += decoder.stats.seconds
            if stats is not None:
                sums["compared"] += stats.seconds
                sums["added"] += stats.added
        count = len(texts) * many
        return Written(
            texts, tuple(found), sums["row_steps"] / count, sums["seconds"], sums["compared"], sums["added"] / count
        )

    return bench.shared(("difftester", commit, fill, length, many, language), make)


def ablation(bench: Bench, length: int) -> dict[str, Written]:
    """The base sampler, with either part, with both, and with both where decided lines are compared too."""
    parts: dict[str, tuple[CommitRule, bool]] = {
        "plain": (PLAIN, False),
        "fill": (PLAIN, True),
        "lines": (tester(bench), False),
        "both": (tester(bench), True),
    }
    if length == TIGHT:
        parts["both, decided lines too"] = tester(bench, templates="all"), True
    return {name: write(bench, commit, fill, length) for name, (commit, fill) in parts.items()}


def detail(found: dict[Any, Written]) -> dict[str, Any]:
    return {COLUMNS: {str(name): written.plain for name, written in found.items()}}


def least(bench: Bench, settings: dict[str, CommitRule]) -> tuple[float, dict[str, Written]]:
    """Steps of the fastest setting whose coverage is at least `KEPT` of the plain sampler's; infinite if none is."""
    wanted = KEPT * write(bench, PLAIN, False).coverage
    found = {name: write(bench, commit) for name, commit in settings.items()}
    return min((w.steps for w in found.values() if w.coverage >= wanted), default=float("inf")), found


def thresholds(bench: Bench, wrap: Callable[[CommitRule], CommitRule] = lambda rule: rule) -> dict[str, CommitRule]:
    return {f"threshold {tau}": wrap(Threshold(tau)) for tau in TAUS[:: 2 if bench.quick else 1]}


@claim(
    "difftester",
    claim="Lines compared and padding filled, it takes at most two thirds of its base sampler's steps (tight canvas)",
    metric="forwards per row",
    expected="<= 0.667",
    shown=True,
)
def fewer_steps(bench: Bench) -> Measurement:
    found = ablation(bench, TIGHT)
    return Measurement(found["both"].steps, "schedule", found["plain"].steps, len(prompts(bench)), detail(found))


@claim(
    "difftester",
    claim="Its rows write at least 0.95 of the distinct tests that the base sampler's rows write",
    metric="distinct tests per prompt, all its rows together",
    expected=">= 0.95",
    shown=True,
)
def coverage(bench: Bench) -> Measurement:
    found = ablation(bench, TIGHT)
    return Measurement(found["both"].coverage, "schedule", found["plain"].coverage, len(prompts(bench)), detail(found))


@claim(
    "difftester",
    claim="At equal coverage it takes fewer steps than decoding by a threshold, padding filled in both",
    metric="forwards per row of the fastest setting with at least 0.95 of the base sampler's distinct tests",
    expected="< 1",
    shown=True,
)
def against_threshold(bench: Bench) -> Measurement:
    own: dict[str, CommitRule] = {
        f"share {bound}": tester(bench, threshold=bound) for bound in (SHARES[::3] if bench.quick else SHARES)
    }
    own |= {f"raw {bound}": tester(bench, threshold=bound, share=None) for bound in (RAW[::2] if bench.quick else RAW)}
    mine, found = least(bench, own)
    theirs, others = least(bench, thresholds(bench))
    return Measurement(mine, "threshold", theirs, len(prompts(bench)), detail(found | others))


@claim(
    "difftester",
    claim="Comparing lines besides a threshold takes fewer steps than the threshold alone at equal coverage",
    metric="forwards per row of the fastest setting with at least 0.95 of the base sampler's distinct tests",
    expected="< 1",
)
def besides_threshold(bench: Bench) -> Measurement:
    mine, found = least(bench, thresholds(bench, lambda rule: tester(bench, rule, threshold=0.5, share=None)))
    theirs, others = least(bench, thresholds(bench))
    found = {f"{name} and lines": written for name, written in found.items()}
    return Measurement(mine, "threshold", theirs, len(prompts(bench)), detail(found | others))


@claim(
    "difftester",
    claim="On a canvas of four times the length, padding alone brings most of the steps saved",
    metric="share of the steps saved by both parts that padding saves alone",
    expected=">= 0.5",
    compare="value",
)
def padding_alone(bench: Bench) -> Measurement:
    found = ablation(bench, WIDE)
    saved = found["plain"].steps - found["both"].steps
    share = (found["plain"].steps - found["fill"].steps) / saved if saved else float("nan")
    return Measurement(share, "both parts", 1.0, len(prompts(bench)), detail(found))


@claim(
    "difftester",
    claim="On a tight canvas, comparing lines takes fewer steps than padding alone",
    metric="forwards per row",
    expected="<= 0.95",
)
def lines_count(bench: Bench) -> Measurement:
    found = ablation(bench, TIGHT)
    return Measurement(
        found["both"].steps, "padding fill alone", found["fill"].steps, len(prompts(bench)), detail(found)
    )


@claim(
    "difftester",
    claim="Rows of a prompt take fewer steps each together than alone, when each has only its own lines to compare",
    metric="forwards per row",
    expected="< 1",
)
def rows_help(bench: Bench) -> Measurement:
    counts = (1, rows(bench)) if bench.quick else (1, 2, 3, 5, 8)
    found = {f"{many} rows": write(bench, tester(bench), many=many) for many in counts}
    most, one = found[f"{rows(bench)} rows"].steps, found["1 rows"].steps
    return Measurement(most, "one row", one, len(prompts(bench)), detail(found))


@claim(
    "difftester",
    claim="Arguments and results stay as diverse as the base sampler's, string contents protected or not",
    metric="distinct tests over tests",
    expected=">= 0.95",
)
def diversity(bench: Bench) -> Measurement:
    plain, both = write(bench, PLAIN, False), write(bench, tester(bench))
    safe = write(bench, tester(bench, protected=LITERALS | STRING_TEXT))
    found = {"plain": plain, "both": both, "strings protected": safe}
    return Measurement(both.diversity, "schedule", plain.diversity, len(prompts(bench)), detail(found))


@claim(
    "difftester",
    claim="While more than 50 places are undecided the paper's bound, on the share of confidence, adds at most a tenth "
    "of what one on the confidence itself adds",
    metric="extra commits per row and step with more than 50 places undecided",
    expected="<= 0.1",
)
def shares_wait(bench: Bench) -> Measurement:
    rates, found = {}, {}
    for name, options in (("share 0.02", {}), ("raw 0.5", {"share": None, "threshold": 0.5})):
        watched = Watched(tester(bench, **options))
        found[name] = write(bench, watched)
        early = [added for undecided, added in watched.seen if undecided > 50]
        rates[name] = sum(early) / max(len(early), 1)
    return Measurement(
        rates["share 0.02"], "raw probability", rates["raw 0.5"], len(prompts(bench)), detail(found) | {"rates": rates}
    )


@claim(
    "difftester",
    claim="More of the lines are tests than with as many extra commits at random places",
    metric="share of lines that are tests",
    expected="> 1",
)
def beats_random(bench: Bench) -> Measurement:
    rule = tester(bench)
    found = {"lines": write(bench, rule), "random": write(bench, RandomExtra(rule))}
    mine, theirs = found["lines"].valid, found["random"].valid
    return Measurement(mine, "random extra commits", theirs, len(prompts(bench)), detail(found))


@claim(
    "difftester",
    claim="In Java and C++ too it takes at most two thirds of its base sampler's steps (tight canvas)",
    metric="forwards per row",
    expected="<= 0.667",
)
def other_languages(bench: Bench) -> Measurement:
    found = {}
    for language in ("java", "cpp"):
        found[f"{language} plain"] = write(bench, PLAIN, False, language=language)
        found[f"{language} both"] = write(bench, tester(bench, language=language), language=language)
    mine, theirs = (mean(w.steps for name, w in found.items() if name.endswith(kind)) for kind in ("both", "plain"))
    return Measurement(mine, "schedule", theirs, 2 * len(prompts(bench)), detail(found))


@claim(
    "difftester",
    claim="Comparing lines takes at most a tenth of the time of decoding",
    metric="share of the wall clock",
    expected="<= 0.1",
    compare="value",
)
def comparison_is_cheap(bench: Bench) -> Measurement:
    written = write(bench, tester(bench))
    share, plain = written.compared / written.seconds, write(bench, PLAIN)
    about = {"seconds": round(written.seconds, 2), "seconds of the base, padding filled": round(plain.seconds, 2)}
    return Measurement(share, "decoding", 1.0, len(prompts(bench)), about)
