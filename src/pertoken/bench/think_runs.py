"""What the claims of Think-at-Hard measure: ways to run a model that thinks again, figures of its decider, and what
another pass costs.

The model is zoo:reasoning-think, zoo:reasoning tuned as a whole with low-rank weights for second passes and a decider.
The controls, from the same start, learnt as long from the same rows: zoo:reasoning-think-always with two passes for
every token, zoo:reasoning-think-once with one, the ordinary tuning. Hard are the tokens that zoo:reasoning, the
reference, gets wrong. Figures are of the answers to held-out problems, read with their prompts (teacher forcing: an
answer whose tokens are all predicted is the one that greedy decoding writes). Prompts are left alone by all sides but
those that think always. Operations and speed are measured on zoo:code-target.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pertoken.bench import suite
from pertoken.bench.claims import Bench, Measurement
from pertoken.core.attach import attach
from pertoken.core.cost import count_flops
from pertoken.core.estimates import roc_area
from pertoken.core.signals import confidence, entropy
from pertoken.core.trace import Trace
from pertoken.depth.deciders import AsGiven, ByChance, ByEntropy, Decider, NeuralDecider
from pertoken.depth.lora import FILE as WEIGHTS_FILE
from pertoken.depth.lora import Lora
from pertoken.depth.passes import BOTH, PassView
from pertoken.depth.think_at_hard import ThinkAtHard
from pertoken.models.load import load
from pertoken.zoo import WEIGHTS, reasoning
from pertoken.zoo.thinking import asked
from pertoken.zoo.tuning import Tuning, tune
from pertoken.zoo.tunings import TUNINGS, tuned

MODEL, TUNED, LENGTH = "zoo:reasoning", "reasoning-think", 128
USUAL = 0.07  # share of tokens that think again in the paper
FEW = 10  # steps of training when quick


@dataclass(frozen=True)
class Text:
    """Held-out rows: tokens `[row, token]`, what follows each, -1 in prompts, and which of them are hard."""

    tokens: Tensor
    truth: Tensor
    hard: Tensor

    def parts(self) -> list[Text]:
        """The rows in batches."""
        return [Text(*part) for part in zip(*(x.split(32) for x in (self.tokens, self.truth, self.hard)), strict=True)]

    @cached_property
    def counted(self) -> Tensor:
        return self.truth >= 0

    @cached_property
    def answers(self) -> Tensor:
        """For each token of an answer, the number of that answer."""
        before = torch.zeros_like(self.counted)
        before[:, 1:] = self.counted[:, :-1]
        return ((self.counted & ~before).flatten().cumsum(0).view_as(self.truth) - 1)[self.counted]


@dataclass(frozen=True)
class Made:
    """A model with its low-rank weights; None for a model of a single pass, or for its own weights in all passes."""

    model: Any
    lora: Lora | None

    @classmethod
    def read(cls, place: Path) -> Made:
        lora = Lora.load(place) if (place / WEIGHTS_FILE).is_file() else None
        return cls(load(str(place), "fp32")[0], lora)


@dataclass(frozen=True)
class Side:
    """Logits `[answer token, vocabulary]` of one way to run the model; again: which answer tokens ran two passes;
    passes: mean over all tokens, prompts' too."""

    logits: Tensor
    truth: Tensor
    again: Tensor
    passes: float

    @property
    def hits(self) -> Tensor:
        return self.logits.argmax(-1) == self.truth

    @property
    def right(self) -> float:
        return float(self.hits.float().mean())

    @property
    def nats(self) -> float:
        return float(F.cross_entropy(self.logits, self.truth))

    def told(self, text: Text) -> dict[str, float]:
        """For a claim's detail."""
        whole = torch.ones(int(text.answers.max()) + 1).scatter_reduce(0, text.answers, self.hits.float(), "amin")
        found = {"right": self.right, "whole answers": float(whole.mean()), "nats": self.nats}
        return found | {"answer tokens run again": float(self.again.float().mean()), "passes per token": self.passes}


@dataclass(frozen=True)
class Altered(Decider):
    """Base of what makes other chances of another decider's."""

    inner: Decider

    @property
    def layers(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.inner.layers

    def check(self, model: Any) -> None:
        self.inner.check(model)


@dataclass(frozen=True)
class InAnswers(Altered):
    """Another decider's choice, in answers only."""

    truth: Tensor

    def chances(self, view: PassView) -> Tensor:
        assert view.positions is not None and view.asked is not None
        wanted = self.truth.gather(1, view.positions.expand_as(view.asked))[view.asked]
        return self.inner.chances(view) * (wanted >= 0)


@dataclass(frozen=True)
class Above(Altered):
    """A trained decider at another threshold."""

    level: float

    def chances(self, view: PassView) -> Tensor:
        return (self.inner.chances(view) > self.level).float()


def reference(bench: Bench) -> tuple[Any, Any]:
    """The model before it was tuned, and the tokenizer of all."""
    return bench.shared("reference", lambda: load(MODEL, "fp32"))


def text(bench: Bench) -> Text:
    """Held-out rows; other than those by whose loss the training was watched."""

    def make() -> Text:
        model, tokenizer = reference(bench)
        count = 32 if bench.quick else 256
        rows = reasoning.rows(count, LENGTH, tokenizer.backend_tokenizer, 10**6 + bench.seed, "heldout")
        tokens, truth = asked(torch.from_numpy(rows.astype("int64")))
        with torch.inference_mode():
            guessed = torch.cat([model(part, use_cache=False).logits.argmax(-1) for part in tokens.split(32)])
        return Text(tokens, truth, (guessed != truth) & (truth >= 0))

    return bench.shared("text", make)


def made(bench: Bench, name: str = "") -> Made:
    """A tuned model of the zoo, trained now where it is not here."""

    def make() -> Made:
        own = TUNED + name
        packed = (WEIGHTS / own / "config.json").exists()
        return Made.read(tuned(own, bench.status)) if packed or not bench.quick else learnt(bench, TUNINGS[own])

    return bench.shared(("made", name), make)


def learnt(bench: Bench, recipe: Tuning) -> Made:
    """A model tuned by a recipe's first stage, which is not kept; of a few steps when quick."""
    steps = FEW if bench.quick else recipe.first
    with TemporaryDirectory() as place:
        short = replace(recipe, steps=steps, first=steps)
        return Made.read(tune("weights", Path(place) / "weights", short, status=bench.status))


def judge(bench: Bench) -> NeuralDecider:
    return bench.shared("judge", lambda: NeuralDecider.load(f"zoo:{TUNED}"))


Choice = Callable[[Text], Decider]
"""Who decides, for a part of the rows."""


def stop(part: Text) -> Decider:
    return AsGiven(torch.ones_like(part.truth))


def two(part: Text) -> Decider:
    return AsGiven(torch.full_like(part.truth, 2))


def told(part: Text) -> Decider:
    """The oracle's choice."""
    return AsGiven(1 + part.hard.long())


def within(decider: Decider) -> Choice:
    """A decider's choice, in answers only."""
    return lambda part: InAnswers(decider, part.truth)


def ran(bench: Bench, label: Any, one: Made, choice: Choice, sees: str = BOTH) -> Side:
    """A side."""

    def measure() -> Side:
        found = []
        for part in text(bench).parts():
            trace, asked = Trace(), part.counted
            policy = ThinkAtHard(decider=choice(part), threshold=0.5, lora=one.lora, sees=sees)
            with torch.inference_mode(), attach(one.model, policy, trace=trace):
                logits = one.model(part.tokens, use_cache=False).logits
            depth = trace.steps[0].decision.tensors()["layers"].sum(-1) // one.model.config.num_hidden_layers
            found.append((logits[asked].float(), part.truth[asked], (depth == 2)[asked], depth.flatten()))
        logits, truth, again, depth = (torch.cat(parts) for parts in zip(*found, strict=True))
        return Side(logits, truth, again, float(depth.float().mean()))

    return bench.shared(("side", label), measure)


def untuned(bench: Bench) -> Side:
    return ran(bench, "untuned", Made(reference(bench)[0], None), stop)


def once(bench: Bench) -> Side:
    return ran(bench, "once", made(bench, "-once"), stop)


def never(bench: Bench) -> Side:
    return ran(bench, "never", made(bench), stop)


def ours(bench: Bench, level: float = 0.9) -> Side:
    return ran(bench, ("ours", level), made(bench), within(Above(judge(bench), level)))


def always(bench: Bench, name: str = "-always") -> Side:
    return ran(bench, ("always", name), made(bench, name), two)


def oracle(bench: Bench) -> Side:
    return ran(bench, "oracle", made(bench), told)


def share(side: Side) -> float:
    return float(side.again.float().mean())


def by_chance(bench: Bench) -> Side:
    return ran(bench, "chance", made(bench), within(ByChance(share(ours(bench)), bench.seed)))


def by_entropy(bench: Bench) -> Side:
    """As many tokens as ours, those of the highest entropy after the first pass."""
    level = float(entropy(never(bench).logits).double().quantile(1 - share(ours(bench))))
    return ran(bench, "entropy", made(bench), within(ByEntropy(level)))


def beside(bench: Bench) -> dict[str, Any]:
    """Every side, so that each claim shows the others."""
    sides = {
        "untuned, one pass": untuned(bench),
        "tuned with one pass": once(bench),
        "one pass": never(bench),
        "think_at_hard": ours(bench),
        "random": by_chance(bench),
        "entropy": by_entropy(bench),
        "oracle": oracle(bench),
        "tuned with two passes": always(bench),
        "always two passes": always(bench, ""),
    }
    return {name: side.told(text(bench)) for name, side in sides.items()}


def sweep(bench: Bench) -> dict[float, dict[str, float]]:
    """Figures by threshold."""
    levels = (0.5, 0.9, 1.0) if bench.quick else (0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 1.0)
    return {level: ours(bench, level).told(text(bench)) for level in levels}


def judged(bench: Bench) -> dict[str, float]:
    """Areas of the decider's chances and of single features, for which tokens are hard, and for the "own" ones, which
    tokens its own first pass gets wrong."""

    def measure() -> dict[str, float]:
        seen: list[Tensor] = []
        model, whole, one = made(bench).model, text(bench), never(bench)

        @dataclass(frozen=True)
        class Watching(Decider):
            layers: tuple[int, ...] = judge(bench).layers

            def chances(self, view: PassView) -> Tensor:
                seen.append(judge(bench).chances(view))
                return torch.zeros_like(seen[-1])

        with torch.inference_mode(), attach(model, ThinkAtHard(decider=Watching())):
            for tokens in whole.tokens.split(32):
                model(tokens, use_cache=False)
        chances = torch.cat(seen)[whole.counted.flatten()]
        hard = whole.hard[whole.counted]
        found = {"decider": chances, "entropy": entropy(one.logits), "confidence": -confidence(one.logits)}
        areas = {name: roc_area(scores, hard) for name, scores in found.items()}
        areas |= {f"own, {name}": roc_area(scores, ~one.hits) for name, scores in found.items()}
        return areas | {"accuracy": float(((chances > 0.5) == hard).float().mean()), "hard": float(hard.float().mean())}

    return bench.shared("judged", measure)


def cost_of(bench: Bench, decider: Decider | None) -> int:
    """Operations of reading held-out code, a batch of 8 rows."""
    found = suite.pair(bench)
    inputs = found.batch(suite.texts(bench, 8, 8)[:8])
    with torch.inference_mode():
        if decider is None:
            return count_flops(lambda: found.target(**inputs))
        with attach(found.target, ThinkAtHard(decider=decider)):
            return count_flops(lambda: found.target(**inputs))


def deciding(bench: Bench) -> float:
    """Operations of a decider of the paper's shape per token, over those of the model's pass."""
    model = suite.pair(bench).target
    judge = NeuralDecider.for_model(model, inner=model.config.hidden_size // 4)
    ids = torch.zeros(1, 64, dtype=torch.long)
    states = [torch.zeros(64, model.config.hidden_size) for _ in judge.layers]
    with torch.inference_mode():
        mine = count_flops(lambda: judge(states, torch.zeros(64, model.config.vocab_size)))
        return mine / count_flops(lambda: model(ids))


def speed(bench: Bench, batch: int) -> Measurement:
    """Tokens per second of generating with second passes of 7 % of the tokens, always, and without."""
    model = suite.pair(bench).target
    plain = partial(suite.generate, model, new=24 if bench.quick else 64)
    works = {
        "7 %": suite.attached(model, ThinkAtHard(decider=ByChance(USUAL)), plain),
        "always": suite.attached(model, ThinkAtHard(decider=ByChance(1.0)), plain),
        "generate": plain,
    }
    sides = {name: [suite.Side(name, work)] for name, work in works.items()}
    raced = suite.race(sides, suite.batches(bench, batch, 3 if bench.quick else 5), trial=1)
    measured = suite.ratio_of(raced, "7 %", "generate")
    measured.detail["over always"] = suite.ratio_of(raced, "7 %", "always").ratio
    return measured
