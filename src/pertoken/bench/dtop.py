"""Claims of DToP: what it saves of a segmenter's work and costs of its quality, against random finalising."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from pertoken.bench import pictures
from pertoken.bench.claims import Bench, Measurement, claim
from pertoken.core.attach import attach
from pertoken.core.budget import Budget
from pertoken.core.estimates import spearman
from pertoken.reduce.dtop import DToP
from pertoken.reduce.random_finalising import RandomFinalising
from pertoken.zoo.scenes_models import SCENE_RECIPES

POLICY = DToP(threshold=SCENE_RECIPES[pictures.TUNED].threshold)


def found(bench: Bench, model: str, policy: DToP | RandomFinalising | None) -> pictures.Seen:
    """Of the zoo model of this name."""
    return bench.shared((model, policy), lambda: pictures.seen(bench, pictures.segmenter(bench, model), policy))


@claim(
    "dtop",
    claim="At a threshold of 1 the segmenter's outputs are those without it, bit by bit",
    metric="share of outputs identical",
    expected="== 1",
)
def nothing_finalised(bench: Bench) -> Measurement:
    model = pictures.segmenter(bench, pictures.TUNED)
    pixels = pictures.held(bench).batches[0][0]
    with torch.inference_mode():
        expected = model(pixels).logits
        with attach(model, DToP(threshold=1.0)):
            same = float((model(pixels).logits == expected).float().mean())
    return Measurement(same, "dense", 1.0, len(pixels))


@claim(
    "dtop",
    claim="A fifth of the operations is saved, auxiliary heads included",
    metric="operations per scene",
    expected="<= 0.8",
    shown=True,
)
def saves_operations(bench: Bench) -> Measurement:
    ours, dense = found(bench, pictures.TUNED, POLICY), found(bench, pictures.TUNED, None)
    count = len(ours.counts)
    detail = {"mean tokens at the last head": sum(ours.counts) / count - 1, "threshold": POLICY.threshold}
    return Measurement(ours.flops / count, "dense", dense.flops / count, count, detail)


@claim(
    "dtop",
    claim="Fine-tuned with it attached, the segmenter loses at most half a point against itself run densely",
    metric="points of mean intersection over union lost",
    expected="<= 0.5",
    compare="value",
)
def keeps_quality(bench: Bench) -> Measurement:
    ours, dense = found(bench, pictures.TUNED, POLICY), found(bench, pictures.TUNED, None)
    patches = ours.labels != dense.labels
    detail = {
        "miou": ours.miou,
        "dense": dense.miou,
        "share of pixels labelled otherwise": float(patches.float().mean()),
    }
    return Measurement(dense.miou - ours.miou, "dense", 0.0, len(ours.counts), detail)


@claim(
    "dtop",
    claim="It takes less time than the dense segmenter",
    metric="seconds for the held-out scenes, 32 at a time",
    expected="< 1",
)
def saves_time(bench: Bench) -> Measurement:
    model, batches = pictures.segmenter(bench, pictures.TUNED), pictures.held(bench).batches

    def work(policy: DToP | None) -> None:
        with nullcontext() if policy is None else attach(model, policy):
            for pixels, _ in batches:
                model(pixels)

    spent = pictures.seconds({"dtop": lambda: work(POLICY), "dense": lambda: work(None)}, 3 if bench.quick else 7)
    return Measurement(spent["dtop"], "dense", spent["dense"], 32 * len(batches))


@claim(
    "dtop",
    claim="Finalising what a head is sure of labels scenes better than finalising as many patches at random",
    metric="mean intersection over union, %",
    expected="> 1",
)
def better_than_random(bench: Bench) -> Measurement:
    ours = found(bench, pictures.TUNED, POLICY)
    left = max(round(sum(ours.counts) / len(ours.counts)) - 1, 1)
    random = found(bench, pictures.TUNED, RandomFinalising(Budget(tokens=left), seed=bench.seed))
    return Measurement(ours.miou, "random_finalising", random.miou, len(ours.counts), {"tokens left": left})


@claim(
    "dtop",
    claim="Applied without fine-tuning, it costs more than with it",
    metric="points of mean intersection over union lost",
    expected="> 1",
)
def fine_tuning_matters(bench: Bench) -> Measurement:
    lost = {}
    for name in (pictures.BASE, pictures.TUNED):
        lost[name] = found(bench, name, None).miou - found(bench, name, POLICY).miou
    return Measurement(lost[pictures.BASE], "fine-tuned", lost[pictures.TUNED], len(pictures.held(bench).things), lost)


@claim(
    "dtop",
    claim="Scenes with more things keep more patches to the end",
    metric="rank correlation of things and patches left",
    expected="> 0.5",
    compare="value",
)
def follows_the_scene(bench: Bench) -> Measurement:
    ours = found(bench, pictures.TUNED, POLICY)
    things = list(map(float, pictures.held(bench).things))
    return Measurement(spearman(things, list(map(float, ours.counts))), "no relation", 0.0, len(things))


@claim(
    "dtop",
    claim="Five tokens of each class kept as context are better than none",
    metric="mean intersection over union, %",
    expected="> 1",
)
def context_matters(bench: Bench) -> Measurement:
    ours = found(bench, pictures.TUNED, POLICY)
    none = found(bench, pictures.TUNED, DToP(threshold=POLICY.threshold, keep=0))
    return Measurement(ours.miou, "no context", none.miou, len(ours.counts))
