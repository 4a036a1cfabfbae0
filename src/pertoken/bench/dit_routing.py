"""Claims of DiT routing: what it does not change, what it costs, and what it keeps beside random and static routing.

The zoo's grids classify scenes by shape and colour of the largest thing. All begin with one grid whose edges are all
open (zoo:scenes-grid): the routed one was trained with a budget of 0.6 costs of the diagonal, the static one with the
first edges that cost no less than it then spends, the random one with its shares of tokens at every edge, by lot.
Speed at a useful size is that of a random grid of a PVTv2-B1's widths.
"""

from __future__ import annotations

import math
import statistics
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pertoken.bench import pictures
from pertoken.bench.claims import Bench, Measurement, claim
from pertoken.core.attach import attach
from pertoken.core.budget import Budget
from pertoken.core.cost import count_flops
from pertoken.core.estimates import spearman
from pertoken.core.trace import Trace
from pertoken.depth.dit_routing import DiTRouting, cutoff_for
from pertoken.depth.random_routing import RandomRouting
from pertoken.depth.routing import SITE, Rates, Routing, keep_rates
from pertoken.depth.static_routing import StaticRouting
from pertoken.models.edges import Gate
from pertoken.models.grid import GridClassifier, GridConfig
from pertoken.zoo import grids, model_path
from pertoken.zoo.scene_recipe import HELD
from pertoken.zoo.scenes import Scene, as_input, scene
from pertoken.zoo.scenes_models import SCENE_RECIPES

WHOLE, ROUTED, STATIC, RANDOM = "scenes-grid", "scenes-grid-routed", "scenes-grid-static", "scenes-grid-random"
MU, FRONT = SCENE_RECIPES[ROUTED].mu, (0.4, 0.6, 0.8, 1.0)
ACCURACY = "held-out scenes whose largest thing is named rightly, %"


def grid(bench: Bench, name: str) -> GridClassifier:
    """A zoo grid."""
    return bench.shared(
        ("grid", name), lambda: GridClassifier.from_pretrained(model_path(name), dtype=torch.float32).eval()
    )


def scenes(bench: Bench, start: int = HELD) -> tuple[list[Tensor], Tensor, list[Scene]]:
    """Scenes that no model was trained on: inputs in batches of 32, classes and the scenes themselves."""

    def make() -> tuple[list[Tensor], Tensor, list[Scene]]:
        count = 96 if bench.quick else 1024
        shown = [scene(seed) for seed in range(start, start + count)]
        batches = [as_input(shown[first : first + 32]) for first in range(0, count, 32)]
        return batches, torch.tensor([one.largest for one in shown]), shown

    return bench.shared(("scenes", start), make)


def other_batches(bench: Bench) -> list[Tensor]:
    """Batches of scenes to find cutoffs on, none of which is judged by."""
    return scenes(bench, HELD + 10**6)[0][:4]


@dataclass(frozen=True)
class Side:
    """Of the held-out scenes: share of right answers in %, cost of each in costs of the diagonal, operations of each,
    and the decisions."""

    accuracy: float
    spent: Tensor
    flops: float
    trace: Trace


def side(bench: Bench, name: str, policy: Routing | None) -> Side:
    def make() -> Side:
        model, (batches, classes, _) = grid(bench, name), scenes(bench)
        found, spent, trace = [], [], Trace()
        with torch.inference_mode(), attach(model, policy, trace=trace) if policy is not None else nullcontext():
            for pixels in batches:
                out = model(pixels)
                found.append(out.logits.argmax(-1))
                spent.append(out.spent)
        with torch.inference_mode(), attach(model, policy) if policy is not None else nullcontext():
            flops = count_flops(lambda: model(batches[0])) / len(batches[0])
        right = float((torch.cat(found) == classes).double().mean())
        return Side(100 * right, torch.cat(spent), flops, trace)

    return bench.shared((name, policy), make)


def trained_as(bench: Bench, name: str) -> Routing:
    """The router with which a zoo grid was trained."""
    found = grids.router(SCENE_RECIPES[name], grid(bench, name), other_batches(bench)[0])
    assert found is not None
    return found


def at(bench: Bench, mu: float) -> DiTRouting:
    """The routed grid's router at a cutoff that spends `mu` on other scenes."""
    return bench.shared(
        ("cutoff", mu), lambda: DiTRouting(cutoff=cutoff_for(grid(bench, ROUTED), other_batches(bench), mu))
    )


def rates(bench: Bench, policy: Routing) -> Rates:
    """The shares of tokens that the routed grid sends through each edge on other scenes."""

    def make() -> Rates:
        trace = Trace()
        with torch.inference_mode(), attach(grid(bench, ROUTED), policy, trace=trace):
            for pixels in other_batches(bench):
                grid(bench, ROUTED)(pixels)
        return keep_rates(trace)

    return bench.shared(("rates", policy), make)


@claim(
    "dit_routing",
    claim="With all gates open the grid's outputs are those without a router",
    metric="largest difference of logits",
    expected="<= 1e-5",
    compare="value",
)
def nothing_closed(bench: Bench) -> Measurement:
    model, pixels = grid(bench, WHOLE), scenes(bench)[0][0]
    with torch.inference_mode():
        expected = model(pixels).logits
        with attach(model, DiTRouting(cutoff=-math.inf)):
            found = model(pixels).logits
    return Measurement(float((found - expected).abs().max()), "dense", 0.0, len(pixels))


@claim(
    "dit_routing",
    claim="Gathering the tokens that take an edge gives what computing all and multiplying by decisions gives",
    metric="largest difference of logits",
    expected="<= 1e-4",
    compare="value",
)
def gathered_is_masked(bench: Bench) -> Measurement:
    model, pixels, trace = grid(bench, ROUTED), scenes(bench)[0][0], Trace()
    try:
        with torch.no_grad(), attach(model.train(), DiTRouting(), trace=trace, training=True):
            masked = model(pixels).logits
    finally:
        model.eval()
    bench.cache.pop(("grid", ROUTED))  # the forward above moved its averages
    with torch.inference_mode(), attach(model, DiTRouting(), replay=trace):
        gathered = model(pixels).logits
    return Measurement(float((gathered - masked).abs().max()), "masked", 0.0, len(pixels))


@claim(
    "dit_routing",
    claim="Trained for 0.6 costs of the diagonal, gates spend so much on new scenes, and cutoffs meet other budgets",
    metric="largest distance of the mean cost from 0.4, 0.6 and 0.8 costs of the diagonal",
    expected="<= 0.05",
    compare="value",
)
def meets_budgets(bench: Bench) -> Measurement:
    policies = {0.4: at(bench, 0.4), MU: DiTRouting(), 0.8: at(bench, 0.8)}
    found = {mu: float(side(bench, ROUTED, policy).spent.mean()) for mu, policy in policies.items()}
    worst = max(abs(spent - mu) for mu, spent in found.items())
    return Measurement(worst, "asked for", 0.0, len(scenes(bench)[1]), {str(mu): value for mu, value in found.items()})


@claim(
    "dit_routing",
    claim="A routed grid does at most half of the operations of the whole one, gates included",
    metric="operations per scene",
    expected="<= 0.5",
    shown=True,
)
def saves_operations(bench: Bench) -> Measurement:
    ours, whole = side(bench, ROUTED, DiTRouting()), side(bench, WHOLE, None)
    return Measurement(ours.flops, "the whole grid", whole.flops, len(ours.spent))


@claim(
    "dit_routing",
    claim="Routing costs at most two points of accuracy against the whole grid",
    metric="points of accuracy lost",
    expected="<= 2",
    compare="value",
)
def keeps_quality(bench: Bench) -> Measurement:
    ours, whole = side(bench, ROUTED, DiTRouting()), side(bench, WHOLE, None)
    detail = {"routed": ours.accuracy, "whole grid": whole.accuracy, "cost": float(ours.spent.mean())}
    detail["routed weights, all edges"] = side(bench, ROUTED, None).accuracy
    return Measurement(whole.accuracy - ours.accuracy, "the whole grid", 0.0, len(ours.spent), detail)


def against(bench: Bench, name: str, baseline: str) -> Measurement:
    """The routed grid beside another that was trained at least as long at its cost."""
    ours, other = side(bench, ROUTED, DiTRouting()), side(bench, name, trained_as(bench, name))
    detail = {
        "cost": {"dit_routing": float(ours.spent.mean()), baseline: float(other.spent.mean())},
        "operations": {"dit_routing": ours.flops, baseline: other.flops},
    }
    return Measurement(ours.accuracy, baseline, other.accuracy, len(ours.spent), detail)


@claim(
    "dit_routing",
    claim="It classifies better than a part of the grid that costs as much and was trained at least as long",
    metric=ACCURACY,
    expected="> 1",
)
def better_than_static(bench: Bench) -> Measurement:
    return against(bench, STATIC, "static_routing")


@claim(
    "dit_routing",
    claim="Learnt choices beat random ones of the same rates that the grid was trained with",
    metric=ACCURACY,
    expected="> 1",
)
def better_than_random(bench: Bench) -> Measurement:
    return against(bench, RANDOM, "random_routing")


@claim(
    "dit_routing",
    claim="At 0.4, 0.6, 0.8 and 1.0 costs of the diagonal its own weights answer more with gates than with lots",
    metric=f"{ACCURACY}, a mean over the budgets",
    expected="> 1",
)
def front(bench: Bench) -> Measurement:
    model, detail = grid(bench, ROUTED), {}
    for mu in FRONT:
        ours = side(bench, ROUTED, at(bench, mu))
        spent, own = float(ours.spent.mean()), rates(bench, at(bench, mu))
        lots = RandomRouting(Budget(fraction=grids.random_share(model, own, spent, bench.seed)), own, bench.seed)
        fixed = StaticRouting(Budget(fraction=spent / model.whole))
        others = {"random_routing": side(bench, ROUTED, lots), "static_routing": side(bench, ROUTED, fixed)}
        others["static_routing, as trained"] = side(bench, STATIC, fixed)
        detail[str(mu)] = {"dit_routing": (spent, ours.accuracy)} | {
            label: (float(one.spent.mean()), one.accuracy) for label, one in others.items()
        }
    means = {name: statistics.mean(point[name][1] for point in detail.values()) for name in next(iter(detail.values()))}
    count = len(scenes(bench)[1])
    detail = {"cost and accuracy": detail, "means": means}
    return Measurement(means["dit_routing"], "random_routing", means["random_routing"], count, detail)


@dataclass(frozen=True)
class Taken:
    """Of one scene, at each pixel: stages that its tokens take, `[row, size, size]`, and the number of the thing that
    is to be seen there, -1 for the ground."""

    stages: np.ndarray
    things: np.ndarray


def taken(bench: Bench) -> list[Taken]:
    """What the routed grid gives each pixel of the held-out scenes."""

    def make() -> list[Taken]:
        model, shown = grid(bench, ROUTED), scenes(bench)[2]
        size, rows = len(shown[0].labels), model.config.rows
        trace = side(bench, ROUTED, DiTRouting()).trace
        totals: list[Any] = [0] * rows
        for i, j in model.config.nodes():
            steps = [step.decision.layers[..., 0] for step in trace.at(f"{SITE}.{i}.{j}")]  # type: ignore[attr-defined]
            totals[i] = totals[i] + torch.cat(steps).float()
        maps = []
        for total in totals:
            wide = math.isqrt(total.shape[1])
            maps.append(
                total.view(-1, wide, wide).repeat_interleave(size // wide, 1).repeat_interleave(size // wide, 2)
            )
        stages = torch.stack(maps, 1).numpy()
        return [Taken(stages[n], one.labels_of_things()) for n, one in enumerate(shown)]

    return bench.shared("taken", make)


def paired(differences: list[float]) -> dict[str, float]:
    """Mean of differences and the one-sided p-value of its being above 0, by the normal law."""
    mean, spread = statistics.mean(differences), statistics.stdev(differences) / math.sqrt(len(differences))
    return {"mean": mean, "p": 0.5 * math.erfc(mean / max(spread, 1e-12) / math.sqrt(2))}


@claim(
    "dit_routing",
    claim="Tokens of a scene's largest thing are transformed in coarser rows than those of its smallest",
    metric="mean row of the stages taken, largest thing less smallest",
    expected="> 0",
    compare="value",
)
def large_things_go_down(bench: Bench) -> Measurement:
    differences = []
    for one in taken(bench):
        areas = {n: int((one.things == n).sum()) for n in np.unique(one.things) if n >= 0}
        if len(areas) < 2:
            continue
        means = []
        for thing in (max(areas, key=lambda n: areas[n]), min(areas, key=lambda n: areas[n])):
            each = one.stages[:, one.things == thing].sum(-1)
            means.append(float((each * np.arange(len(each))).sum() / max(each.sum(), 1e-9)))
        differences.append(means[0] - means[1])
    found = paired(differences)
    return Measurement(found["mean"], "no difference", 0.0, len(differences), found | {"asked for": "p < 0.01"})


@claim(
    "dit_routing",
    claim="The ground takes fewer stages than things do",
    metric="stages per pixel",
    expected="< 1",
)
def ground_is_cheap(bench: Bench) -> Measurement:
    ground, things = [], []
    for one in taken(bench):
        each = one.stages.sum(0)
        if (one.things < 0).any() and (one.things >= 0).any():
            ground.append(float(each[one.things < 0].mean()))
            things.append(float(each[one.things >= 0].mean()))
    found = paired([b - a for a, b in zip(ground, things, strict=True)])
    return Measurement(statistics.mean(ground), "things", statistics.mean(things), len(ground), found)


@claim(
    "dit_routing",
    claim="Scenes with more things get more operations",
    metric="rank correlation of things and cost",
    expected="> 0.3",
    compare="value",
)
def follows_the_scene(bench: Bench) -> Measurement:
    spent = side(bench, ROUTED, DiTRouting()).spent.tolist()
    things = [float(len(one.things)) for one in scenes(bench)[2]]
    return Measurement(spearman(things, spent), "no relation", 0.0, len(things))


@claim(
    "dit_routing",
    claim="The routed grid of the zoo takes less time than the whole one",
    metric="seconds for held-out scenes, 32 at a time",
    expected="< 1",
)
def saves_time(bench: Bench) -> Measurement:
    batches = scenes(bench)[0][:8]
    model, whole = grid(bench, ROUTED), grid(bench, WHOLE)
    with attach(model, DiTRouting()):
        works = {"routed": lambda: [model(x) for x in batches], "whole": lambda: [whole(x) for x in batches]}
        spent = pictures.seconds(works, 3 if bench.quick else 7)
    return Measurement(spent["routed"], "the whole grid", spent["whole"], 32 * len(batches))


@claim(
    "dit_routing",
    claim="At a PVTv2-B1's widths and 224 pixels, 80 % of the speed-up that the operations predict is time",
    metric="images per second",
    expected=">= 0.8",
)
def faster_at_size(bench: Bench) -> Measurement:
    """Gates are random, so that half of the tokens or so take each edge, everywhere in the image."""
    from transformers import PvtV2Config

    torch.manual_seed(bench.seed)
    sizes = {"hidden_sizes": (64, 128, 320, 512), "image_size": 224}
    base = PvtV2Config(**sizes, depths=(1, 1, 1, 1) if bench.quick else (2, 2, 2, 2))
    whole = GridClassifier(GridConfig(base, 4, ema=None, num_labels=1000)).eval()
    routed = GridClassifier(whole.config).eval()
    routed.load_state_dict(whole.state_dict())
    for gate in routed.modules():
        if isinstance(gate, Gate):
            gate.weight.data.normal_()
            gate.bias.data.zero_()
    pixels = torch.randn(2 if bench.quick else 4, 3, 224, 224)
    with attach(routed, DiTRouting()), torch.inference_mode():
        share = float(routed(pixels).spent.mean())
        flops = count_flops(lambda: routed(pixels)), count_flops(lambda: whole(pixels))
        spent = pictures.seconds({"routed": lambda: routed(pixels), "whole": lambda: whole(pixels)}, 3)
    predicted = flops[1] / flops[0]
    rates = {name: len(pixels) / value for name, value in spent.items()}
    detail = {"cost": share, "whole grid's cost": whole.whole, "images/s": rates, "predicted speed-up": predicted}
    return Measurement(rates["routed"], "as the operations say", rates["whole"] * predicted, len(pixels), detail)
