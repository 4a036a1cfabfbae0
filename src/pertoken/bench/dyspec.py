"""Claims of DySpec: exact, more tokens per step than any fixed shape of its size, and faster than what one would use
today."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from pertoken.bench import suite
from pertoken.bench.claims import Bench, Measurement, claim
from pertoken.bench.exactness import claim_exact, claim_laws
from pertoken.core.attach import attach
from pertoken.core.budget import Budget
from pertoken.core.decision import Commit
from pertoken.decode.chain import Chain
from pertoken.decode.drafter import ModelDrafter
from pertoken.decode.dyspec import BestFirst, DySpec
from pertoken.decode.full import Full
from pertoken.decode.growth import Growth, Shape
from pertoken.decode.kary_tree import KaryTree
from pertoken.decode.lossless import lossless
from pertoken.decode.prompt_lookup import PromptLookup
from pertoken.decode.random_tree import RandomTree
from pertoken.decode.request import Request
from pertoken.decode.tree_decoder import TreeDecoder
from pertoken.depth.layers import LayerPolicy
from pertoken.depth.random_layers import RandomLayers
from pertoken.depth.skip_layers import SkipLayers
from pertoken.models.context import Context


def tree(models: suite.Pair, **options: Any) -> DySpec:
    """DySpec with a fixed economy-free tree: counts that do not depend on the machine."""
    return DySpec(models.draft, **({"size": 16, "economy": False} | options))


claim_exact("dyspec", tree, lambda models: tree(models, size=8))
claim_laws(
    "dyspec",
    {
        "DySpec": lambda models: tree(models, size=6),
        "DySpec with a threshold": lambda models: tree(models, size=8, threshold=0.1),
        "lossless(SkipLayers)": lambda models: lossless(SkipLayers(Budget(layers=2)), size=4, economy=False),
    },
    (0.6, 1.0),
)


@dataclass(frozen=True)
class ArgmaxChildren(TreeDecoder):
    """The control that must fail: most likely children, verified as if they had been sampled."""

    def shape(self) -> Shape:
        return BestFirst(6)

    def growth(self, shape: Shape, request: Request, target: Context, drafter: ModelDrafter | None) -> Growth:
        growth = Growth(shape, drafter, temperature=0.6, sample=True)
        growth.sampler = "top"
        return growth


@claim(
    "dyspec",
    claim="Control: arg-max children under the same rejection verification do not have the target's law",
    metric="p-value of a chi-square test over 125 outcomes",
    expected="< 0.001",
    compare="value",
)
def argmax_children_fail(bench: Bench) -> Measurement:
    return suite.law_test(bench, lambda models: ArgmaxChildren(models.draft), 1.0)


def tokens_per_step(bench: Bench, key: str, make: Any) -> float:
    """Tokens committed per row and target step, greedy, over the held-out prompts in batches of 8."""

    def measure() -> float:
        models, decoder, tokens, steps = suite.pair(bench), None, 0, 0
        for part in suite.chunks(suite.texts(bench, 80, 16), 8):
            decoder = make(models)
            suite.generate(models.target, models.batch(part), 32 if bench.quick else 64, decoder)
            tokens, steps = tokens + decoder.stats.tokens, steps + decoder.stats.row_steps
        return tokens / steps

    return bench.shared(("tokens per step", key), measure)


def best_kary(bench: Bench, size: int) -> tuple[float, int]:
    """The best fixed k-ary tree of this size and its k."""
    found = {
        k: tokens_per_step(bench, f"kary {k} {size}", lambda m, k=k: KaryTree(m.draft, size=size, branches=k))
        for k in (2, 3, 4)
    }
    k = max(found, key=lambda branches: found[branches])
    return found[k], k


def own(bench: Bench, size: int) -> float:
    return tokens_per_step(bench, f"dyspec {size}", lambda m: tree(m, size=size, ngrams=0, together=0.5))


def samples(bench: Bench) -> int:
    return 16 if bench.quick else 80


def against_kary(bench: Bench, size: int) -> Measurement:
    value, k = best_kary(bench, size)
    return Measurement(own(bench, size), f"kary_tree (k={k})", value, samples(bench))


def kary_against_chain(bench: Bench, size: int) -> Measurement:
    chain = tokens_per_step(bench, f"chain {size}", lambda m: Chain(m.draft, size=size))
    return Measurement(best_kary(bench, size)[0], "chain", chain, samples(bench))


def against_random(bench: Bench, size: int) -> Measurement:
    value = tokens_per_step(bench, f"random {size}", lambda m: RandomTree(m.draft, size=size, seed=bench.seed))
    return Measurement(own(bench, size), "random_tree", value, samples(bench))


for _measure, _sentence in (
    (against_kary, "A DySpec tree of {} nodes commits more tokens per target step than the best fixed k-ary tree"),
    (kary_against_chain, "The best fixed k-ary tree of {} nodes commits more tokens per target step than a chain"),
    (against_random, "A DySpec tree of {} nodes commits more tokens per target step than one of random shape"),
):
    for _size in (16, 32, 64):
        claim(
            "dyspec",
            claim=_sentence.format(_size),
            metric="tokens per row and target step",
            expected="> 1",
            shown=_size == 32,
        )(partial(_measure, size=_size))


@claim(
    "dyspec",
    claim="The threshold construction at equal mean size keeps 95 % of the tokens per step with a third of the calls",
    metric="tokens per row and target step",
    expected=">= 0.95",
)
def threshold_keeps_up(bench: Bench) -> Measurement:
    models, prompts = suite.pair(bench), suite.texts(bench, 24, 6)
    new = 32 if bench.quick else 64

    def run(decoder: DySpec) -> tuple[float, float, float]:
        tokens = steps = drafted = calls = 0
        for text in prompts:
            suite.generate(models.target, models.batch([text]), new, decoder)
            stats = decoder.stats
            tokens, steps = tokens + stats.tokens, steps + stats.steps
            drafted, calls = drafted + stats.drafted, calls + stats.draft_calls
        return tokens / steps, drafted / steps, calls / steps

    greedy = run(tree(models, size=32, ngrams=0, together=1.0))
    runs = [(t, run(tree(models, size=64, ngrams=0, threshold=t))) for t in (0.006, 0.0075, 0.0085, 0.01, 0.014)]
    threshold, near = min(runs, key=lambda one: abs(one[1][1] - greedy[1]))
    detail = {
        "threshold": threshold,
        "mean size": {"threshold": near[1], "greedy": greedy[1]},
        "draft calls per step": {"threshold": near[2], "greedy": greedy[2]},
    }
    value = near[0] if near[2] <= greedy[2] / 3 else float("nan")
    return Measurement(value, "greedy construction", greedy[0], len(prompts), detail)


@claim(
    "dyspec",
    claim="Draft values predict acceptance",
    metric="rank correlation of value and acceptance over tenths of the drawn nodes",
    expected="> 0.5",
    compare="value",
)
def values_predict(bench: Bench) -> Measurement:
    models, decoder = suite.pair(bench), tree(suite.pair(bench), size=32, ngrams=0)
    values, accepted = [], []
    for part in suite.chunks(suite.texts(bench, 40, 8), 8):
        with decoder.record() as trace:
            suite.generate(models.target, models.batch(part), 32, decoder)
        for step in trace.steps:
            commit = step.decision
            assert isinstance(commit, Commit)
            values.append(commit.value[commit.valid])
            accepted.append(commit.accepted[commit.valid])
    value, hit = torch.cat(values), torch.cat(accepted).float()
    tenths = [hit[part].mean().item() for part in value.argsort().tensor_split(10)]
    ranks = torch.tensor(tenths).argsort().argsort().double()
    correlation = float(torch.corrcoef(torch.stack([torch.arange(10).double(), ranks]))[0, 1])
    return Measurement(correlation, "none", 0.0, len(value), {"acceptance by tenth": tenths})


def contenders(bench: Bench) -> dict[str, list[suite.Side]]:
    """Every side with its settings, in both dtypes, batch 1."""
    new = 48 if bench.quick else 128
    groups: dict[str, list[suite.Side]] = {}
    for dtype in ("fp32", "bf16"):
        models = suite.pair(bench, dtype)
        target, draft = models.target, models.draft

        def add(group: str, name: str, dtype: str = dtype, target: Any = target, **options: Any) -> None:
            decoder = options.pop("decoder", None)
            side = suite.Side(f"{name} {dtype}", lambda i: suite.generate(target, i, new, decoder, **options))
            groups.setdefault(group, []).append(side)

        add("generate", "generate")
        add("transformers assisted", "assisted", assistant_model=draft)
        for count in (3, 5):
            fixed = {"num_assistant_tokens": count, "num_assistant_tokens_schedule": "constant"}
            add("transformers assisted", f"assisted {count}", assistant_model=Assistant.fixed(draft, count), **fixed)
        for count in (5, 10):
            add("transformers prompt lookup", f"prompt lookup {count}", prompt_lookup_num_tokens=count)
        add("full", "full", decoder=Full())
        add("prompt_lookup", "prompt_lookup", decoder=PromptLookup())
        add("dyspec", "DySpec", decoder=DySpec(draft))
        add("dyspec", "DySpec 16", decoder=DySpec(draft, size=16))
        add("dyspec", "DySpec 32 without n-grams", decoder=DySpec(draft, size=32, ngrams=0))
    return groups


class Assistant:
    """A draft model with a fixed number of guesses, as transformers reads it from the draft's own configuration."""

    @staticmethod
    def fixed(draft: Any, count: int) -> Any:
        import copy

        other = copy.copy(draft)
        other.generation_config = copy.deepcopy(draft.generation_config)
        other.generation_config.num_assistant_tokens = count
        other.generation_config.num_assistant_tokens_schedule = "constant"
        other.generation_config.assistant_confidence_threshold = 0.0
        return other


def speeds(bench: Bench) -> dict[str, dict[str, Any]]:
    """The race that all speed claims at batch 1 share."""

    def run() -> dict[str, dict[str, Any]]:
        models = suite.pair(bench)
        batches = [models.batch([text]) for text in suite.texts(bench, 27, 6)]
        return suite.race(contenders(bench), batches)

    return bench.shared("speeds", run)


def speed_against(bench: Bench, baseline: str) -> Measurement:
    return suite.ratio_of(speeds(bench), "dyspec", baseline)


for _baseline, _bound in (
    ("transformers assisted", 1.5),
    ("generate", 1.5),
    ("transformers prompt lookup", 1.1),
    ("full", 1.0),
):
    claim(
        "dyspec",
        claim=f"DySpec is at least {_bound}x as fast as {_baseline} (batch 1, each at its best dtype and settings)",
        metric="tokens per second",
        expected=f">= {_bound}",
        shown=True,
    )(partial(speed_against, baseline=_baseline))


@claim(
    "dyspec",
    claim="In ragged batches of 8 DySpec is at least 1.2x as fast as plain batched generation",
    metric="tokens per second",
    expected=">= 1.2",
    shown=True,
)
def speed_in_batches(bench: Bench) -> Measurement:
    new = 48 if bench.quick else 128
    groups: dict[str, list[suite.Side]] = {"generate": [], "dyspec": [], "full": []}
    for dtype in ("fp32", "bf16"):
        models = suite.pair(bench, dtype)
        target = models.target
        sides = {"generate": [None], "full": [Full()], "dyspec": [DySpec(models.draft), DySpec(models.draft, size=8)]}
        for group, decoders in sides.items():
            for decoder in decoders:
                work = lambda i, t=target, d=decoder: suite.generate(t, i, new, d)  # noqa: E731
                label = f"{group} {getattr(decoder, 'size', '')} {dtype}".replace("  ", " ")
                groups[group].append(suite.Side(label, work))
    models = suite.pair(bench)
    batches = [models.batch(part) for part in suite.chunks(suite.texts(bench, 88, 24), 8)]
    return suite.ratio_of(suite.race(groups, batches, trial=2), "dyspec", "generate")


@claim(
    "dyspec",
    claim="A policy that treats all tokens alike, attached at full budget, leaves output bit-equal and costs at most "
    "2 % of the speed",
    metric="tokens per second",
    expected=">= 0.98",
    shown=True,
)
def full_budget_is_free(bench: Bench) -> Measurement:
    return attached(bench, SkipLayers(Budget.full()))


@claim(
    "dyspec",
    claim="A policy that decides anew in each forward, attached at full budget, leaves output bit-equal and costs at "
    "most 2 % of the speed",
    metric="tokens per second",
    expected=">= 0.98",
)
def deciding_is_free(bench: Bench) -> Measurement:
    return attached(bench, RandomLayers(Budget.full()))


def attached(bench: Bench, policy: LayerPolicy) -> Measurement:
    """Speed of plain generation with a policy attached over that without, in turn; not a number where ids differ."""
    models = suite.pair(bench)
    new = 48 if bench.quick else 128

    def plainly(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return suite.generate(models.target, inputs, new)

    speeds: dict[str, list[float]] = {"dense": [], "attached": []}
    same = True
    side = suite.Side("generate", plainly)
    for number, text in enumerate(suite.texts(bench, 26, 6)):
        inputs = models.batch([text])
        plain = suite.generate(models.target, inputs, new)
        for name in speeds if number % 2 else reversed(speeds):
            if name == "dense":
                seconds, tokens = suite.clock(side, inputs)
            else:
                with attach(models.target, policy):
                    same = same and bool(torch.equal(suite.generate(models.target, inputs, new), plain))
                    seconds, tokens = suite.clock(side, inputs)
            speeds[name].append(tokens / seconds)
    ratios = [a / d for a, d in zip(speeds["attached"], speeds["dense"], strict=True)]
    dense = statistics.median(speeds["dense"])
    value = statistics.median(ratios) * dense if same else float("nan")
    return Measurement(value, "dense", dense, len(ratios), {"bit-equal": same})
