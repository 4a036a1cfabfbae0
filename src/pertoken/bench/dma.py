"""Claims of DMA: causal in every mode, what training it is worth on code and on recall, and when it is faster."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pertoken.attend.dma import DMA
from pertoken.attend.dynamic_mask import FORMS, DynamicMask
from pertoken.attend.random_keys import RandomKeys
from pertoken.attend.sink_window import SinkWindow
from pertoken.bench import key_tasks, suite
from pertoken.bench.claims import Bench, Measurement, claim
from pertoken.bench.dhsa import rows
from pertoken.bench.key_exactness import TOKENS, exactness, logits
from pertoken.bench.large_layers import LARGE, raced
from pertoken.core.attach import attach
from pertoken.core.budget import Budget
from pertoken.core.cost import timed
from pertoken.core.errors import BadRequest
from pertoken.core.policy import Policy
from pertoken.zoo import layers, recall
from pertoken.zoo.recipe import RECIPES

KINDS = ("dense", "dma", "window")
BEFORE = ("before, window", "before, sinks and window", "before, random keys")
QUESTIONS = 8
MULTIPLES = (2, 4, 8, 16)


@claim(
    "dma",
    claim="With A = 0 and all in the budget it is dense attention, token by token it is the whole, and a ragged batch "
    "is each row alone",
    metric="largest difference of logits over their largest size (three families, fp32)",
    expected="<= 1e-5",
    compare="value",
)
def exact(bench: Bench) -> Measurement:
    def made(model: Any, family: str) -> tuple[Policy, dict[str, Policy]]:
        return DMA.for_model(model, noise=1.0, budget=Budget(tokens=8), run=8), {"silent": DMA(Budget(tokens=TOKENS))}

    return exactness(bench, ("llama", "qwen3", "gemma"), made, chunk=1)


@claim(
    "dma",
    claim="A changed token changes no earlier logit by a single bit: both forms, with and without a mask, reading and "
    "training",
    metric="earlier logits that differ",
    expected="== 0",
    compare="value",
)
def causal(bench: Bench) -> Measurement:
    model, found = suite.tiny("llama", 3, 1), {}
    ids = torch.randint(1, 211, (2, 40), generator=torch.Generator().manual_seed(bench.seed))
    other, at = ids.clone(), 29
    other[:, at] = (ids[:, at] + 1) % 211
    masks = {"none": None, "padding": torch.stack([torch.arange(40) >= n for n in (0, 7)]).long()}
    for form in FORMS:
        policy = DMA.for_model(model, noise=1.0, form=form, budget=Budget(tokens=8), run=8)
        for name, mask in masks.items():
            for training in (False, True):
                with attach(model, policy), torch.set_grad_enabled(training):
                    one, two = (model(input_ids=x, attention_mask=mask, use_cache=False).logits for x in (ids, other))
                assert not torch.equal(one[:, at:], two[:, at:])
                found[f"{form}, mask {name}, {'training' if training else 'reading'}"] = int(
                    (one[:, :at] != two[:, :at]).sum()
                )
    return Measurement(float(sum(found.values())), "none", 0.0, len(found), found)


def trained_with(bench: Bench, name: str) -> tuple[Any, Policy | None]:
    """A zoo model, and what it was trained with; trained now if it was not yet. Raises `BadRequest` in a quick run that
    would have to train it."""

    def make() -> tuple[Any, Policy | None]:
        from transformers import LlamaForCausalLM

        from pertoken.zoo import on_demand

        path, recipe = on_demand.found(name), RECIPES[name]
        if path is None:
            if bench.quick:
                raise BadRequest(
                    f"this needs the zoo's {name}, which is not trained yet, and a quick run trains nothing; train it "
                    f"with `pertoken zoo train {name} --no-compile --out {on_demand.kept_in()}`, or run without --quick"
                )
            bench.status(f"training {name}")
            path = on_demand.trained(name)
        model = LlamaForCausalLM.from_pretrained(path, local_files_only=True, dtype=torch.float32).eval()
        if recipe.layers == layers.DENSE:
            return model, None
        mask = DynamicMask.load(path) if recipe.layers == layers.MASK else None
        return model, DMA(Budget(tokens=recipe.keys), mask=mask)

    return bench.shared(("trained with", name), make)


def small(bench: Bench, task: str, kind: str) -> tuple[Any, Policy | None]:
    """One of the small models that differ in what their layers read."""
    return trained_with(bench, task if kind == "dense" else f"{task}-{kind}")


def texts(bench: Bench) -> int:
    return 8 if bench.quick else 48


@torch.inference_mode()
def code_loss(bench: Bench, kind: str, policy: Policy | None = None) -> float:
    """Nats per token of held-out code, rows of 512; policy: in place of what the model was trained with."""
    model, own = small(bench, "reading", kind)
    ids, policy = rows(bench, "heldout", texts(bench)), policy or own
    return mean(
        float(F.cross_entropy(logits(model, part, policy)[:, :-1].flatten(0, 1), part[:, 1:].flatten()))
        for part in ids.split(8)
    )


@claim(
    "dma",
    claim="Trained from the start with 128 of 512 keys, it predicts code at most 2 % worse than its dense twin",
    metric="nats per token (equal steps)",
    expected="<= 1.02",
    shown=True,
)
def as_good_as_dense(bench: Bench) -> Measurement:
    found = {kind: code_loss(bench, kind) for kind in KINDS}
    return Measurement(found["dma"], "dense twin", found["dense"], texts(bench), found)


@claim(
    "dma",
    claim="It predicts code no worse than a twin trained with a window of as many keys",
    metric="nats per token (equal steps)",
    expected="<= 1",
)
def above_window_on_code(bench: Bench) -> Measurement:
    found = {kind: code_loss(bench, kind) for kind in KINDS}
    return Measurement(found["dma"], "window twin", found["window"], texts(bench), found)


@claim(
    "dma",
    claim="Keys chosen by the trained score predict code better than as many random keys in the same model",
    metric="nats per token",
    expected="< 1",
)
def above_random(bench: Bench) -> Measurement:
    keys = RECIPES["reading-dma"].keys
    spread: dict[str, Any] = {"sinks": 0, "recent": 1, "run": 1}
    control = code_loss(bench, "dma", RandomKeys(Budget(tokens=keys), seed=bench.seed, **spread))
    window = code_loss(bench, "dma", SinkWindow(Budget(tokens=0), sinks=0, recent=keys + 1, run=1))
    untrained = code_loss(
        bench, "dense", DMA.for_model(small(bench, "reading", "dense")[0], budget=Budget(tokens=keys))
    )
    told = {"window, same model": window, "an untrained score on the dense twin": untrained}
    return Measurement(code_loss(bench, "dma"), "random_keys", control, texts(bench), told)


def rows_of_512(bench: Bench) -> int:
    return 8 if bench.quick else 32


@torch.inference_mode()
def associated(bench: Bench, kind: str, policy: Policy | None = None, length: int = 512) -> dict[str, float]:
    """Share of questions answered by task, each token behind the right ones before it."""
    model, own = small(bench, "associating", kind)
    made = recall.recall(key_tasks.loaded(bench, "code-target")[1])
    policy = policy or own

    def predict(ids: Tensor, positions: Tensor) -> Tensor:
        return logits(model, ids, policy)[:, positions].argmax(-1)

    count = rows_of_512(bench)
    found = recall.accuracies(predict, made, lengths=[length], rows=count, pairs=32, questions=QUESTIONS)
    return {one["task"]: one["accuracy"] for one in found}


@claim(
    "dma",
    claim="On associative recall of 32 pairs in 512 tokens it answers more than its dense twin and its window twin "
    "reading as many keys",
    metric="share of questions answered (64 keys; all trained on from one model for as many steps)",
    expected="> 1",
)
def recalls(bench: Bench) -> Measurement:
    keys = RECIPES["associating-dma"].keys
    window = SinkWindow(Budget(tokens=0), sinks=0, recent=keys + 1, run=1)
    sinks = SinkWindow(Budget(tokens=0), sinks=4, recent=keys - 3, run=1)
    found = {
        "dma": associated(bench, "dma"),
        "window twin": associated(bench, "window"),
        "dense twin with a window": associated(bench, "dense", window),
        "dense twin with sinks and a window": associated(bench, "dense", sinks),
        "dense twin, all keys": associated(bench, "dense"),
        "dma with random keys": associated(
            bench, "dma", RandomKeys(Budget(tokens=keys), sinks=0, recent=1, run=1, seed=bench.seed)
        ),
    }
    rivals = ("window twin", "dense twin with a window", "dense twin with sinks and a window")
    rival = max(rivals, key=lambda name: found[name]["pairs"])
    n = rows_of_512(bench) * QUESTIONS
    return Measurement(found["dma"]["pairs"], rival, found[rival]["pairs"], n, {"by task": found})


def rows_at_2k(bench: Bench) -> int:
    return 2 if bench.quick else 6


def at_2k(bench: Bench) -> dict[str, dict[str, float]]:
    """Share of questions answered by task, in rows of 2k tokens: each side reads 256 keys besides the token itself,
    unless its name says otherwise."""

    def make() -> dict[str, dict[str, float]]:
        own_model, own_policy = trained_with(bench, "recall-dma")
        assert isinstance(own_policy, DMA)
        before, tokenizer = key_tasks.loaded(bench)
        made, keys = recall.recall(tokenizer), RECIPES["recall-dma"].keys
        sides: dict[str, tuple[Any, Policy | None]] = {
            "dma": (own_model, own_policy),
            "all keys with its scores": (own_model, replace(own_policy, budget=Budget(fraction=1.0))),
            "window twin": trained_with(bench, "recall-window"),
            "before, all keys": (before, None),
            "before, window": (before, SinkWindow(Budget(tokens=0), sinks=0, recent=keys + 1, run=1)),
            "before, sinks and window": (before, SinkWindow(Budget(tokens=0), sinks=4, recent=keys - 3, run=1)),
            "before, random keys": (
                before,
                RandomKeys(Budget(tokens=keys - 4), sinks=4, recent=1, run=1, seed=bench.seed),
            ),
        }
        found = {}
        for name, (model, policy) in sides.items():
            bench.status(f"2k tokens: {name}")

            def predict(ids: Tensor, positions: Tensor, model: Any = model, policy: Policy | None = policy) -> Tensor:
                return torch.cat([logits(model, row, policy)[:, positions].argmax(-1) for row in ids.split(1)])

            scored = recall.accuracies(predict, made, lengths=[2048], rows=rows_at_2k(bench), questions=QUESTIONS)
            found[name] = {one["task"]: one["accuracy"] for one in scored}
        return found

    return bench.shared("2k tokens, 256 keys", make)


@claim(
    "dma",
    claim="A recall model that went on training with 256 of 2k keys answers more than before reading as many keys by a "
    "window, by sinks and a window, or by random choice",
    metric="share of questions answered (2k tokens, 256 keys)",
    expected="> 1",
)
def retrofitted(bench: Bench) -> Measurement:
    found = at_2k(bench)
    average = {name: mean(one.values()) for name, one in found.items()}
    rival = max(BEFORE, key=average.__getitem__)
    n = len(recall.TASKS) * rows_at_2k(bench) * QUESTIONS
    return Measurement(average["dma"], rival, average[rival], n, {"by task": found})


@claim(
    "dma",
    claim="On associative recall in 2k tokens it answers more with 256 keys than a twin that went on training with a "
    "window of as many, and than the model before with a window, sinks and a window, or random keys",
    metric="share of questions about pairs answered (2k tokens, 256 keys)",
    expected="> 1",
)
def associates_at_2k(bench: Bench) -> Measurement:
    found = at_2k(bench)
    pairs = {name: one["pairs"] for name, one in found.items()}
    rival = max(("window twin", *BEFORE), key=pairs.__getitem__)
    return Measurement(pairs["dma"], rival, pairs[rival], rows_at_2k(bench) * QUESTIONS, {"pairs": pairs})


@claim(
    "dma",
    claim="From 4 times as many keys as it reads on, a decoding step is faster than with dense SDPA",
    metric="shortest context in multiples of the 2048 keys read, of 2, 4, 8, 16, from which on it is faster",
    expected="<= 4",
    compare="value",
)
def faster_from(bench: Bench) -> Measurement:
    budget = 256 if bench.quick else 2048
    model = key_tasks.loaded(bench)[0]
    policy = DMA.for_model(model, noise=1.0, budget=Budget(tokens=budget))
    ratios = {}
    for times in MULTIPLES:
        steps: dict[str, list[float]] = {}
        ids = rows(bench, "train", 10**6).flatten()[: times * budget + 24][None]
        for name, own in {"dense": None, "dma": policy}.items():
            steps[name] = stepping(model, ids, own, times * budget)
        ratios[times] = median(a / b for a, b in zip(steps["dense"], steps["dma"], strict=True))
    told = {"keys read": budget, "speed over dense by multiple": ratios}
    return Measurement(faster(ratios), "multiple", 4.0, 20, told)


@claim(
    "dma",
    claim="In layers as in a model of a billion weights a decoding step is faster than with dense SDPA from 4 times as "
    "many keys as it reads on",
    metric=f"shortest context in multiples of the 2048 keys read, of 2, 4, 8, 16 ({LARGE})",
    expected="<= 4",
    compare="value",
)
def large_layers_faster_from(bench: Bench) -> Measurement:
    budget, steps, speeds = (256 if bench.quick else 2048), (4 if bench.quick else 16), {}
    for times in MULTIPLES:
        window = SinkWindow(sinks=4, recent=budget - 4)
        sides = {"dense": None, "dma": DMA(Budget(tokens=budget)), "sink_window": window}
        speeds[times] = raced(bench, sides, times * budget, steps)[0]
    value = faster({times: one["dma"] for times, one in speeds.items()})
    return Measurement(value, "multiple", 4.0, steps, {"keys read": budget, "speed over dense by multiple": speeds})


def faster(ratios: dict[int, float]) -> float:
    """The smallest multiple from which on all are above 1; infinite if there is none."""
    return min((float(at) for at in ratios if all(ratios[more] > 1 for more in ratios if more >= at)), default=math.inf)


@torch.inference_mode()
def stepping(model: Any, ids: Tensor, policy: Policy | None, before: int) -> list[float]:
    """Seconds of each of 20 steps behind `before` tokens that dense attention has read."""
    cache, seconds = model(input_ids=ids[:, :before], use_cache=True, logits_to_keep=1).past_key_values, []

    def run() -> list[float]:
        for at in range(before, before + 24):
            with timed() as cost:
                model(input_ids=ids[:, at : at + 1], past_key_values=cache, use_cache=True)
            seconds.append(cost.seconds)
        return seconds[4:]

    if policy is None:
        return run()
    with attach(model, policy):
        return run()
