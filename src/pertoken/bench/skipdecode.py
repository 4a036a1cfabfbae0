"""Claims of SkipDecode: its speed at the card's default, and what that costs, zero-shot and tuned to its schedule.

The tuned model is zoo:code-target with the low-rank weights of zoo:code-skip merged in. The controls' weights were
trained on the same text: zoo:code-skip-random with as many layers, the same random ones at every place, and
zoo:code-skip-full with all layers.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pertoken.bench import suite
from pertoken.bench.claims import Bench, Measurement, claim
from pertoken.core.budget import Budget
from pertoken.decode.lossless import lossless
from pertoken.depth.fixed_exit import FixedExit
from pertoken.depth.layers import LayerPolicy
from pertoken.depth.lora import Lora
from pertoken.depth.random_layers import RandomLayers
from pertoken.depth.skipdecode import SkipDecode
from pertoken.zoo import corpus
from pertoken.zoo.skipping import nats

NEW, PROMPT, SCORED = 192, 64, 128
NATS = "nats per token of held-out code after a prompt of 64 tokens"


def tuned(bench: Bench, name: str) -> Any:
    """A copy of the target with low-rank weights merged in."""

    def make() -> Any:
        model = copy.deepcopy(suite.pair(bench).target)
        Lora.load(f"zoo:{name}").merge(model)
        return model

    return bench.shared(("tuned", name), make)


def rows(bench: Bench) -> Tensor:
    """Windows of the held-out files, `[row, token]`."""

    def make() -> Tensor:
        texts = list(corpus.split_texts("heldout").values())
        stream = corpus.token_stream(suite.pair(bench).tokenizer.backend_tokenizer, texts)
        windows = corpus.windows(stream, PROMPT + SCORED - 1, 0, bench.seed)[: 8 if bench.quick else 24]
        return torch.from_numpy(windows.astype(np.int64))

    return bench.shared("held-out rows", make)


SCHEDULE = SkipDecode(reference=SCORED, anchor="sequence", prompt=PROMPT)
RANDOM = RandomLayers(SCHEDULE.budget, seed=0)


def loss(bench: Bench, label: str, policy: Any, name: str | None = None) -> float:
    """Mean loss of a side; name: of the low-rank weights merged in."""

    def measure() -> float:
        model = suite.pair(bench).target if name is None else tuned(bench, name)
        return float(nats(model, policy, rows(bench), PROMPT).mean())

    return bench.shared(("loss", label, name), measure)


def losses(bench: Bench) -> dict[str, float]:
    """Every side, so that each claim shows the others beside it."""
    return {
        "all layers, tuned": loss(bench, "dense", None, "code-skip-full"),
        "all layers, not tuned": loss(bench, "dense", None),
        "skipdecode, tuned": loss(bench, "skipdecode", SCHEDULE, "code-skip"),
        "skipdecode, not tuned": loss(bench, "skipdecode", SCHEDULE),
        "random layers, tuned": loss(bench, "random", RANDOM, "code-skip-random"),
        "random layers, not tuned": loss(bench, "random", RANDOM),
        "first layers, not tuned": loss(bench, "first", FixedExit(SCHEDULE.budget, prompt=True)),
        "schedule's weights, all layers": loss(bench, "dense", None, "code-skip"),
    }


def speed(bench: Bench, batch: int, policy: LayerPolicy, label: str) -> Measurement:
    """Tokens per second of generating with the policy, and without, in turn on the same prompts."""
    model = tuned(bench, "code-skip")
    trials, new = 2 if bench.quick else (3 if batch > 1 else 8), 96 if bench.quick else NEW
    plain, batches = partial(suite.generate, model, new=new), suite.batches(bench, batch, trials + 1)
    found = suite.race_attached(model, policy, plain, batches, (label, "generate"))
    spent = sum(layers_at(model, policy, step) for step in range(new - 1)) / (new - 1)
    layers = model.config.num_hidden_layers
    found.detail.update({"batch": batch, "new_tokens": new, "layers per generated token": spent, "of": layers})
    return found


def layers_at(model: Any, policy: LayerPolicy, step: int) -> int:
    """Layers of a generation step."""
    from pertoken.core.policy import View

    one = torch.ones(1, 1, dtype=torch.bool)
    view = View(one, model.config.num_hidden_layers, positions=torch.tensor([[step]]), prompt=torch.tensor([0]))
    return int(policy.decide(view).spent())


for _batch in (1, 16):
    claim(
        "skipdecode",
        claim=f"At its defaults it generates at least 1.6 times as fast as all layers do, batch {_batch}",
        metric=f"tokens per second, {NEW} new tokens and reading 128 of prompt",
        expected=">= 1.6",
        shown=_batch == 16,
    )(partial(speed, batch=_batch, policy=SkipDecode(), label="skipdecode"))


def against(bench: Bench, mine: str, other: str, baseline: str | None = None) -> Measurement:
    """The loss of one side over that of another, which is called `baseline`, with all others beside them."""
    found = losses(bench)
    return Measurement(found[mine], baseline or other, found[other], len(rows(bench)), found)


@claim(
    "skipdecode",
    claim="Half of the layers, tuned to the schedule, lose at most 10 % against all layers tuned on the same text",
    metric=NATS,
    expected="<= 1.1",
    shown=True,
)
def quality(bench: Bench) -> Measurement:
    return against(bench, "skipdecode, tuned", "all layers, tuned")


@claim(
    "skipdecode",
    claim="Tuned alike, its schedule predicts better than random layers of the same mean number",
    metric=NATS,
    expected="< 1",
)
def beats_random(bench: Bench) -> Measurement:
    return against(bench, "skipdecode, tuned", "random layers, tuned", "random_layers")


@claim(
    "skipdecode",
    claim="Not tuned to it, a model predicts worse under the schedule than one that is",
    metric=NATS,
    expected="> 1.05",
)
def needs_tuning(bench: Bench) -> Measurement:
    return against(bench, "skipdecode, not tuned", "skipdecode, tuned")


@claim(
    "skipdecode",
    claim="Not tuned, top layers with a warm-up predict better than as many first layers read by the head",
    metric=NATS,
    expected="< 1",
)
def beats_cut_top(bench: Bench) -> Measurement:
    return against(bench, "skipdecode, not tuned", "first layers, not tuned", "fixed_exit")


@claim(
    "skipdecode",
    claim="Later tokens are easier: of all layers, the loss of the last quarter of places is below that of the first",
    metric="nats per token",
    expected="< 1",
)
def premise(bench: Bench) -> Measurement:
    found = nats(suite.pair(bench).target, None, rows(bench), 1)
    quarters = [float(part.mean()) for part in found.chunk(4, 1)]
    return Measurement(quarters[-1], "first quarter", quarters[0], len(found), {"quarters": quarters})


def drafting(models: suite.Pair) -> Any:
    return lossless(SkipDecode(Budget(fraction=0.25)), size=4, economy=False)


@claim(
    "skipdecode",
    claim="As a drafter (`lossless`), greedy ids equal plain generation's in ragged batches of 8 (fp32)",
    metric="share of prompts with identical ids",
    expected="== 1",
    compare="value",
)
def drafts_exactly(bench: Bench) -> Measurement:
    return suite.identical(bench, drafting, 8)
