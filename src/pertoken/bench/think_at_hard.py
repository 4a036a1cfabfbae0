"""Claims of Think-at-Hard: which tokens think again, against none, all, random ones and those of high entropy; what the
oracle's choice is worth; and what another pass costs.

The model is zoo:reasoning, the low-rank weights and the decider zoo:reasoning-think. The controls' weights learnt from
the same rows for as many steps: zoo:reasoning-think-always with two passes for every token, zoo:reasoning-think-once in
the only pass there is. Figures are of the answers to held-out problems, read with their prompts (teacher forcing: an
answer whose tokens are all predicted is the one that greedy decoding writes). Prompts are left alone by all sides but
those that think always. Speed is measured on zoo:code-target.
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
from pertoken.bench.claims import Bench, Measurement, claim
from pertoken.core.attach import attach
from pertoken.core.cost import count_flops
from pertoken.core.signals import confidence, entropy
from pertoken.core.trace import Trace
from pertoken.depth.deciders import AsGiven, ByChance, ByEntropy, ByTruth, Decider, NeuralDecider
from pertoken.depth.lora import Lora
from pertoken.depth.passes import BOTH, OWN, PassView
from pertoken.depth.think_at_hard import ThinkAtHard
from pertoken.models.load import load
from pertoken.zoo import WEIGHTS, reasoning
from pertoken.zoo.thinking import Thinking, asked
from pertoken.zoo.tuning import Tuning, tune
from pertoken.zoo.tunings import TUNINGS, tuned

MODEL, TUNED, LENGTH = "zoo:reasoning", "reasoning-think", 128
RIGHT = "share of the tokens of held-out answers that are right"
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
class InAnswers(Decider):
    """Another decider's choice, in answers only."""

    inner: Decider
    truth: Tensor

    @property
    def layers(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.inner.layers

    def chances(self, view: PassView) -> Tensor:
        assert view.positions is not None and view.asked is not None
        wanted = self.truth.gather(1, view.positions.expand_as(view.asked))[view.asked]
        return self.inner.chances(view) * (wanted >= 0)

    def check(self, model: Any) -> None:
        self.inner.check(model)


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


@dataclass(frozen=True)
class Above(Decider):
    """A trained decider at another threshold."""

    inner: NeuralDecider
    level: float

    @property
    def layers(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.inner.layers

    def chances(self, view: PassView) -> Tensor:
        return (self.inner.chances(view) > self.level).float()

    def check(self, model: Any) -> None:
        self.inner.check(model)


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


def against(bench: Bench, value: float, name: str, baseline: float) -> Measurement:
    return Measurement(value, name, baseline, int(text(bench).counted.sum()), beside(bench))


@claim(
    "think_at_hard",
    claim="It gets more tokens right than thinking once and thinking always, mixed to the same mean number of passes",
    metric=RIGHT,
    expected="> 1",
    shown=True,
)
def beats_mixture(bench: Bench) -> Measurement:
    mine, one, two = ours(bench), never(bench), max(always(bench), always(bench, ""), key=lambda side: side.right)
    mixed = one.right + (mine.passes - 1) * (two.right - one.right)
    return against(bench, mine.right, "one pass and two, mixed", max(mixed, one.right))


@claim(
    "think_at_hard",
    claim="It gets more tokens right than thinking always, at a fraction of the second passes",
    metric=RIGHT,
    expected="> 1",
)
def beats_always(bench: Bench) -> Measurement:
    return against(bench, ours(bench).right, "always, tuned for it", always(bench).right)


@claim(
    "think_at_hard",
    claim="It gets more tokens right than low-rank weights that learnt as long to act in a single pass",
    metric=RIGHT,
    expected="> 1",
    shown=True,
)
def beats_single_pass(bench: Bench) -> Measurement:
    return against(bench, ours(bench).right, "one pass, tuned", once(bench).right)


@claim(
    "think_at_hard",
    claim="It gets more tokens right than as many second passes at random places",
    metric=RIGHT,
    expected="> 1",
    shown=True,
)
def beats_random(bench: Bench) -> Measurement:
    return against(bench, ours(bench).right, "random", by_chance(bench).right)


@claim(
    "think_at_hard",
    claim="Its decider gets more tokens right than as many second passes where the entropy is highest",
    metric=RIGHT,
    expected="> 1",
)
def beats_entropy(bench: Bench) -> Measurement:
    return against(bench, ours(bench).right, "entropy", by_entropy(bench).right)


@claim(
    "think_at_hard",
    claim="The oracle's choice gets at least as many tokens right as thinking once and as thinking always",
    metric=RIGHT,
    expected=">= 1",
)
def oracle_selects(bench: Bench) -> Measurement:
    best = max(never(bench), always(bench), always(bench, ""), key=lambda side: side.right)
    return against(bench, oracle(bench).right, "better of once and always", best.right)


@claim(
    "think_at_hard",
    claim="Of the tokens that are wrong after one pass, another gets more right than the model's own second choice is",
    metric="share of hard tokens that become right, the oracle choosing",
    expected="> 1",
)
def beats_second_choice(bench: Bench) -> Measurement:
    one, best = never(bench), oracle(bench)
    hard = ~one.hits
    second = one.logits[hard].topk(2, -1).indices[:, 1] == one.truth[hard]
    value, baseline = float(best.hits[hard].float().mean()), float(second.float().mean())
    return Measurement(value, "second choice of one pass", baseline, int(hard.sum()), beside(bench))


@claim(
    "think_at_hard",
    claim="Thinking always with its weights breaks more than 0.5 % of the tokens, while it mends others",
    metric="share of answer tokens that were right after one pass and are not after two",
    expected="> 0.005",
    compare="value",
)
def overthinking(bench: Bench) -> Measurement:
    one, two = never(bench), always(bench, "")
    broken = float((one.hits & ~two.hits).float().mean())
    mended = float((~one.hits & two.hits).float().mean())
    return Measurement(broken, "mended", mended, len(one.hits), beside(bench))


@claim(
    "think_at_hard",
    claim="A second pass for an easy token costs more right tokens than none for a hard one",
    metric="right tokens lost per token decided wrongly",
    expected="> 1",
)
def over_is_worse(bench: Bench) -> Measurement:
    one, two, best = never(bench), always(bench, ""), oracle(bench)
    lost = float((~two.hits)[one.hits].float().mean())
    missed = float(best.hits[~one.hits].float().mean())
    return Measurement(lost, "hard tokens left alone", missed, len(one.hits), {"sweep": sweep(bench)})


def sweep(bench: Bench) -> dict[float, dict[str, float]]:
    """Figures by threshold."""
    levels = (0.5, 0.9, 1.0) if bench.quick else (0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 1.0)
    return {level: ours(bench, level).told(text(bench)) for level in levels}


@claim(
    "think_at_hard",
    claim="The best threshold of a sweep lets fewer than a quarter of the answers' tokens run again, and not none",
    metric="share of answer tokens that run again at the threshold with the most right tokens",
    expected="< 0.25",
    compare="value",
)
def few_is_best(bench: Bench) -> Measurement:
    found = sweep(bench)
    best = max(found.values(), key=lambda one: (one["right"], -one["answer tokens run again"]))
    value = best["answer tokens run again"] or 1.0  # none: the claim does not hold
    return Measurement(value, "all", 1.0, int(text(bench).counted.sum()), {"sweep": found})


@claim(
    "think_at_hard",
    claim="Its loss is below that of the model with one pass",
    metric="nats per token of held-out answers",
    expected="< 1",
)
def lower_loss(bench: Bench) -> Measurement:
    return against(bench, ours(bench).nats, "one pass", never(bench).nats)


def area(scores: Tensor, positive: Tensor) -> float:
    """Area under the ROC curve, ties counted half."""
    order = scores.double().unique(return_inverse=True)[1]
    counts = torch.bincount(order)
    rank = (counts.cumsum(0) - (counts - 1) / 2)[order]
    yes, no = int(positive.sum()), int((~positive).sum())
    return float((rank[positive].sum() - yes * (yes + 1) / 2) / max(yes * no, 1))


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
        areas = {name: area(scores, hard) for name, scores in found.items()}
        return areas | {"accuracy": float(((chances > 0.5) == hard).float().mean()), "hard": float(hard.float().mean())}

    return bench.shared("judged", measure)


@claim(
    "think_at_hard",
    claim="The decider tells wrong tokens from right ones with an area under the curve above 0.75",
    metric="area under the ROC curve for tokens that one pass gets wrong",
    expected="> 0.75",
    compare="value",
)
def decider_area(bench: Bench) -> Measurement:
    found = judged(bench)
    return Measurement(found["decider"], "chance", 0.5, int(text(bench).counted.sum()), found)


@claim(
    "think_at_hard",
    claim="The decider tells wrong tokens from right ones better than the probability of the likeliest token does",
    metric="area under the ROC curve for tokens that one pass gets wrong",
    expected="> 1",
)
def decider_beats_confidence(bench: Bench) -> Measurement:
    found = judged(bench)
    return Measurement(found["decider"], "confidence", found["confidence"], int(text(bench).counted.sum()), found)


@claim(
    "think_at_hard",
    claim="Low-rank weights in the second pass get more tokens right than the model's own weights run twice",
    metric=RIGHT + ", the oracle choosing",
    expected="> 1",
)
def weights_help(bench: Bench) -> Measurement:
    bare = ran(bench, "oracle, bare", ByTruth, None)
    return against(bench, oracle(bench).right, "no low-rank weights", bare.right)


@claim(
    "think_at_hard",
    claim="Keys of both passes get more tokens right than those of the own pass alone, for weights trained so",
    metric=RIGHT + ", the oracle choosing",
    expected="> 1",
)
def both_passes_are_seen(bench: Bench) -> Measurement:
    made = {sees: learnt(bench, Thinking(sees=sees)) for sees in (BOTH, OWN)}
    found = {sees: ran(bench, ("sees", sees), ByTruth, lora, sees=sees) for sees, lora in made.items()}
    detail = {name: side.told(text(bench)) for name, side in found.items()}
    return Measurement(found[BOTH].right, "own pass alone", found[OWN].right, len(found[BOTH].hits), detail)


def cost_of(bench: Bench, decider: Decider | None) -> int:
    """Operations of reading held-out code, a batch of 8 rows."""
    found = suite.pair(bench)
    inputs = found.batch(suite.texts(bench, 8, 8)[:8])
    with torch.inference_mode():
        if decider is None:
            return count_flops(lambda: found.target(**inputs))
        with attach(found.target, ThinkAtHard(decider=decider)):
            return count_flops(lambda: found.target(**inputs))


@claim(
    "think_at_hard",
    claim="Second passes of 7 % of the tokens take at most 10 % more operations",
    metric="operations of reading 8 rows of code",
    expected="<= 1.1",
)
def few_operations(bench: Bench) -> Measurement:
    dense, some, every = (cost_of(bench, decider) for decider in (None, ByChance(USUAL), ByChance(1.0)))
    return Measurement(some, "full", dense, 8, {"always": every / dense, "a trained decider's own": deciding(bench)})


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
    found, trials, new = suite.pair(bench), 2 if bench.quick else 4, 24 if bench.quick else 64
    texts = suite.texts(bench, 200, 200)
    batches = [found.batch(texts[i * batch % 160 :][:batch]) for i in range(trials + 1)]

    def work(inputs: dict[str, Tensor], decider: Decider) -> Tensor:
        with attach(found.target, ThinkAtHard(decider=decider)):
            return suite.generate(found.target, inputs, new)

    some, every = partial(work, decider=ByChance(USUAL)), partial(work, decider=ByChance(1.0))
    sides = {
        "7 %": [suite.Side("7 %", some)],
        "always": [suite.Side("always", every)],
        "generate": [suite.Side("generate", lambda inputs: suite.generate(found.target, inputs, new))],
    }
    raced = suite.race(sides, batches, trial=1)
    measured = suite.ratio_of(raced, "7 %", "generate")
    measured.detail["over always"] = suite.ratio_of(raced, "7 %", "always").ratio
    return measured


def _speeds() -> None:
    for batch, bound in ((1, 0.8), (16, 0.7)):
        measure = partial(speed, batch=batch)
        measure.__qualname__ = f"speed at batch {batch}"  # type: ignore[attr-defined]
        claim(
            "think_at_hard",
            claim=f"With second passes of 7 % of the tokens it is at least {bound} times as fast, batch {batch}",
            metric="tokens per second, 64 new tokens and reading 128 of prompt",
            expected=f">= {bound}",
            shown=batch == 1,
        )(measure)


_speeds()


@claim(
    "think_at_hard",
    claim="With a cache, in batches of 8, it writes what it writes without one and each row alone (fp32)",
    metric="share of held-out problems with identical answers",
    expected="== 1",
    compare="value",
)
def cached_exactly(bench: Bench) -> Measurement:
    (model, tokenizer), same = models(bench), 0
    prompts = [one.prompt for one in reasoning.problems(16 if bench.quick else 96, 10**6, "heldout")]
    policy = ThinkAtHard(decider=judge(bench), lora=weights(bench))
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": tokenizer("\n").input_ids}
    with attach(model, policy):
        for part in suite.chunks(prompts, 8):
            inputs = dict(tokenizer(part, return_tensors="pt", padding=True))
            width = inputs["input_ids"].shape[1]
            out = model.generate(**inputs, **options)[:, width:]
            for row, prompt in enumerate(part):
                ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
                own = model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=False, **options)
                alone = own[0, ids.shape[1] :]
                same += torch.equal(out[row, : len(alone)], alone)
    return Measurement(same / len(prompts), "generate without a cache", 1.0, len(prompts))
