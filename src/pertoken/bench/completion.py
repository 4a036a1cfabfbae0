"""Completion of code (`pertoken bench code`): methods of `depth/` and `decode/` on the same Python that no model was
trained on, beside the dense model and beside random choices at an equal budget.

The model is zoo:code-target with what the package holds for it: low-rank weights, small blocks and routers, a
controller, a threshold, drafts.

- *lines*: held-out code that stops within a line. Exact: the rest of the line is the original's. Edit similarity.
- *functions*: signature and docstring of held-out functions. ROUGE-L with the original body; parses: the function with
  the body written is Python.
- *made*: the first line of functions made by program. Passes: the function, run, gives the right results. These are
  written by zoo:code-twin, which was trained on such tasks (zoo:code-target gets none right), and by the methods that
  have all that they need for it; the threshold is learnt from tests of functions with other seeds.

All sides decode greedily in fp32, in batches of 16, until the end of text or the task's length. A control spends what
its method spent on the same task: `random_exit` lets as many tokens leave after each layer, `random_pause` pauses as
often, `random_route` asks as often, `random_modules` runs as many big blocks, `random_layers` as many layers (of the
prompt too, as its weights were tuned to). Operations are counted over all tasks, the reading of prompts included, and
set against the dense model's in the same loop, a decoder's or transformers' own.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pertoken.bench import diffusion, suite
from pertoken.bench.answers import edit_similarity, parses, rouge_l
from pertoken.bench.claims import Bench, Measurement, claim
from pertoken.bench.code_tasks import Judge, Problem, bodies, body_of, line_of, rests_of_lines
from pertoken.bench.skipdecode import tuned
from pertoken.bench.spending import layers_run
from pertoken.core import cost
from pertoken.core.attach import attach
from pertoken.core.budget import Budget
from pertoken.core.estimates import difference
from pertoken.core.policy import Policy
from pertoken.core.trace import Trace
from pertoken.decode.adadec import AdaDec
from pertoken.decode.del_ import DEL
from pertoken.decode.diffuspec import DiffuSpec
from pertoken.decode.dyspec import DySpec
from pertoken.decode.full import Full
from pertoken.decode.lossless import lossless
from pertoken.decode.r2r import R2R
from pertoken.decode.random_pause import RandomPause
from pertoken.decode.random_route import RandomRoute
from pertoken.depth.duo_llm import DuoLLM
from pertoken.depth.random_exit import RandomExit
from pertoken.depth.random_layers import RandomLayers
from pertoken.depth.random_modules import RandomModules
from pertoken.depth.skip_layers import SkipLayers
from pertoken.depth.skipdecode import SkipDecode
from pertoken.depth.stop_exit import StopExit
from pertoken.models.stack import stack_of

NAME, DENSE, LOOP, ALIKE, BATCH = "code", "full", "full, own loop", "full, tuned alike", 16
HALF = Budget(fraction=0.5)
LINES, FUNCTIONS, MADE = "lines", "functions", "made"
NEW = {LINES: 20, FUNCTIONS: 64, MADE: 24}
COUNTS = {LINES: (96, 12), FUNCTIONS: (32, 4), MADE: (48, 6)}  # full, quick
MEASURES = {"exact": LINES, "edit similarity": LINES, "ROUGE-L": FUNCTIONS, "parses": FUNCTIONS, "passes": MADE}


def problems(bench: Bench, task: str) -> list[Problem]:
    """A task's problems, in an order that begins with the quick ones."""

    def make() -> list[Problem]:
        full, quick = COUNTS[task]
        count = quick if bench.quick else full
        if task == LINES:
            return rests_of_lines(count)
        if task == FUNCTIONS:
            found = diffusion.functions(bench, NEW[task], full, quick)
            return [Problem(p, o) for p, o in zip(found.prompts, found.originals, strict=True)]
        return bodies(count)

    return bench.shared((NAME, task), make)


def measured(task: str, tasks: list[Problem], answers: list[str]) -> dict[str, list[float]]:
    """Every measure of a task, one number per problem."""
    pairs = list(zip(tasks, answers, strict=True))
    if task == LINES:
        lines = [(line_of(answer), own.original) for own, answer in pairs]
        return {
            "exact": [float(line == original) for line, original in lines],
            "edit similarity": [edit_similarity(line, original) for line, original in lines],
        }
    if task == FUNCTIONS:
        wrote = [(own, body_of(answer)) for own, answer in pairs]
        return {
            "ROUGE-L": [rouge_l(body, own.original) for own, body in wrote],
            "parses": [float(parses(own.prompt + body)) for own, body in wrote],
        }
    return {"passes": [one["passed"] for one in Judge(tasks)(range(len(tasks)), answers)]}


@dataclass(frozen=True)
class Completed:
    """What a side made of a task. verdicts: measures, one number per problem; flops: operations; spent: counts of its
    decoder summed over batches, empty without one; ran: how many generated tokens ran each number of layers, of a
    policy that decides it."""

    answers: list[str]
    verdicts: dict[str, list[float]]
    flops: int
    spent: Counter[str] = field(default_factory=Counter)
    ran: Counter[int] = field(default_factory=Counter)


@dataclass(frozen=True)
class Side:
    """A contender. parts: its decoder or policy for a task, None for transformers' own loop; model: another than the
    zoo's as it is; control: the side that spends as much at random; exact: it must write what DENSE writes;
    made: whether it has what it needs for the model of that task."""

    name: str
    parts: Callable[[Bench, str], Any]
    model: Callable[[Bench], Any] | None = None
    control: str | None = None
    dense: str = DENSE
    exact: bool = False
    made: bool = False

    @property
    def tasks(self) -> list[str]:
        return [LINES, FUNCTIONS, MADE] if self.made else [LINES, FUNCTIONS]


def loaded(bench: Bench, side: Side, task: str) -> tuple[Any, Any]:
    """Model and tokenizer."""
    if task == MADE:
        twin = diffusion.loaded(bench, name=diffusion.TWIN)
        return twin.model, twin.tokenizer
    models = suite.pair(bench)
    return models.target if side.model is None else side.model(bench), models.tokenizer


def _adadec(bench: Bench, task: str) -> AdaDec:
    from pertoken.bench.adadec import threshold

    return AdaDec(threshold(bench) if task == MADE else None)


def _controller(bench: Bench) -> Any:
    from pertoken.bench.stop_exit import controller

    return controller(bench)


def _random_exit(bench: Bench, task: str) -> RandomExit:
    ran, depth = completed(bench, "stop_exit", task).ran, suite.pair(bench).target.config.num_hidden_layers
    return RandomExit(tuple((at, n / ran.total()) for at, n in sorted(ran.items()) if at < depth), bench.seed)


def _random_pause(bench: Bench, task: str) -> RandomPause:
    counts = completed(bench, "adadec", task).spent
    return RandomPause(counts["pauses"] / counts["tokens"], bench.seed)


def _random_route(bench: Bench, task: str) -> RandomRoute:
    counts = completed(bench, "r2r", task).spent
    return RandomRoute(_draft(bench), counts["asked"] / counts["tokens"], bench.seed)


def _draft(bench: Bench) -> Any:
    return suite.pair(bench).draft


def _with(weights: str) -> Callable[[Bench], Any]:
    """The model with low-rank weights merged in."""
    return lambda bench: tuned(bench, weights)


def _duo(bench: Bench) -> tuple[Any, Any]:
    """The model beside which small blocks and routers were trained, and these."""
    from pertoken.bench.duo_runs import tuned as routed

    return routed(bench)


def _routed(bench: Bench) -> Any:
    return _duo(bench)[0]


SIDES = {
    side.name: side
    for side in (
        Side(DENSE, lambda bench, task: None, made=True),
        Side(LOOP, lambda bench, task: Full(), exact=True, made=True),
        Side(ALIKE, lambda bench, task: None, _with("code-skip-full")),
        Side(
            "skipdecode",
            lambda bench, task: SkipDecode(reference=NEW[task]),
            _with("code-skip"),
            "random_layers",
            dense=ALIKE,
        ),
        Side("random_layers", lambda bench, task: RandomLayers(HALF, seed=0), _with("code-skip-random")),
        Side("duo_llm", lambda bench, task: DuoLLM(HALF, modules=_duo(bench)[1]), _routed, "random_modules"),
        Side("random_modules", lambda bench, task: RandomModules(HALF, modules=_duo(bench)[1]), _routed),
        Side("stop_exit", lambda bench, task: StopExit(_controller(bench), stop=None), control="random_exit"),
        Side("random_exit", _random_exit),
        Side("stop_exit, stopping", lambda bench, task: StopExit(_controller(bench))),
        Side("adadec", _adadec, control="random_pause", made=True),
        Side("random_pause", _random_pause, made=True),
        Side("r2r", lambda bench, task: R2R(_draft(bench)), control="random_route"),
        Side("random_route", _random_route),
        Side("dyspec", lambda bench, task: DySpec(_draft(bench)), exact=True),
        Side("del", lambda bench, task: DEL(), exact=True, made=True),
        Side("diffuspec", lambda bench, task: DiffuSpec(diffusion.loaded(bench).model), exact=True, made=True),
        Side("lossless skip_layers", lambda bench, task: lossless(SkipLayers()), exact=True, made=True),
    )
}
METHODS = [name for name, side in SIDES.items() if side.control is not None]
EXACT = [name for name, side in SIDES.items() if side.exact and name != LOOP]


def completed(bench: Bench, name: str, task: str) -> Completed:
    """What a side makes of a task; run once."""
    return bench.shared((NAME, name, task), lambda: _completed(bench, SIDES[name], task))


def _completed(bench: Bench, side: Side, task: str) -> Completed:
    tasks, (model, tokenizer) = problems(bench, task), loaded(bench, side, task)
    parts, answers = side.parts(bench, task), []
    policy: Any = parts if isinstance(parts, Policy) else None
    decoder: Any = None if policy is not None else parts
    counts, traces = Counter[str](), list[Trace]()
    bench.status(f"{task}: {side.name}")

    def work() -> None:
        for batch in suite.chunks([one.prompt for one in tasks], BATCH):
            with ExitStack() as stack:
                if policy is not None:
                    traces.append(Trace())
                    stack.enter_context(attach(model, policy, trace=traces[-1]))
                inputs = dict(tokenizer(batch, return_tensors="pt", padding=True))
                ids = suite.generate(model, inputs, NEW[task], decoder, eos_token_id=tokenizer.eos_token_id)
            if decoder is not None:
                counts.update({key: value for key, value in vars(decoder.stats).items() if isinstance(value, int)})
            answers.extend(tokenizer.batch_decode(ids, skip_special_tokens=True))

    stack_of(model)  # made once, and not what the side spends
    flops = cost.count_flops(work)
    ran = sum((layers_run(trace) for trace in traces), Counter[int]())
    return Completed(answers, measured(task, tasks, answers), flops, counts, ran)


def verdicts(bench: Bench, name: str) -> dict[str, list[float]]:
    """Every measure of a side, one number per problem."""
    tasks = SIDES[name].tasks
    return {measure: completed(bench, name, t).verdicts[measure] for measure, t in MEASURES.items() if t in tasks}


def spent(bench: Bench, name: str, other: str) -> float:
    """Operations of a side over those of another, or of the dense model in the same loop, on the tasks that both
    have."""
    if other == DENSE and completed(bench, name, LINES).spent:
        other = LOOP
    tasks = [task for task in SIDES[name].tasks if task in SIDES[other].tasks]
    mine, theirs = (sum(completed(bench, side, task).flops for task in tasks) for side in (name, other))
    return mine / theirs


def row(bench: Bench, name: str) -> dict[str, Any]:
    """A side's line of the table: means of the measures, None where it has not the task, and operations as a share of
    the dense model's."""
    found: dict[str, Any] = {"side": name} | dict.fromkeys(MEASURES)
    found |= {measure: round(statistics.mean(values), 4) for measure, values in verdicts(bench, name).items()}
    found |= {"operations": round(spent(bench, name, DENSE), 3), "same as full": round(same(bench, name), 4)}
    return found | {"at equal budget": SIDES[name].control or ""}


def same(bench: Bench, name: str) -> float:
    """Share of the answers that are the dense model's."""
    pairs = [
        (own, theirs)
        for task in SIDES[name].tasks
        for own, theirs in zip(completed(bench, name, task).answers, completed(bench, DENSE, task).answers, strict=True)
    ]
    return statistics.mean(own == theirs for own, theirs in pairs)


def differences(mine: Mapping[str, list[float]], theirs: Mapping[str, list[float]]) -> dict[str, Any]:
    """By measure: both means, and the 95 % interval of their difference over problems."""
    return {
        name: {
            "values": [round(statistics.mean(values), 4), round(statistics.mean(theirs[name]), 4)],
            "interval of the difference": [round(end, 4) for end in difference(values, theirs[name])],
        }
        for name, values in mine.items()
        if name in theirs
    }


MAIN = "edit similarity"


def against(bench: Bench, name: str, other: str) -> Measurement:
    mine, theirs = verdicts(bench, name), verdicts(bench, other)
    share = round(spent(bench, name, other), 3)
    detail = {"operations over the baseline's": share, "measures": differences(mine, theirs)}
    return Measurement(statistics.mean(mine[MAIN]), other, statistics.mean(theirs[MAIN]), len(mine[MAIN]), detail)


def _claims() -> None:
    for name in METHODS:
        side = SIDES[name]
        whole = "the dense model's" if side.dense == DENSE else "the equally tuned dense model's"
        for other, sentence, expected in (
            (str(side.control), f"{name} completes lines better than random choices at its budget", "> 1"),
            (side.dense, f"{name} keeps 95 % of {whole} edit similarity on lines", ">= 0.95"),
        ):
            given = partial(against, name=name, other=other)
            claim(NAME, claim=sentence, metric="edit similarity with the rest of the line", expected=expected)(given)


_claims()


@claim(
    NAME,
    claim=f"The lossless methods ({', '.join(EXACT)}) write what the dense model writes, up to near-ties (fp32)",
    metric="share of answers that are equal, all tasks, ragged batches of 16",
    expected=">= 0.99",
    compare="value",
)
def exact(bench: Bench) -> Measurement:
    shares = {name: same(bench, name) for name in EXACT}
    count = sum(len(problems(bench, task)) for name in EXACT for task in SIDES[name].tasks)
    return Measurement(statistics.mean(shares.values()), DENSE, 1.0, count, {"by method": shares})


@claim(
    NAME,
    claim="Over all methods and measures, a choice that looks is better than a random one at its budget more often",
    metric="share of pairs of method and measure in which the method is better, a tie being half",
    expected="> 0.5",
    compare="value",
    shown=True,
)
def table(bench: Bench) -> Measurement:
    pairs = []
    for name in METHODS:
        mine, theirs = (verdicts(bench, side) for side in (name, str(SIDES[name].control)))
        means = [(statistics.mean(mine[measure]), statistics.mean(theirs[measure])) for measure in mine]
        pairs += [0.5 if own == other else float(own > other) for own, other in means]
    return Measurement(
        statistics.mean(pairs), "chance", 0.5, len(pairs), {"table": [row(bench, name) for name in SIDES]}
    )
