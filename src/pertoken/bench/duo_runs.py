"""What the claims of Duo-LLM measure: losses, shares of big blocks, operations and speed of its routers, of fixed and
random routes, and of the best routes in hindsight.

The model is zoo:code-target with the low-rank changes of zoo:code-duo merged in, so that all big blocks are that model
as it is. Text is held-out code. Routes are searched on windows of their own (all 4096 routes of 12 layers), everything
else is measured on others.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pertoken.bench import suite
from pertoken.bench.claims import Bench, Measurement
from pertoken.core.attach import attach
from pertoken.core.budget import Budget
from pertoken.core.cost import count_flops
from pertoken.core.decision import Depth
from pertoken.core.policy import Policy
from pertoken.core.trace import Trace
from pertoken.depth import oracle
from pertoken.depth.duo import Duo
from pertoken.depth.duo_llm import DuoLLM
from pertoken.depth.fixed_modules import FixedModules
from pertoken.depth.lora import Lora
from pertoken.depth.random_modules import RandomModules
from pertoken.zoo import corpus
from pertoken.zoo.skipping import nats

WINDOW, SEARCHED, HALF = 192, 97, 6


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


def spaced(bench: Bench) -> float:
    return loss(bench, "spaced", FixedModules(Budget(layers=HALF), modules=tuned(bench)[1]))


def on_searched(bench: Bench) -> float:
    """The router's loss on the windows to search on."""
    (model, duo), (_, ids) = tuned(bench), windows(bench)
    return bench.shared("router, searched", lambda: float(nats(model, DuoLLM(modules=duo), ids, 1).mean()))


def gain(bench: Bench, label: int, big: int | None = None) -> Tensor:
    """By how much the oracle beats all big blocks on a label, place by place."""
    found = search(bench)
    routes = found if big is None else found.with_big(big)
    return (found.with_big(12).losses[0, label] - routes.oracle(label))[found.valid]


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


def reading(bench: Bench) -> Measurement:
    """Tokens per second of reading batches of 16 held-out prompts."""
    model, batches = tuned(bench)[0], suite.batches(bench, 16, 4 if bench.quick else 13)

    def plain(inputs: dict[str, Tensor]) -> Tensor:
        with torch.inference_mode():
            return model(**inputs, use_cache=False).logits[..., 0]

    return raced(bench, plain, batches, {"tokens per batch": batches[0]["input_ids"].numel()})


def writing(bench: Bench, batch: int) -> Measurement:
    """Tokens per second of generating."""
    new, batches = 24 if bench.quick else 64, suite.batches(bench, batch, 3 if bench.quick else 5)
    return raced(bench, partial(suite.generate, tuned(bench)[0], new=new), batches, {"batch": batch, "new": new})


def raced(
    bench: Bench, plain: Callable[[dict[str, Tensor]], Tensor], batches: list[dict[str, Tensor]], detail: dict[str, int]
) -> Measurement:
    """The router at half of the big blocks against the plain model, in turn on the same batches."""
    model, duo = tuned(bench)
    policy = DuoLLM(Budget(layers=HALF), modules=duo)
    found = suite.race_attached(model, policy, plain, batches, ("duo_llm", "full"), "half")
    found.detail.update(detail)
    return found
