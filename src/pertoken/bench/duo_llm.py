"""Claims of Duo-LLM: its routers against the best routes in hindsight, fixed ones and random ones at equal budget; how
much of the best routes' gain is selection; operations and wall clock.

The model is zoo:code-target with the low-rank changes of zoo:code-duo merged in, so that all big blocks are that model
as it is. Text is held-out code. Routes are searched on windows of their own (all 4096 routes of 12 layers), everything
else is measured on others. The control of joint training has the low-rank weights of zoo:code-skip-full, trained with
all blocks big on the same text, and then the small blocks of zoo:code-duo-after beside them: as many steps in all.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pertoken.bench import suite
from pertoken.bench.claims import Bench, Measurement, claim
from pertoken.core.attach import attach
from pertoken.core.budget import Budget
from pertoken.core.cost import count_flops
from pertoken.core.decision import Depth
from pertoken.core.estimates import difference, interval, spearman
from pertoken.core.policy import Policy
from pertoken.core.trace import Trace
from pertoken.decode.lossless import lossless
from pertoken.depth import oracle
from pertoken.depth.duo import BIG, SMALL, Duo
from pertoken.depth.duo_llm import DuoLLM
from pertoken.depth.fixed_exit import FixedExit
from pertoken.depth.fixed_modules import FixedModules
from pertoken.depth.lora import Lora
from pertoken.depth.modules import GivenModules
from pertoken.depth.random_modules import RandomModules
from pertoken.models.signature import signature
from pertoken.zoo import corpus
from pertoken.zoo.skipping import nats

WINDOW, SEARCHED, HALF = 192, 97, 6
NATS = "nats per token of held-out code"
BUDGETS = (0, 3, 6, 9, 12)


def tuned(bench: Bench) -> tuple[Any, Duo]:
    """The model with the changes of its big blocks merged in, and what lies beside it."""

    def make() -> tuple[Any, Duo]:
        model = copy.deepcopy(suite.pair(bench).target)
        return model, Duo.load("zoo:code-duo").merged(model)

    return bench.shared("duo", make)


def first_alone(bench: Bench) -> Any:
    """The model whose blocks learnt with all of them big, before there were small ones."""

    def make() -> Any:
        model = copy.deepcopy(suite.pair(bench).target)
        Lora.load("zoo:code-skip-full").merge(model)
        return model

    return bench.shared("duo, big alone", make)


def windows(bench: Bench) -> tuple[Tensor, Tensor]:
    """Windows to measure on and, shorter ones, to search on, `[row, token]`."""

    def make() -> tuple[Tensor, Tensor]:
        texts = list(corpus.split_texts("heldout").values())
        stream = corpus.token_stream(suite.pair(bench).tokenizer.backend_tokenizer, texts)
        rows = torch.from_numpy(corpus.windows(stream, WINDOW - 1, 0, bench.seed)[:30].astype(np.int64))
        measured, searched = rows[: 4 if bench.quick else 24], rows[24 : 25 if bench.quick else 30]
        return measured, searched[:, : 25 if bench.quick else SEARCHED]

    return bench.shared("duo windows", make)


def search(bench: Bench) -> oracle.Search:
    """All routes on the windows to search on, with labels drawn from the all-big model beside the true ones."""

    def make() -> oracle.Search:
        (model, duo), (_, ids) = tuned(bench), windows(bench)
        bench.status("trying all routes")
        mask = torch.ones_like(ids)
        return oracle.uniform(model, duo, ids, mask, drawn=oracle.resampled(model, duo, ids, mask, bench.seed))

    return bench.shared("routes", make)


def by_budget(bench: Bench, measure: Callable[[oracle.Search], Tensor]) -> dict[int, float]:
    """Mean over places of what is measured on the routes of each number of big blocks."""
    found = search(bench)
    return {big: float(found.mean(measure(found.with_big(big)))) for big in range(found.routes.shape[1] + 1)}


def oracles(bench: Bench) -> dict[int, float]:
    return bench.shared("oracles", lambda: by_budget(bench, lambda routes: routes.oracle()))


def losses(bench: Bench, label: str, policy: Policy | None, model: Any = None) -> Tensor:
    """Mean loss of each window to measure on, of the tuned model unless given."""

    def measure() -> Tensor:
        return nats(tuned(bench)[0] if model is None else model, policy, windows(bench)[0], 1).mean(1)

    return bench.shared(("duo loss", label), measure)


def loss(bench: Bench, label: str, policy: Policy | None, model: Any = None) -> float:
    """Mean loss on the windows to measure on."""
    return float(losses(bench, label, policy, model).mean())


def dense(bench: Bench) -> float:
    return loss(bench, "all big", None)


def random_at(bench: Bench, big: float) -> float:
    """Loss of random modules, on the line between the two whole numbers of big blocks around the one asked for."""
    low, duo = min(int(big), 11), tuned(bench)[1]
    ends = [
        dense(bench)
        if count == 12
        else loss(bench, f"random {count}", RandomModules(Budget(layers=count), modules=duo))
        for count in (low, low + 1)
    ]
    return ends[0] + (big - low) * (ends[1] - ends[0])


def best_fixed(bench: Bench, big: int) -> Tensor:
    """Losses of the route of so many big blocks that was best on the windows to search on."""
    routes = search(bench).with_big(big)
    route = tuple(routes.routes[routes.best_fixed()].tolist())
    return losses(bench, f"fixed {big}", FixedModules(modules=tuned(bench)[1], route=route))


def routed(bench: Bench, big: int) -> tuple[Tensor, Tensor]:
    """The router: its loss on each window, and the share of tokens in the big block `[layer, place]`."""

    def measure() -> tuple[Tensor, Tensor]:
        (model, duo), (rows, _) = tuned(bench), windows(bench)
        if big == 12:
            return losses(bench, "all big", None), torch.ones(12, WINDOW - 1)
        shares, found = [], []
        for part in rows.split(4):
            trace, layers = Trace(), torch.zeros(12, *part[:, 1:].shape)
            with attach(model, DuoLLM(Budget(layers=big), modules=duo), trace=trace), torch.inference_mode():
                logits = model(part[:, :-1], use_cache=False).logits.float()
            for step in trace.steps:
                assert isinstance(step.decision, Depth)
                layers[int(step.site.rsplit(".", 1)[1])] = step.decision.layers[..., 0].float()
            shares.append(layers.mean(1))
            found.append(torch.nn.functional.cross_entropy(logits.transpose(1, 2), part[:, 1:], reduction="none"))
        return torch.cat(found).mean(1), torch.stack(shares).mean(0)

    return bench.shared(("routed", big), measure)


def router(bench: Bench, big: int = HALF) -> float:
    """Mean loss of the router."""
    return float(routed(bench, big)[0].mean())


def spent(bench: Bench, big: int = HALF) -> float:
    """Big blocks per token that the router takes."""
    return float(routed(bench, big)[1].mean() * 12)


@claim(
    "duo_llm",
    claim="With all tokens in big blocks the routed model is the plain one, bit for bit",
    metric="share of logits that are equal",
    expected="== 1",
    compare="value",
)
def exact(bench: Bench) -> Measurement:
    (model, duo), (rows, _) = tuned(bench), windows(bench)
    with torch.inference_mode():
        wanted = model(rows, use_cache=False).logits
        with attach(model, GivenModules(modules=duo, route=torch.full((1, 1, 12), BIG))):
            found = model(rows, use_cache=False).logits
    return Measurement(float((found == wanted).float().mean()), "full", 1.0, rows.numel())


@claim(
    "duo_llm",
    claim="The router predicts better than random modules of as many big blocks",
    metric=NATS + ", budget of half of the big blocks",
    expected="< 1",
    shown=True,
)
def beats_random(bench: Bench) -> Measurement:
    big = spent(bench)
    curve = {
        count: {"router": router(bench, count), "big": spent(bench, count), "random": random_at(bench, count)}
        for count in (3, 6, 9)
    }
    detail = {"big blocks per token": big, "all big": dense(bench), "all small": random_at(bench, 0), "curve": curve}
    return Measurement(router(bench), "random_modules", random_at(bench, big), windows(bench)[0].numel(), detail)


@claim(
    "duo_llm",
    claim="The router predicts better than the best fixed route of as many big blocks",
    metric=NATS + ", budget of half of the big blocks",
    expected="< 1",
    shown=True,
)
def beats_fixed(bench: Bench) -> Measurement:
    mine, fixed = routed(bench, HALF)[0], best_fixed(bench, HALF)
    between = difference(mine.tolist(), fixed.tolist(), seed=bench.seed)
    detail = {"big blocks per token": spent(bench), "evenly spaced": spaced(bench), "difference, 95 %": between}
    count = windows(bench)[0].numel()
    return Measurement(router(bench), "fixed_modules", float(fixed.mean()), count, detail)


def spaced(bench: Bench) -> float:
    return loss(bench, "spaced", FixedModules(Budget(layers=HALF), modules=tuned(bench)[1]))


def on_searched(bench: Bench) -> float:
    """The router's loss on the windows to search on."""
    (model, duo), (_, ids) = tuned(bench), windows(bench)
    return bench.shared("router, searched", lambda: float(nats(model, DuoLLM(modules=duo), ids, 1).mean()))


@claim(
    "duo_llm",
    claim="The router is at least as good as the best of 100 random fixed routes of its budget",
    metric=NATS + ", budget of half of the big blocks",
    expected="<= 1",
)
def best_of_hundred(bench: Bench) -> Measurement:
    found = search(bench).with_big(HALF)
    means = found.mean(found.losses[:, 0])
    order = torch.randperm(len(means), generator=torch.Generator().manual_seed(bench.seed))
    detail = {"mean of all routes": float(means.mean()), "best of all routes": float(means.min())}
    return Measurement(
        on_searched(bench), "best of 100", float(means[order[:100]].min()), int(search(bench).valid.sum()), detail
    )


@claim(
    "duo_llm",
    claim="The router is far from the best choices in hindsight that a policy could make (64 routes of its budget)",
    metric=NATS + ", budget of half of the big blocks, keys of what was chosen before",
    expected="> 1.1",
)
def regret(bench: Bench) -> Measurement:
    (model, duo), (_, ids) = tuned(bench), windows(bench)
    routes = oracle.drawn_routes(12, HALF, 8 if bench.quick else 64, bench.seed)
    bench.status("searching left to right")
    _, least = oracle.consistent(model, duo, ids, torch.ones_like(ids), routes)
    found = search(bench)
    kept = {tuple(route) for route in routes.tolist()}
    same = torch.tensor([tuple(route) in kept for route in found.routes.tolist()])
    uniform = float(found.mean(found.of(same).oracle()))
    detail = {"the same routes, each for a whole text": uniform, "all routes of the budget": oracles(bench)[HALF]}
    best = float(least.mean())
    return Measurement(on_searched(bench), "oracle", best, least.numel(), detail)


@claim(
    "duo_llm",
    claim="No fixed route beats the oracle, at any budget, and the best budget is the oracle over all routes",
    metric="budgets at which this fails",
    expected="== 0",
    compare="value",
)
def is_least(bench: Bench) -> Measurement:
    found = search(bench)
    fails = 0
    for big in range(13):
        routes = found.with_big(big)
        fails += int((routes.mean(routes.losses[:, 0]) < routes.mean(routes.oracle()) - 1e-9).any())
    least = torch.stack([found.with_big(big).oracle() for big in range(13)]).amin(0)
    fails += int(not torch.equal(least[found.valid], found.oracle()[found.valid]))
    return Measurement(fails, "none", 0, len(found.routes))


@claim(
    "duo_llm",
    claim="In hindsight half of the big blocks predict better than all of them",
    metric=NATS + ", least over all routes of the budget",
    expected="< 1",
)
def fewer_is_better(bench: Bench) -> Measurement:
    found = oracles(bench)
    detail = {"oracle by big blocks": found, "least at": min(found, key=lambda big: found[big])}
    return Measurement(found[HALF], "all big", found[12], int(search(bench).valid.sum()), detail)


@claim(
    "duo_llm",
    claim="In hindsight a single big block predicts better than all of them",
    metric=NATS + ", least over all routes of the budget",
    expected="< 1",
)
def one_is_better(bench: Bench) -> Measurement:
    found = oracles(bench)
    return Measurement(found[1], "all big", found[12], int(search(bench).valid.sum()))


@claim(
    "duo_llm",
    claim="Among equally many routes (12 drawn of each budget) half of the big blocks lose to eleven of them",
    metric=NATS + ", mean of the least of 12 routes",
    expected="> 1",
)
def equal_numbers(bench: Bench) -> Measurement:
    found = by_budget(bench, lambda routes: routes.least_of(min(12, len(routes.routes))))
    everything = search(bench)
    any_routes = {
        big: float(everything.mean(everything.least_of(int((everything.big == big).sum())))) for big in (1, HALF, 11)
    }
    detail = {"least of 12 by big blocks": found, "as many routes as the budget has, of any": any_routes}
    detail["oracle"] = {big: oracles(bench)[big] for big in any_routes}
    return Measurement(found[HALF], "eleven big blocks", found[11], int(search(bench).valid.sum()), detail)


def gain(bench: Bench, label: int, big: int | None = None) -> Tensor:
    """By how much the oracle beats all big blocks on a label, place by place."""
    found = search(bench)
    routes = found if big is None else found.with_big(big)
    return (found.with_big(12).losses[0, label] - routes.oracle(label))[found.valid]


@claim(
    "duo_llm",
    claim="More than half of the oracle's gain over all big blocks is there too where there is nothing to gain",
    metric="nats per token gained by the best of all routes, on labels drawn from the all-big model's own distribution",
    expected="> 0.5",
    shown=True,
)
def selection(bench: Bench) -> Measurement:
    found = search(bench)
    whole, best = found.with_big(12).losses[0, 1], found.best()[None]
    carried = float(found.mean(whole - found.losses[:, 1].gather(0, best)[0]))
    labels = {"true": gain(bench, 0), "drawn": gain(bench, 1)}
    detail = {
        "gains on true and drawn labels by big blocks": {
            big: [float(gain(bench, label, big).mean()) for label in (0, 1)] for big in (1, 3, 6, 9, 11)
        },
        "gains over all routes, 95 %": {name: interval(x.tolist(), seed=bench.seed) for name, x in labels.items()},
        "choices for the true label, measured on the drawn one": carried,
    }
    means = [float(x.mean()) for x in labels.values()]
    return Measurement(means[1], "true labels", means[0], int(found.valid.sum()), detail)


@claim(
    "duo_llm",
    claim="Router, best fixed and random routes: the loss falls with each step from 0 to 3, 6, 9 and 12 big blocks",
    metric="steps at which a loss does not fall, of 12",
    expected="== 0",
    compare="value",
)
def monotone(bench: Bench) -> Measurement:
    found = {
        "router": [router(bench, big) for big in BUDGETS],
        "fixed_modules": [float(best_fixed(bench, big).mean()) for big in BUDGETS],
        "random_modules": [random_at(bench, big) for big in BUDGETS],
    }
    fails = sum(after >= before for side in found.values() for before, after in pairwise(side))
    return Measurement(fails, "none", 0, windows(bench)[0].numel(), {"losses": found})


@claim(
    "duo_llm",
    claim="Blocks that learn together predict better than big ones that learn first and small ones after them",
    metric=NATS + ", random modules of half of the big blocks, equal training steps",
    expected="< 1",
)
def joint(bench: Bench) -> Measurement:
    model, duo = first_alone(bench), Duo.load("zoo:code-duo-after")
    duo.check(suite.pair(bench).target)
    duo.about["model"] = signature(model)  # which is that one with the low-rank weights written into it
    other = loss(bench, "in turn", RandomModules(Budget(layers=HALF), modules=duo), model)
    small = loss(bench, "in turn, small", FixedModules(modules=duo, route=(SMALL,) * 12), model)
    detail = {"all big": [dense(bench), loss(bench, "in turn, big", None, model)]}
    detail["all small"] = [random_at(bench, 0), small]
    return Measurement(random_at(bench, HALF), "big before small", other, windows(bench)[0].numel(), detail)


@claim(
    "duo_llm",
    claim="Tokens of high loss are not those that computation helps: rank correlation of loss and difficulty",
    metric="Spearman's rho of the all-big loss and the all-small loss less the oracle's",
    expected="< 0.5",
    compare="value",
)
def difficulty(bench: Bench) -> Measurement:
    found = search(bench)
    whole, small = (found.with_big(big).losses[0, 0][found.valid] for big in (12, 0))
    help_ = small - found.oracle()[found.valid]
    rho = {"all big": spearman(whole, help_), "all small": spearman(small, help_)}
    return Measurement(rho["all big"], "equal ranks", 1.0, len(whole), {"with the loss of": rho})


@claim(
    "duo_llm",
    claim="On text that it was not trained on the router takes the share of big blocks that its budget says",
    metric="distance of the share of big blocks from 0.5",
    expected="<= 0.02",
    compare="value",
)
def keeps_budget(bench: Bench) -> Measurement:
    duo, asked = tuned(bench)[1], {big: spent(bench, big) for big in (3, 6, 9)}
    detail = {"big blocks taken by budget": asked, "threshold at half": duo.threshold(0.5)}
    return Measurement(abs(asked[HALF] / 12 - 0.5), "budget", 0.0, windows(bench)[0].numel(), detail)


@claim(
    "duo_llm",
    claim="The router puts big blocks in later layers",
    metric="mean layer of a big block",
    expected="> 1",
)
def later_layers(bench: Bench) -> Measurement:
    shares = {big: routed(bench, big)[1].mean(1) for big in (3, 6, 9)}
    mean = float((shares[HALF] * torch.arange(12)).sum() / shares[HALF].sum())
    detail = {"share of tokens in the big block by budget and layer": shares}
    return Measurement(mean, "all layers alike", 5.5, windows(bench)[0].numel(), detail)


@claim(
    "duo_llm",
    claim="The router gives more big blocks to early tokens of a text than to late ones",
    metric="big blocks per token, first against last quarter of the places",
    expected="> 1",
)
def early_tokens(bench: Bench) -> Measurement:
    quarters = [float(part.mean() * 12) for part in routed(bench, HALF)[1].chunk(4, 1)]
    return Measurement(quarters[0], "last quarter", quarters[-1], windows(bench)[0].numel(), {"quarters": quarters})


def operations(bench: Bench, policy: Policy | None, plain: bool = False) -> float:
    """Operations per token of reading; plain: by the model as it is shipped."""
    model, rows = suite.pair(bench).target if plain else tuned(bench)[0], windows(bench)[0][:2]

    def forward() -> None:
        with torch.inference_mode(), nullcontext() if policy is None else attach(model, policy):
            model(rows, use_cache=False)

    return count_flops(forward) / rows.numel()


def half_of(bench: Bench) -> float:
    """Operations per token with half of the big blocks."""
    policy = DuoLLM(Budget(layers=HALF), modules=tuned(bench)[1])
    return bench.shared("operations", lambda: operations(bench, policy))


@claim(
    "duo_llm",
    claim="Half of the big blocks save a quarter of all operations of reading, routers and head included",
    metric="operations per token",
    expected="<= 0.75",
)
def saves_operations(bench: Bench) -> Measurement:
    return Measurement(half_of(bench), "full", operations(bench, None), windows(bench)[0][:2].numel())


@claim(
    "duo_llm",
    claim="At equal operations the router predicts better than the first layers of a model trained with early exits",
    metric=NATS + ", operations of half of the big blocks",
    expected="< 1",
    shown=True,
)
def beats_exits(bench: Bench) -> Measurement:
    exits = {ran: FixedExit(Budget(layers=ran), prompt=True) for ran in range(6, 12)}
    spends = {ran: operations(bench, policy, plain=True) for ran, policy in exits.items()}
    low = max(ran for ran, spend in spends.items() if spend <= half_of(bench))
    part = (half_of(bench) - spends[low]) / (spends[low + 1] - spends[low])
    models = {"as shipped": suite.pair(bench).target, "tuned with all layers": first_alone(bench)}
    found, told = {}, {}
    for name, model in models.items():
        ends = [loss(bench, f"exit {ran}, {name}", exits[ran], model) for ran in (low, low + 1)]
        found[name] = ends[0] + part * (ends[1] - ends[0])
        told[name] = {"losses": ends, "all layers": loss(bench, f"all layers, {name}", None, model)}
    detail = {"layers run": low + part, "models": told, "all big": dense(bench)}
    return Measurement(router(bench), "fixed_exit", min(found.values()), windows(bench)[0].numel(), detail)


def reading(bench: Bench) -> Measurement:
    """Tokens per second of reading batches of 16 held-out prompts."""
    model, models, trials = tuned(bench)[0], suite.pair(bench), 3 if bench.quick else 12
    texts = suite.texts(bench, 200, 200)
    batches = [models.batch(texts[16 * i % 160 :][:16]) for i in range(trials + 1)]

    def plain(inputs: dict[str, Tensor]) -> Tensor:
        with torch.inference_mode():
            return model(**inputs, use_cache=False).logits[..., 0]

    return raced(bench, plain, batches, {"tokens per batch": batches[0]["input_ids"].numel()})


def writing(bench: Bench, batch: int) -> Measurement:
    """Tokens per second of generating."""
    model, models, trials = tuned(bench)[0], suite.pair(bench), 2 if bench.quick else 4
    texts, new = suite.texts(bench, 200, 200), 24 if bench.quick else 64
    batches = [models.batch(texts[i * batch % 160 :][:batch]) for i in range(trials + 1)]
    return raced(bench, lambda inputs: suite.generate(model, inputs, new), batches, {"batch": batch, "new": new})


def raced(
    bench: Bench, plain: Callable[[dict[str, Tensor]], Tensor], batches: list[dict[str, Tensor]], detail: dict[str, int]
) -> Measurement:
    """The router at half of the big blocks against the plain model, in turn on the same batches."""
    model, duo = tuned(bench)

    def ours(inputs: dict[str, Tensor]) -> Tensor:
        with attach(model, DuoLLM(Budget(layers=HALF), modules=duo)):
            return plain(inputs)

    sides = {"duo_llm": [suite.Side("half", ours)], "full": [suite.Side("full", plain)]}
    found = suite.ratio_of(suite.race(sides, batches, trial=1), "duo_llm", "full")
    found.detail.update(detail)
    return found


def _speeds() -> None:
    kinds = {"reading, batch 16": (reading, ">= 1.15"), "writing, batch 16": (partial(writing, batch=16), ">= 1")}
    kinds["writing, batch 1"] = (partial(writing, batch=1), ">= 1")
    for name, (function, expected) in kinds.items():
        measure = partial(function)
        measure.__qualname__ = f"speed of {name}"  # type: ignore[attr-defined]
        claim(
            "duo_llm",
            claim=f"Half of the big blocks pay in wall clock: {name}, at least {expected.split()[1]} times as fast",
            metric="tokens per second",
            expected=expected,
            shown=name.startswith("reading"),
        )(measure)


_speeds()


def drafting(models: suite.Pair) -> Any:
    return lossless(DuoLLM(Budget(layers=3), modules="zoo:code-duo"), size=4, economy=False)


@claim(
    "duo_llm",
    claim="As a drafter (`lossless`), greedy ids equal plain generation's in ragged batches of 8 (fp32)",
    metric="share of prompts with identical ids",
    expected="== 1",
    compare="value",
)
def drafts_exactly(bench: Bench) -> Measurement:
    return suite.identical(bench, drafting, 8)
