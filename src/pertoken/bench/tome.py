"""Claims of ToMe: what it does not change, what it saves at a ViT-B's size, what it keeps of a segmenter's quality."""

from __future__ import annotations

import copy

import torch

from pertoken.bench import pictures
from pertoken.bench.claims import Bench, Measurement, claim
from pertoken.core.attach import attach
from pertoken.core.budget import Budget
from pertoken.reduce.random_finalising import RandomFinalising
from pertoken.reduce.scheduled import Scheduled
from pertoken.reduce.tome import ToMe


@claim(
    "tome",
    claim="At r = 0 the encoder's outputs are those of the model without it, bit by bit",
    metric="share of outputs identical",
    expected="== 1",
)
def nothing_merged(bench: Bench) -> Measurement:
    model, pixels = pictures.vit_base(bench, 224)
    with torch.inference_mode():
        expected = model(pixels[:1]).last_hidden_state
        with attach(model, ToMe(r=0)):
            same = float((model(pixels[:1]).last_hidden_state == expected).float().mean())
    return Measurement(same, "dense", 1.0, 1)


def halves(layers: int, patches: int) -> ToMe:
    """ToMe at a rate at which a layer has half of its tokens, as a mean over the layers."""
    return ToMe(r=round(patches / layers))


def lengths(policy: Scheduled, patches: int, layers: int, halving: bool = True) -> list[float]:
    """Tokens of each layer, between what its attention sees and what its feed-forward block sees: by operations, a
    third is attention's."""
    found, now = [], patches
    for index in range(layers):
        after = max(policy.left(index, patches, layers), (now + 1) // 2 if halving else 0, 1)
        found.append(1 + now / 3 + 2 * after / 3)
        now = after
    return found


def sped_up(bench: Bench, size: int) -> Measurement:
    """Seconds dense against with ToMe, and what the tokens that are left cost by themselves."""
    model, pixels = pictures.vit_base(bench, size)
    patches, layers = (size // 16) ** 2, model.config.num_hidden_layers
    policy = halves(layers, patches)
    each = lengths(policy, patches, layers)
    merging = copy.deepcopy(model)
    works = {
        "dense": lambda: model(pixels),
        "tome": lambda: merging(pixels),
        "as many tokens": pictures.at_length(model, pixels, [round(n) for n in each]),
    }
    with attach(merging, policy):
        found = pictures.seconds(works, 3)
    share = sum(each) / len(each) / (1 + patches)
    detail = {
        "images/s": {name: len(pixels) / value for name, value in found.items()},
        "mean share of tokens": share,
        "layers": layers,
        "batch": len(pixels),
        "share of the predicted speed-up": found["as many tokens"] / found["tome"],
        "threads": torch.get_num_threads(),
    }
    return Measurement(len(pixels) / found["tome"], "dense", len(pixels) / found["dense"], len(pixels), detail)


@claim(
    "tome",
    claim="With half of the tokens in a layer on average, a ViT-B at 224 pixels encodes 1.8 times as many images",
    metric="images per second",
    expected=">= 1.8",
)
def faster_at_224(bench: Bench) -> Measurement:
    return sped_up(bench, 224)


@claim(
    "tome",
    claim="With half of the tokens in a layer on average, a ViT-B at 384 pixels encodes 1.8 times as many images",
    metric="images per second",
    expected=">= 1.8",
)
def faster_at_384(bench: Bench) -> Measurement:
    return sped_up(bench, 384)


@claim(
    "tome",
    claim="Matching and merging cost little: 85 % of the speed that so many tokens have by themselves is reached",
    metric="images per second at 224 pixels",
    expected=">= 0.85",
)
def little_overhead(bench: Bench) -> Measurement:
    found = sped_up(bench, 224)
    rates = found.detail["images/s"]
    return Measurement(found.value, "as many tokens, dense", rates["as many tokens"], found.n, found.detail)


@claim(
    "tome",
    claim="Sizes as a mask under fused attention are no slower than added to the scores of a softmax by hand",
    metric="images per second at 384 pixels",
    expected=">= 1",
)
def fused_is_no_slower(bench: Bench) -> Measurement:
    (fused, pixels), (by_hand, _) = (pictures.vit_base(bench, 384, attention) for attention in ("sdpa", "eager"))
    policy = halves(fused.config.num_hidden_layers, 576)
    with attach(fused, policy), attach(by_hand, policy):
        found = pictures.seconds({"fused": lambda: fused(pixels), "by hand": lambda: by_hand(pixels)}, 3)
    rates = {name: len(pixels) / value for name, value in found.items()}
    return Measurement(rates["fused"], "softmax by hand", rates["by hand"], len(pixels))


@claim(
    "tome",
    claim="Merged to half of its patches a segmenter labels scenes better than if random ones leave it early",
    metric="mean intersection over union, %",
    expected="> 1",
)
def better_than_random(bench: Bench) -> Measurement:
    model, half = pictures.segmenter(bench), Budget(fraction=0.5)
    merged = pictures.seen(bench, model, ToMe(half))
    random = pictures.seen(bench, model, RandomFinalising(half, seed=bench.seed))
    dense = pictures.seen(bench, model)
    detail = {"dense": dense.miou, "flops": {"dense": dense.flops, "tome": merged.flops, "random": random.flops}}
    return Measurement(merged.miou, "random_finalising", random.miou, len(merged.counts), detail)
