"""What the claims of Think-at-Hard measure: ways to run a model that thinks again, figures of its decider, and what
another pass costs.

The model is zoo:reasoning, the low-rank weights and the decider zoo:reasoning-think. The controls' weights learnt from
the same rows for as many steps: zoo:reasoning-think-always with two passes for every token, zoo:reasoning-think-once in
the only pass there is. Figures are of the answers to held-out problems, read with their prompts (teacher forcing: an
answer whose tokens are all predicted is the one that greedy decoding writes). Prompts are left alone by all sides but
those that think always. Operations and speed are measured on zoo:code-target.
"""

from __future__ import annotations

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
from pertoken.depth.deciders import AsGiven, ByChance, ByEntropy, ByTruth, Decider, NeuralDecider
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
    """Held-out rows: tokens `[row, token]`, and what follows each, -1 in prompts."""

    tokens: Tensor
    truth: Tensor

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


def models(bench: Bench) -> tuple[Any, Any]:
    return bench.shared("reasoning", lambda: load(MODEL, "fp32"))


def text(bench: Bench) -> Text:
    """Held-out rows; other than those by whose loss the training was watched."""

    def make() -> Text:
        count, tokenizer = 32 if bench.quick else 256, models(bench)[1].backend_tokenizer
        rows = reasoning.rows(count, LENGTH, tokenizer, 10**6 + bench.seed, "heldout")
        return Text(*asked(torch.from_numpy(rows.astype("int64"))))

    return bench.shared("text", make)


def weights(bench: Bench, name: str = "") -> Lora:
    """Low-rank weights of the zoo, trained now where they are not here."""

    def make() -> Lora:
        own = TUNED + name
        packed = (WEIGHTS / own / "config.json").exists()
        return Lora.load(tuned(own, bench.status)) if packed or not bench.quick else learnt(bench, TUNINGS[own])

    return bench.shared(("weights", name), make)


def learnt(bench: Bench, recipe: Tuning) -> Lora:
    """Low-rank weights by a recipe's first stage, which are not kept; of a few steps when quick."""
    steps = FEW if bench.quick else recipe.first
    with TemporaryDirectory() as place:
        made = tune("weights", Path(place) / "weights", replace(recipe, steps=steps, first=steps), status=bench.status)
        return Lora.load(made)


def judge(bench: Bench) -> NeuralDecider:
    return bench.shared("judge", lambda: NeuralDecider.load(f"zoo:{TUNED}"))


def ran(bench: Bench, label: Any, decider: Any, lora: Lora | None, once: bool = False, sees: str = BOTH) -> Side:
    """A side; decider: from the truth of a part of the rows to a `Decider`, or None for one pass; once: the weights act
    in it."""

    def measure() -> Side:
        model, whole, found = models(bench)[0], text(bench), []
        for tokens, truth in zip(whole.tokens.split(32), whole.truth.split(32), strict=True):
            chosen = AsGiven(torch.ones_like(tokens)) if decider is None else decider(truth)
            trace = Trace()
            policy = ThinkAtHard(decider=chosen, threshold=0.5, lora=lora, sees=sees)
            with torch.inference_mode(), attach(model, policy, trace=trace) as attachment:
                if once:
                    attachment.set_attribute(lora, "gate", 1.0)
                logits = model(tokens, use_cache=False).logits
            depth = trace.steps[0].decision.tensors()["layers"].sum(-1) // model.config.num_hidden_layers
            found.append((logits[truth >= 0].float(), truth[truth >= 0], (depth == 2)[truth >= 0], depth.flatten()))
        logits, truth, again, depth = (torch.cat(parts) for parts in zip(*found, strict=True))
        return Side(logits, truth, again, float(depth.float().mean()))

    return bench.shared(("side", label), measure)


def never(bench: Bench) -> Side:
    return ran(bench, "never", None, None)


def ours(bench: Bench, level: float = 0.9) -> Side:
    found = Above(judge(bench), level)
    return ran(bench, ("ours", level), lambda truth: InAnswers(found, truth), weights(bench))


def always(bench: Bench, name: str = "-always") -> Side:
    return ran(bench, ("always", name), lambda truth: AsGiven(torch.full_like(truth, 2)), weights(bench, name))


def oracle(bench: Bench) -> Side:
    return ran(bench, "oracle", ByTruth, weights(bench))


def once(bench: Bench) -> Side:
    return ran(bench, "once", None, weights(bench, "-once"), once=True)


def share(side: Side) -> float:
    return float(side.again.float().mean())


def by_chance(bench: Bench) -> Side:
    found = ByChance(share(ours(bench)), bench.seed)
    return ran(bench, "chance", lambda truth: InAnswers(found, truth), weights(bench))


def by_entropy(bench: Bench) -> Side:
    """As many tokens as ours, those of the highest entropy after the first pass."""
    level = float(entropy(never(bench).logits).double().quantile(1 - share(ours(bench))))
    return ran(bench, "entropy", lambda truth: InAnswers(ByEntropy(level), truth), weights(bench))


def beside(bench: Bench) -> dict[str, Any]:
    """Every side, so that each claim shows the others."""
    sides = {
        "one pass": never(bench),
        "one pass, tuned": once(bench),
        "think_at_hard": ours(bench),
        "random": by_chance(bench),
        "entropy": by_entropy(bench),
        "oracle": oracle(bench),
        "always, tuned for it": always(bench),
        "always, weights of think_at_hard": always(bench, ""),
    }
    return {name: side.told(text(bench)) for name, side in sides.items()}


def sweep(bench: Bench) -> dict[float, dict[str, float]]:
    """Figures by threshold."""
    levels = (0.5, 0.9, 1.0) if bench.quick else (0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 1.0)
    return {level: ours(bench, level).told(text(bench)) for level in levels}


def judged(bench: Bench) -> dict[str, float]:
    """Areas of the decider's chances and of single features, for which tokens are wrong after one pass."""

    def measure() -> dict[str, float]:
        seen: list[Tensor] = []
        model, whole, one = models(bench)[0], text(bench), never(bench)

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
        hard = ~one.hits
        found = {"decider": chances, "entropy": entropy(one.logits), "confidence": -confidence(one.logits)}
        areas = {name: roc_area(scores, hard) for name, scores in found.items()}
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
