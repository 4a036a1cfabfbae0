"""Claims of Think-at-Hard: a model tuned to think again at hard tokens against the same model tuned as long with one
pass, and with two for all; its decider against chance and entropy; what the oracle's choice is worth; and what another
pass costs. `think_runs` says on which models and texts.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from pertoken.bench import suite
from pertoken.bench.claims import Bench, Measurement, claim
from pertoken.bench.think_runs import (
    USUAL,
    always,
    beside,
    by_chance,
    by_entropy,
    cost_of,
    deciding,
    judge,
    judged,
    learnt,
    made,
    never,
    once,
    oracle,
    ours,
    ran,
    reference,
    speed,
    sweep,
    text,
    told,
    untuned,
)
from pertoken.core.attach import attach
from pertoken.depth.deciders import ByChance
from pertoken.depth.passes import BOTH, OWN
from pertoken.depth.think_at_hard import ThinkAtHard
from pertoken.zoo import reasoning
from pertoken.zoo.thinking import Thinking

RIGHT = "share of the tokens of held-out answers that are right"


def against(bench: Bench, value: float, name: str, baseline: float) -> Measurement:
    return Measurement(value, name, baseline, int(text(bench).counted.sum()), beside(bench))


@claim(
    "think_at_hard",
    claim="It gets more tokens right than models tuned with one pass and with two, mixed to the same mean of passes",
    metric=RIGHT,
    expected="> 1",
    shown=True,
)
def beats_mixture(bench: Bench) -> Measurement:
    mine, one, two = ours(bench), once(bench), max(always(bench), always(bench, ""), key=lambda side: side.right)
    mixed = one.right + (mine.passes - 1) * (two.right - one.right)
    return against(bench, mine.right, "one pass and two, mixed", max(mixed, one.right))


@claim(
    "think_at_hard",
    claim="It gets more tokens right than a model tuned with two passes for all, at a fraction of the second passes",
    metric=RIGHT,
    expected="> 1",
)
def beats_always(bench: Bench) -> Measurement:
    return against(bench, ours(bench).right, "tuned with two passes", always(bench).right)


@claim(
    "think_at_hard",
    claim="It gets more tokens right than the same model tuned as long with a single pass",
    metric=RIGHT,
    expected="> 1",
    shown=True,
)
def beats_single_pass(bench: Bench) -> Measurement:
    return against(bench, ours(bench).right, "tuned with one pass", once(bench).right)


@claim(
    "think_at_hard",
    claim="The first pass alone of its model gets at least as many tokens right as the same model tuned with one pass",
    metric=RIGHT,
    expected=">= 1",
)
def first_pass(bench: Bench) -> Measurement:
    return against(bench, never(bench).right, "tuned with one pass", once(bench).right)


@claim(
    "think_at_hard",
    claim="It gets more tokens right than as many second passes at random places",
    metric=RIGHT,
    expected="> 1",
    shown=True,
)
def beats_random(bench: Bench) -> Measurement:
    return against(bench, ours(bench).right, "random", by_chance(bench).right)


@claim(
    "think_at_hard",
    claim="Its decider gets more tokens right than as many second passes where the entropy is highest",
    metric=RIGHT,
    expected="> 1",
)
def beats_entropy(bench: Bench) -> Measurement:
    return against(bench, ours(bench).right, "entropy", by_entropy(bench).right)


@claim(
    "think_at_hard",
    claim="The oracle's choice gets at least as many tokens right as models tuned with one pass and with two",
    metric=RIGHT,
    expected=">= 1",
)
def oracle_selects(bench: Bench) -> Measurement:
    best = max(never(bench), once(bench), always(bench), always(bench, ""), key=lambda side: side.right)
    return against(bench, oracle(bench).right, "best of one pass and two", best.right)


@claim(
    "think_at_hard",
    claim="It gets more hard tokens right than a model tuned with one pass that is told, too, what is wrong there",
    metric="share of the reference's wrong tokens that are right, the oracle choosing",
    expected="> 1",
)
def beats_second_choice(bench: Bench) -> Measurement:
    """The oracle tells that the reference's greedy token is wrong; the baseline uses that without another pass."""
    hard, wrong, single = text(bench).hard[text(bench).counted], untuned(bench).logits.argmax(-1), once(bench)
    other = single.logits.scatter(1, wrong[:, None], -torch.inf).argmax(-1) == single.truth
    value, baseline = (float(hits[hard].float().mean()) for hits in (oracle(bench).hits, other))
    return Measurement(value, "best guess but the wrong one", baseline, int(hard.sum()), beside(bench))


@claim(
    "think_at_hard",
    claim="Two passes for all tokens of its model break more than 0.5 % of them, while they mend others",
    metric="share of answer tokens that were right after one pass and are not after two",
    expected="> 0.005",
    compare="value",
)
def overthinking(bench: Bench) -> Measurement:
    one, two = never(bench), always(bench, "")
    broken = float((one.hits & ~two.hits).float().mean())
    mended = float((~one.hits & two.hits).float().mean())
    return Measurement(broken, "mended", mended, len(one.hits), beside(bench))


@claim(
    "think_at_hard",
    claim="A second pass for an easy token costs more right tokens than none for a hard one",
    metric="right tokens lost per token decided wrongly",
    expected="> 1",
)
def over_is_worse(bench: Bench) -> Measurement:
    one, two, best = never(bench), always(bench, ""), oracle(bench)
    hard = text(bench).hard[text(bench).counted]
    lost = float((one.hits & ~two.hits)[~hard].float().mean())
    missed = float((best.hits & ~one.hits)[hard].float().mean())
    return Measurement(lost, "hard tokens left alone", missed, len(one.hits), {"sweep": sweep(bench)})


@claim(
    "think_at_hard",
    claim="The best threshold of a sweep lets fewer than a quarter of the answers' tokens run again, and not none",
    metric="share of answer tokens that run again at the threshold with the most right tokens",
    expected="< 0.25",
    compare="value",
)
def few_is_best(bench: Bench) -> Measurement:
    found = sweep(bench)
    best = max(found.values(), key=lambda one: (one["right"], -one["answer tokens run again"]))
    value = best["answer tokens run again"] or 1.0  # none: the claim does not hold
    return Measurement(value, "all", 1.0, int(text(bench).counted.sum()), {"sweep": found})


@claim(
    "think_at_hard",
    claim="Its loss is below that of the same model tuned as long with a single pass",
    metric="nats per token of held-out answers",
    expected="< 1",
)
def lower_loss(bench: Bench) -> Measurement:
    return against(bench, ours(bench).nats, "tuned with one pass", once(bench).nats)


@claim(
    "think_at_hard",
    claim="The decider tells hard tokens from easy ones with an area under the curve above 0.75",
    metric="area under the ROC curve for tokens that the reference gets wrong",
    expected="> 0.75",
    compare="value",
)
def decider_area(bench: Bench) -> Measurement:
    found = judged(bench)
    return Measurement(found["decider"], "chance", 0.5, int(text(bench).counted.sum()), found)


@claim(
    "think_at_hard",
    claim="The decider tells hard tokens from easy ones better than the probability of the likeliest token does",
    metric="area under the ROC curve for tokens that the reference gets wrong",
    expected="> 1",
)
def decider_beats_confidence(bench: Bench) -> Measurement:
    found = judged(bench)
    return Measurement(found["decider"], "confidence", found["confidence"], int(text(bench).counted.sum()), found)


@claim(
    "think_at_hard",
    claim="Low-rank weights in the second pass get more tokens right than the model's own weights run twice",
    metric=RIGHT + ", the oracle choosing",
    expected="> 1",
)
def weights_help(bench: Bench) -> Measurement:
    bare = ran(bench, "oracle, bare", replace(made(bench), lora=None), told)
    return against(bench, oracle(bench).right, "no low-rank weights", bare.right)


@claim(
    "think_at_hard",
    claim="Keys of both passes get more tokens right than those of the own pass alone, for weights trained so",
    metric=RIGHT + ", the oracle choosing",
    expected="> 1",
)
def both_passes_are_seen(bench: Bench) -> Measurement:
    alone = ran(bench, "sees", learnt(bench, Thinking(sees=OWN)), told, sees=OWN)
    detail = {name: side.told(text(bench)) for name, side in ((BOTH, oracle(bench)), (OWN, alone))}
    return Measurement(oracle(bench).right, "own pass alone", alone.right, len(alone.hits), detail)


@claim(
    "think_at_hard",
    claim="Second passes of 7 % of the tokens take at most 10 % more operations",
    metric="operations of reading 8 rows of code",
    expected="<= 1.1",
)
def few_operations(bench: Bench) -> Measurement:
    dense, some, every = (cost_of(bench, decider) for decider in (None, ByChance(USUAL), ByChance(1.0)))
    return Measurement(some, "full", dense, 8, {"always": every / dense, "a trained decider's own": deciding(bench)})


for _batch, _bound in ((1, 0.8), (16, 0.7)):
    claim(
        "think_at_hard",
        claim=f"With second passes of 7 % of the tokens it is at least {_bound} times as fast, batch {_batch}",
        metric="tokens per second, 64 new tokens and reading 128 of prompt",
        expected=f">= {_bound}",
        shown=_batch == 1,
    )(partial(speed, batch=_batch))


@claim(
    "think_at_hard",
    claim="With a cache, in batches of 8, it writes what it writes without one and each row alone (fp32)",
    metric="share of held-out problems with identical answers",
    expected="== 1",
    compare="value",
)
def cached_exactly(bench: Bench) -> Measurement:
    one, tokenizer, same = made(bench), reference(bench)[1], 0
    prompts = [one.prompt for one in reasoning.problems(16 if bench.quick else 96, 10**6, "heldout")]
    policy = ThinkAtHard(decider=judge(bench), lora=one.lora)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": tokenizer("\n").input_ids}
    with attach(one.model, policy):
        for part in suite.chunks(prompts, 8):
            inputs = dict(tokenizer(part, return_tensors="pt", padding=True))
            width = inputs["input_ids"].shape[1]
            out = one.model.generate(**inputs, **options)[:, width:]
            for row, prompt in enumerate(part):
                ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
                own = one.model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=False, **options)
                alone = own[0, ids.shape[1] :]
                same += torch.equal(out[row, : len(alone)], alone)
    return Measurement(same / len(prompts), "generate without a cache", 1.0, len(prompts))
