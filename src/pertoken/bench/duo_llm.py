"""Claims of Duo-LLM: its routers against the best routes in hindsight, fixed ones and random ones at equal budget; how
much of the best routes' gain is selection; operations and wall clock.

`duo_runs` says on which models and texts. The control of joint training has the low-rank weights of
zoo:code-skip-full, trained with all blocks big on the same text, and then the small blocks of zoo:code-duo-after beside
them: as many steps in all.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import torch

from pertoken.bench import suite
from pertoken.bench.claims import Bench, Measurement, claim
from pertoken.bench.duo_runs import (
    HALF,
    best_fixed,
    by_budget,
    dense,
    first_alone,
    gain,
    half_of,
    loss,
    on_searched,
    operations,
    oracles,
    random_at,
    reading,
    routed,
    router,
    search,
    spaced,
    spent,
    tuned,
    windows,
    writing,
)
from pertoken.core.attach import attach
from pertoken.core.budget import Budget
from pertoken.core.estimates import difference, interval, spearman
from pertoken.decode.lossless import lossless
from pertoken.depth import oracle
from pertoken.depth.duo import BIG, SMALL, Duo
from pertoken.depth.duo_llm import DuoLLM
from pertoken.depth.fixed_exit import FixedExit
from pertoken.depth.fixed_modules import FixedModules
from pertoken.depth.modules import GivenModules
from pertoken.depth.random_modules import RandomModules
from pertoken.models.signature import signature

NATS = "nats per token of held-out code"
BUDGETS = (0, 3, 6, 9, 12)


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


for _work, _measure, _bound in (
    ("reading, batch 16", reading, "1.15"),
    ("writing, batch 16", partial(writing, batch=16), "1"),
    ("writing, batch 1", partial(writing, batch=1), "1"),
):
    claim(
        "duo_llm",
        claim=f"Half of the big blocks pay in wall clock: {_work}, at least {_bound} times as fast",
        metric="tokens per second",
        expected=f">= {_bound}",
        shown=_work.startswith("reading"),
    )(_measure)


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
