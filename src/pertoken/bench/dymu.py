"""Claims of DyMU: counts that follow the image and the budget, dynamic merging and unmerging apart, the compact
cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pertoken.bench import pictures
from pertoken.bench.claims import Bench, Measurement, claim
from pertoken.core.attach import attach
from pertoken.core.budget import Budget
from pertoken.reduce.compact import CompactLayer
from pertoken.reduce.dymu import DyMU
from pertoken.reduce.language import REPORT
from pertoken.reduce.thresholds import Thresholds, calibrate
from pertoken.reduce.tome import ToMe

SHARE = 0.4
HALF = Budget(fraction=SHARE)


def thresholds(bench: Bench) -> Thresholds:
    """Of the scenes' segmenter, from other scenes than those it is measured on."""
    model = pictures.segmenter(bench)
    return bench.shared("thresholds", lambda: calibrate(model, pictures.others(bench), fractions=(0.25, SHARE, 0.6)))


def found(bench: Bench, policy: Any) -> pictures.Seen:
    return bench.shared(("dymu", policy), lambda: pictures.seen(bench, pictures.segmenter(bench), policy))


@claim(
    "dymu",
    claim="On new scenes the mean number of merges is within 5 % of what was calibrated for",
    metric="deviation of the mean number of merges, as a share",
    expected="<= 0.05",
    compare="value",
)
def calibrated(bench: Bench) -> Measurement:
    detail = {}
    for share in (0.25, SHARE, 0.6):
        counts = torch.tensor(found(bench, DyMU(Budget(fraction=share), thresholds(bench))).counts).double() - 1
        merges = 64 - counts
        detail[str(share)] = {
            "merges": float(merges.mean()),
            "wanted": 64 * (1 - share),
            "deviation of counts": float(counts.std()),
        }
    worst = max(abs(one["merges"] / one["wanted"] - 1) for one in detail.values())
    return Measurement(worst, "as calibrated", 0.0, len(pictures.held(bench).things), detail)


@claim(
    "dymu",
    claim="Scenes with more things keep more tokens",
    metric="rank correlation of things and tokens",
    expected="> 0.6",
    compare="value",
)
def follows_the_scene(bench: Bench) -> Measurement:
    counts = found(bench, DyMU(HALF, thresholds(bench))).counts
    things = list(map(float, pictures.held(bench).things))
    return Measurement(pictures.spearman(things, list(map(float, counts))), "no relation", 0.0, len(things))


@claim(
    "dymu",
    claim="At equal mean tokens, counts that follow the scene label it better than ToMe's equal counts",
    metric="mean intersection over union, %",
    expected="> 1",
)
def dynamic_against_equal(bench: Bench) -> Measurement:
    ours = found(bench, DyMU(HALF, thresholds(bench)))
    mean = round(sum(ours.counts) / len(ours.counts)) - 1
    equal = found(bench, ToMe(Budget(tokens=mean)))
    detail = {"mean tokens": mean, "flops": {"dymu": ours.flops, "tome": equal.flops}}
    return Measurement(ours.miou, "tome", equal.miou, len(ours.counts), detail)


def writer(bench: Bench) -> tuple[Any, dict[str, Tensor]]:
    """A random LLaVA of CLIP's and Llama's kind and four prompts with an image each: 256 patches and 24 words."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    def make() -> tuple[Any, dict[str, Tensor]]:
        torch.manual_seed(bench.seed)
        vision = CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=5,
            num_attention_heads=4,
            image_size=64,
            patch_size=4,
        )
        text = LlamaConfig(
            vocab_size=512,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.15,
            eos_token_id=None,
            pad_token_id=0,
        )
        config: Any = LlavaConfig(vision_config=vision, text_config=text)
        config.image_token_id = 511
        model = LlavaForConditionalGeneration(config).eval()
        words = torch.randint(1, 511, (4, 24))
        ids = torch.cat([words[:, :4], torch.full((4, 256), 511), words[:, 4:]], 1)
        pixels = torch.cat([pictures.batch(pictures.HELD + i, 1, 64)[0] for i in range(4)])
        return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}

    return bench.shared("writer", make)


@claim(
    "dymu",
    claim="Both ways of computing virtual unmerging give the same logits",
    metric="largest difference relative to the largest logit",
    expected="<= 1e-5",
    compare="value",
)
def forms_agree(bench: Bench) -> Measurement:
    model, inputs = writer(bench)
    logits = []
    for unmerge in ("fast", "exact"):
        with torch.inference_mode(), attach(model, ToMe(HALF, unmerge=unmerge)):
            logits.append(model(**inputs).logits)
    gap = float((logits[0] - logits[1]).abs().max() / logits[0].abs().max())
    return Measurement(gap, "exact", 0.0, logits[0].numel())


@claim(
    "dymu",
    claim="The cache of a prompt with an image takes less memory than with a key and a value for every patch",
    metric="bytes of the cache",
    expected="<= 0.6",
)
def compact_cache(bench: Bench) -> Measurement:
    model, inputs = writer(bench)
    with torch.inference_mode():
        full = model(**inputs, use_cache=True).past_key_values
        with attach(model, ToMe(HALF)) as attached:
            ours = model(**inputs, use_cache=True).past_key_values
            report = attached.state[REPORT]
    expanded = sum(t.numel() * t.element_size() for layer in full.layers for t in (layer.keys, layer.values))
    held = sum(layer.bytes for layer in ours.layers if isinstance(layer, CompactLayer))
    return Measurement(held, "expanded", expanded, 4, {"tokens": report})


@claim(
    "dymu",
    claim="Virtual unmerging brings the text's next-token distribution nearer to that of the whole image",
    metric="nats of divergence from the dense model, random weights",
    expected="< 1",
)
def unmerging_is_nearer(bench: Bench) -> Measurement:
    model, inputs = writer(bench)
    text = inputs["input_ids"] != 511
    text[:, :4] = False
    distance = {}
    with torch.inference_mode():
        dense = model(**inputs).logits[text].log_softmax(-1)
        for unmerge in ("fast", None):
            with attach(model, ToMe(HALF, unmerge=unmerge)):
                ours = model(**inputs).logits[text].log_softmax(-1)
            distance[unmerge] = float((dense.exp() * (dense - ours)).sum(-1).mean())
    return Measurement(distance["fast"], "closed up", distance[None], int(text.sum()), {"weights": "random"})
