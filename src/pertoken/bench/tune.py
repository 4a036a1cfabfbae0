"""Choose a method's setting on a user's own texts: the least computation that keeps a given quality.

The method's dial (what its card names, or a policy's budget) is turned from the most computation to the least. At each
setting every prompt is gone on with greedily; a policy is attached under transformers' own loop and not verified, which
is what it is tuned for. Two numbers come of it, both relative to the model without the method (`full`):

- *computation*: floating-point operations of the whole run, reading prompts included, over those of `full` in the same
  loop: a decoder's is this library's, a policy's transformers' own;
- *quality*: without reference answers, the mean edit similarity (`answers.edit_similarity`: one minus the edits that
  turn one text into the other, over the longer one's length) of the output with the output of `full`, so that `full`
  has 1. With reference answers, the mean edit similarity of the output, as far as the answer is long, with the answer,
  over that of `full`; it can be above 1.

Beside each setting runs the method's random control with what the setting spent, where there is one: the same budget,
as many pauses, questions or steps, or as many tokens leaving after each layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from pertoken.bench import results
from pertoken.bench.answers import edit_similarity
from pertoken.bench.compare import Options, Setup, generated, set_up
from pertoken.bench.settings import Config, dial_of, fields_of, plain
from pertoken.bench.sides import Side, default_baseline, make_side, set_side, told
from pertoken.bench.spending import left_after
from pertoken.bench.texts import Example
from pertoken.core import cost
from pertoken.core.card import Dial, card
from pertoken.core.chart import Chart, Line
from pertoken.core.estimates import interval
from pertoken.core.trace import Trace
from pertoken.methods import load_methods
from pertoken.models.stack import stack_of

FULL, RANDOM = "full", "random"


@dataclass(frozen=True)
class Ran:
    """A pass over all prompts. texts: of the outputs; spent: counts of the decoder; left: tokens by layers run."""

    texts: list[str]
    flops: int
    tokens: int
    spent: Counter[str]
    left: Counter[int]


@dataclass(frozen=True)
class Point:
    """A setting's place. of: the method, RANDOM or FULL; setting: in words; quality with its 95 % bootstrap interval
    over prompts; same: share of the outputs that are those of `full`; settings: as they are given to the method."""

    of: str
    setting: str
    compute: float
    quality: float
    low: float
    high: float
    same: float
    tokens: int
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Tuned:
    """Everything that came of it. whole: the name of running all of the model; points: in the order in which they were
    measured; left_out: settings that the method
    refused, with its words; interrupted: before all settings were tried."""

    method: str
    dial: str
    whole: str
    model: str
    draft: str | None
    keep: float
    prompts: int
    answers: bool
    data: str
    points: list[Point] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False

    def of(self, name: str) -> list[Point]:
        return [point for point in self.points if point.of == name]

    @property
    def chosen(self) -> Point | None:
        """The method's setting of least computation that keeps the quality, if any spends less than `full`, or `full`
        itself does not keep it; None: `full`."""
        good = [point for point in self.of(self.method) if point.quality >= self.keep]
        best = min(good, key=lambda point: point.compute, default=None)
        return best if best is not None and (best.compute < 1 or self.keep > 1) else None

    @property
    def idle(self) -> bool:
        """Whether no setting changed anything."""
        mine = self.of(self.method)
        return bool(mine) and all(point.same == 1 and abs(point.compute - 1) < 1e-6 for point in mine)

    def config(self) -> Config:
        """What `pertoken run --config` takes."""
        chosen, found = self.chosen, {"keep_quality": self.keep, "data": self.data, "prompts": self.prompts}
        if chosen is not None:
            found |= {"quality": chosen.quality, "computation": chosen.compute}
        about = found | {"curve": self._rows(), "date": results.now(), "versions": results.versions()}
        if chosen is None:
            return Config(self.whole, {}, self.model, None, about)
        return Config(self.method, dict(chosen.settings), self.model, self.draft, about)

    def to_json(self) -> dict[str, Any]:
        """All of it in types that JSON has."""
        told = asdict(replace(self, points=[])) | {"points": self._rows(), "idle": self.idle}
        chosen = self.chosen
        return told | {"chosen": {"method": self.whole, "settings": {}} if chosen is None else self._row(chosen)}

    def _rows(self) -> list[dict[str, Any]]:
        return [self._row(point) for point in self.points]

    @staticmethod
    def _row(point: Point) -> dict[str, Any]:
        return {**asdict(replace(point, settings={})), "settings": plain(point.settings)}

    def chart(self) -> Chart:
        """Quality against computation: the method, its control, `full`, and the level to be kept."""
        lines = []
        for name, dashed in ((self.method, False), (RANDOM, True)):
            if points := sorted(self.of(name), key=lambda point: point.compute):
                band = () if dashed else [(p.compute, p.low, p.high) for p in points]
                lines.append(Line(name, [(p.compute, p.quality) for p in points], band, dashed))
        level = Line(f"keep {self.keep:g}", [(1.0, self.keep)], dashed=True, colour="#6b7280")
        lines += [Line(FULL, [(1.0, 1.0)], colour="#1f2937"), level]
        note = f"{self.dial} of {self.method} on {self.model}, n = {self.prompts}; band: 95 % bootstrap over prompts"
        x = "floating-point operations, as a share of the whole model's"
        return Chart(f"What {self.method} keeps for what it spends", x, "quality kept", lines, note, percent=True)


def tune(
    method: str,
    model: str,
    draft: str | None,
    examples: Sequence[Example],
    options: Options,
    *,
    keep: float = 0.99,
    values: Sequence[Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    data: str = "",
    status: Callable[[str], None] = lambda text: None,
) -> Tuned:
    """Sweep a method's dial on prompts, with reference answers or without.

    values: of the dial, instead of its card's; settings: the method's others. Ctrl-C ends the sweep and keeps what was
    finished. Raises `ValueError` for a method without a dial, and for data, models and settings that do not fit.
    """
    load_methods()
    one = card(method)
    dial = dial_of(one)
    if not keep > 0:
        raise ValueError(f"keep_quality={keep} keeps nothing; give a share such as 0.99")
    beside = {**dial.beside, **(settings or {})}
    options, prompts = replace(options, config=Config(method)), [example.prompt for example in examples]
    setup = set_up([], model, draft, prompts, options, status)
    control = next((name for name in one.baselines if name.startswith("random_")), None)
    sweep = _Sweep(setup, examples, control is not None and "shares" in fields_of(card(control)))
    answered = examples[0].answer is not None
    tuned = Tuned(method, dial.name, default_baseline(setup.kind), model, draft, keep, len(examples), answered, data)
    try:
        status(f"{FULL}: the model without {method}")
        for each in (setup.model, *setup.given.drafts.values()) if one.shape == "decoder" else ():
            stack_of(each)  # made once, and not what a setting spends
        tuned.points.append(sweep.begin(setup.names[-1 if one.shape == "decoder" else 0]))
        steps = [_value(dial, value, setup) for value in (values if values is not None else reversed(dial.values))]
        for number, value in enumerate(dict.fromkeys(steps), 1):
            name = f"{dial.name}={told(value)}"
            status(f"{number} of {len(dict.fromkeys(steps))}: {method} {name}")
            given = {**beside, dial.name: value}
            try:
                side = set_side(method, given, setup.kind, setup.given)
                ran = sweep.run(side)
            except ValueError as error:
                tuned.left_out[name] = str(error)
                continue
            point = sweep.point(ran, method, name, given)
            like = _control(control, side, ran, setup) if control else None
            tuned.points.append(point)
            status(f"{name}: quality {point.quality:.4f} for {100 * point.compute:.1f} % of the operations")
            if control and like is not None:
                status(f"{number} of {len(dict.fromkeys(steps))}: {control}, spending as much")
                theirs = sweep.run(set_side(control, like, setup.kind, setup.given))
                tuned.points.append(sweep.point(theirs, RANDOM, name, like))
    except KeyboardInterrupt:
        tuned.interrupted = True
    if tuned.left_out and not tuned.of(method) and not tuned.interrupted:
        raise ValueError(f"{method} refused every setting; {next(iter(tuned.left_out.values()))}")
    return tuned


def _value(dial: Dial, value: Any, setup: Setup) -> Any:
    """A value of the dial for this canvas: shares of its positions become whole numbers of steps of its blocks."""
    if dial.name != "steps" or isinstance(value, int):
        return value
    positions = setup.options.max_new_tokens
    blocks = -(-positions // setup.given.places(positions))
    return blocks * max(round(value * positions / blocks), 1)


def _control(name: str, side: Side, ran: Ran, setup: Setup) -> dict[str, Any] | None:
    """Settings of a random control that spends what a side has spent; None where it spent nothing to choose about."""
    takes = set(fields_of(card(name)))
    if side.policies:
        (policy,) = side.policies
        common = {f.name: getattr(policy, f.name) for f in fields(policy) if f.init and f.name in takes}
        if "shares" not in takes:
            return common
        depth, total = setup.model.config.num_hidden_layers, ran.left.total()
        shares = tuple((ran_layers, n / total) for ran_layers, n in sorted(ran.left.items()) if ran_layers < depth)
        return common | {"shares": shares} if shares else None
    spent = ran.spent
    if "rate" in takes:
        chosen = spent["pauses"] if "pauses" in spent else spent["asked"]
        common = {key: getattr(side.decoder, key) for key in ("beams", "length") if key in takes}
        return common | {"rate": min(chosen / max(spent["tokens"], 1), 1.0)} if chosen else None
    mean = spent["row_steps"] / max(sum(len(batch["input_ids"]) for batch in setup.batches), 1)
    return {"steps": _value(Dial("steps", ()), mean / setup.options.max_new_tokens, setup)}


@dataclass
class _Sweep:
    """Runs sides on the prompts and places them. exits: whether to count after how many layers tokens leave."""

    setup: Setup
    examples: Sequence[Example]
    exits: bool
    whole: Ran | None = None
    base: float = 1.0

    def begin(self, name: str) -> Point:
        """Run `full`, which everything is relative to: under this name, in the loop that the method runs in."""
        self.whole = self.run(make_side(name, self.setup.kind, self.setup.given))
        likeness = self.similarities(self.whole)
        self.base = sum(likeness) / len(likeness)
        if not self.base:
            raise ValueError(
                "the model's own outputs have nothing in common with the reference answers, so no quality can be kept; "
                "check that prompts and answers go together, or leave the answers out"
            )
        return self.point(self.whole, FULL, "", {})

    def run(self, side: Side) -> Ran:
        """A pass over all prompts, at the end of which everything is counted."""
        setup, rows, traces = self.setup, [], list[Trace]()
        spent = Counter[str]()

        def work() -> None:
            for batch in setup.batches:
                decided = [Trace() for _ in side.policies if self.exits]
                rows.extend(generated(side, setup.model, setup.tokenizer, batch, setup.options, decided))
                traces.extend(decided)
                if side.decoder is not None:
                    counts = vars(side.decoder.stats).items()
                    spent.update({key: value for key, value in counts if isinstance(value, int)})

        flops = cost.count_flops(work)
        texts = setup.tokenizer.batch_decode(rows, skip_special_tokens=True)
        left = sum((left_after(trace) for trace in traces), Counter[int]())
        return Ran(texts, flops, sum(map(len, rows)), spent, left)

    def similarities(self, ran: Ran) -> list[float]:
        """One number per prompt."""
        assert self.whole is not None
        if self.examples[0].answer is None:
            return [edit_similarity(text, own) for text, own in zip(ran.texts, self.whole.texts, strict=True)]
        answers = [str(example.answer) for example in self.examples]
        return [edit_similarity(text[: len(own)], own) for text, own in zip(ran.texts, answers, strict=True)]

    def point(self, ran: Ran, of: str, name: str, settings: Mapping[str, Any]) -> Point:
        assert self.whole is not None
        found = [value / self.base for value in self.similarities(ran)]
        low, high = interval(found)
        pairs = list(zip(ran.texts, self.whole.texts, strict=True))
        same, compute = sum(a == b for a, b in pairs) / len(pairs), ran.flops / max(self.whole.flops, 1)
        return Point(of, name, compute, sum(found) / len(found), low, high, same, ran.tokens, dict(settings))


def write(tuned: Tuned, out: Path) -> list[Path]:
    """Write the configuration, and the chart beside it."""
    return [tuned.config().save(out), tuned.chart().save(out.with_suffix(".svg"))]
