"""Claims of DyMU: counts that follow the image and the budget, dynamic merging and unmerging apart, the compact
cache, and answers of a trained model with merging and unmerging switched apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pertoken.bench import pictures
from pertoken.bench.claims import Bench, Measurement, claim
from pertoken.core.attach import attach
from pertoken.core.budget import Budget
from pertoken.core.estimates import spearman
from pertoken.reduce.compact import CompactLayer
from pertoken.reduce.dymu import DyMU
from pertoken.reduce.language import REPORT
from pertoken.reduce.random_pruning import RandomPruning
from pertoken.reduce.thresholds import Thresholds, calibrate
from pertoken.reduce.tome import ToMe
from pertoken.zoo import model_path, seeing
from pertoken.zoo.scenes_models import SCENE_RECIPES

ANSWERER = "scenes-answerer"
SHARE = 0.4
FEW = 0.15
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
    return Measurement(spearman(things, list(map(float, counts))), "no relation", 0.0, len(things))


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


def answerer(bench: Bench) -> tuple[Any, Thresholds]:
    """The zoo's model that answers questions about scenes, and thresholds for its encoder."""

    def make() -> tuple[Any, Thresholds]:
        from transformers import LlavaForConditionalGeneration

        model = LlavaForConditionalGeneration.from_pretrained(model_path(ANSWERER), dtype=torch.float32).eval()
        return model, calibrate(model, pictures.others(bench), fractions=(FEW, SHARE))

    return bench.shared("answerer", make)


def answers(bench: Bench, policy: Any = None) -> dict[str, float]:
    """Shares of right answers about held-out scenes, all and by kind of question, and mean tokens of the last 64."""
    model, _ = answerer(bench)
    count = 64 if bench.quick else 512

    def work() -> dict[str, float]:
        if policy is None:
            return {"tokens": 64.0, **seeing.quality(model, SCENE_RECIPES[ANSWERER], count)}
        with attach(model, policy) as attached:
            found = seeing.quality(model, SCENE_RECIPES[ANSWERER], count)
            kept = attached.state[REPORT]["kept"]  # of the last batch
        return {"tokens": sum(kept) / len(kept), **found}

    return bench.shared(("answers", policy), work)


def apart(bench: Bench, share: float) -> dict[str, dict[str, float]]:
    """Answers with ToMe's merging and DyMU's, each with virtual unmerging and without, and with neither."""
    _, known = answerer(bench)
    budget = Budget(fraction=share)
    found = {"dense": answers(bench)}
    for name, unmerge in (("unmerged", "fast"), ("closed up", None)):
        found[f"tome, {name}"] = answers(bench, ToMe(budget, unmerge=unmerge))
        found[f"dymu, {name}"] = answers(bench, DyMU(budget, known, unmerge=unmerge))
    return found | {"random_pruning": answers(bench, RandomPruning(budget))}


def mean(found: dict[str, dict[str, float]], *names: str) -> float:
    return sum(found[name]["all"] for name in names) / len(names)


def table(bench: Bench) -> dict[float, dict[str, dict[str, float]]]:
    return {share: apart(bench, share) for share in (FEW, SHARE)}


@claim(
    "dymu",
    claim="A trained model answers more with virtual unmerging than with the sequence closed up, whatever merged",
    metric="share of right answers at 15 % of the tokens, mean of ToMe's and DyMU's merging",
    expected="> 1",
)
def unmerging_answers(bench: Bench) -> Measurement:
    found = table(bench)
    value, closed = (mean(found[FEW], f"tome, {name}", f"dymu, {name}") for name in ("unmerged", "closed up"))
    return Measurement(value, "closed up", closed, 64 if bench.quick else 512, {"answers": found})


@claim(
    "dymu",
    claim="With unmerging on for both, dynamic merging answers about as much as ToMe's equal counts",
    metric="share of right answers, mean over 15 % and 40 % of the tokens",
    expected=">= 0.97",
)
def merging_answers(bench: Bench) -> Measurement:
    found = table(bench)
    dymu, tome = (sum(found[s][f"{name}, unmerged"]["all"] for s in found) / 2 for name in ("dymu", "tome"))
    return Measurement(dymu, "tome", tome, 64 if bench.quick else 512, {"answers": found})


@claim(
    "dymu",
    claim="At 40 % of the tokens, merged and unmerged, a trained model answers nearly as much as with all of them",
    metric="share of right answers",
    expected=">= 0.95",
)
def answers_like_dense(bench: Bench) -> Measurement:
    found = table(bench)[SHARE]
    value, dense = found["dymu, unmerged"]["all"], found["dense"]["all"]
    return Measurement(value, "dense", dense, 64 if bench.quick else 512, {"answers": found})


@claim(
    "dymu",
    claim="It answers more than with as many patches left by lot",
    metric="share of right answers at 15 % of the tokens",
    expected="> 1",
)
def answers_above_random(bench: Bench) -> Measurement:
    found = table(bench)[FEW]
    value, lot = found["dymu, unmerged"]["all"], found["random_pruning"]["all"]
    return Measurement(value, "random_pruning", lot, 64 if bench.quick else 512, {"answers": found})
