"""Claims of TokenSelect: exact where nothing is left out, what its vote finds, and when a decoding step is faster."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from statistics import mean, median
from typing import Any

import torch

from pertoken.attend.block_topk import BlockTopK
from pertoken.attend.kept import cache_bytes
from pertoken.attend.selection import SITE, device_bytes
from pertoken.attend.tokenselect import TokenSelect
from pertoken.bench import key_tasks
from pertoken.bench.claims import Bench, Measurement, claim
from pertoken.bench.key_exactness import TOKENS, exactness
from pertoken.bench.key_tasks import AT_EQUAL_KEYS, IN_HAND, LONG, SHARES, SHORT, Asked
from pertoken.bench.large_layers import LARGE, raced
from pertoken.core.attach import attach
from pertoken.core.budget import Budget
from pertoken.core.cost import timed
from pertoken.core.policy import Policy
from pertoken.models.growing import let_grow

THETAS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0)
NEVER = 2.0
LOUD = 10.0
PRESSES = ("SnapKVPress", "ExpectedAttentionPress", "TOVAPress")


def short(bench: Bench) -> int:
    return 2048 if bench.quick else SHORT


def ours(keys: int, **settings: Any) -> TokenSelect:
    """With `keys` in all, at the positions of the text; a new vote for every token unless told otherwise."""
    return TokenSelect(**{"positions": "original", "reuse": NEVER} | key_tasks.parts(keys) | settings)


@claim(
    "tokenselect",
    claim="Where nothing is left out it is dense attention, a prefill in chunks is the whole, and a ragged batch is "
    "each row alone",
    metric="largest difference of logits over their largest size (four families, fp32)",
    expected="<= 1e-5",
    compare="value",
)
def exact(bench: Bench) -> Measurement:
    def made(model: Any, family: str) -> tuple[Policy, dict[str, Policy]]:
        turned = "original" if family == "gpt2" else "compact"  # it has no rotary positions
        few = TokenSelect(Budget(tokens=8), sinks=2, recent=4, run=4, positions=turned)
        whole = {"everything fits": Budget(tokens=TOKENS), "all candidates": Budget(fraction=1.0)}
        return few, {name: replace(few, budget=budget) for name, budget in whole.items()}

    return exactness(bench, ("llama", "qwen3", "gemma", "gpt2"), made)


@contextmanager
def loud(model: Any) -> Iterator[None]:
    """Within, the queries of the first head of every layer are `LOUD` times as large."""
    dim = model.config.head_dim
    weights = [layer.self_attn.q_proj.weight for layer in model.model.layers]
    before = [weight[:dim].detach().clone() for weight in weights]
    with torch.no_grad():
        for weight in weights:
            weight[:dim] *= LOUD
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, was in zip(weights, before, strict=True):
                weight[:dim] = was


@torch.inference_mode()
def kept_mass(bench: Bench, policies: Mapping[str, Policy], length: int) -> dict[str, float]:
    """Attention mass that each policy keeps while a row's questions of every task are asked, the contexts read by the
    model as it is now."""
    model, found = key_tasks.loaded(bench)[0], {name: [] for name in policies}
    for task in key_tasks.TASKS:
        about = key_tasks.contexts(bench, task, length)
        out = model(input_ids=about.ids[:1], use_cache=True, logits_to_keep=1)
        for name, policy in policies.items():
            cache = key_tasks.copied(out.past_key_values, len(about.questions[0]))
            with attach(model, policy) as attached, key_tasks.noted(attached) as seen:
                key_tasks.answered(model, about, 0, cache, policy)
            found[name].append(mean(seen))
    return {name: mean(values) for name, values in found.items()}


@claim(
    "tokenselect",
    claim="Where heads have unequal norms the soft vote keeps more attention mass than the raw sum and the head vote",
    metric="share of attention mass kept (a 16th of 8k keys, one head's queries tenfold)",
    expected="> 1",
)
def soft_vote(bench: Bench) -> Measurement:
    length = short(bench)
    votes = {vote: ours(length // 16, vote=vote) for vote in ("soft", "sum", "head")}
    even = kept_mass(bench, votes, length)
    with loud(key_tasks.loaded(bench)[0]):
        found = kept_mass(bench, votes, length)
    rival = max(("sum", "head"), key=found.__getitem__)
    return Measurement(found["soft"], f"vote={rival!r}", found[rival], 3, {"one loud head": found, "as trained": even})


@claim(
    "tokenselect",
    claim="Single tokens keep more attention mass than pages of 16 or 64 tokens of as many keys",
    metric="share of attention mass kept (a 16th of 8k keys)",
    expected="> 1",
)
def tokens_above_pages(bench: Bench) -> Measurement:
    length = short(bench)
    given = key_tasks.parts(length // 16)
    policies: dict[str, Policy] = {"tokenselect": ours(length // 16)}
    for page in (16, 64):
        for summary in ("bound", "mean"):
            policies[f"pages of {page}, {summary}"] = BlockTopK(page=page, summary=summary, **given)
    found = kept_mass(bench, policies, length)
    rival = max(list(policies)[1:], key=found.__getitem__)
    return Measurement(found["tokenselect"], rival, found[rival], 3, found)


@claim(
    "tokenselect",
    claim="Matching query heads with the key heads that they attend to keeps more mass than the code's modulo",
    metric="share of attention mass kept (a 16th of 8k keys)",
    expected="> 1",
)
def right_groups(bench: Bench) -> Measurement:
    length = short(bench)
    found = kept_mass(bench, {groups: ours(length // 16, groups=groups) for groups in ("division", "modulo")}, length)
    return Measurement(found["division"], "groups='modulo'", found["modulo"], 3, found)


def at_equal_keys(bench: Bench, length: int, share: int, name: str) -> Asked:
    if name == IN_HAND:
        return key_tasks.ask(bench, AT_EQUAL_KEYS["snapkv"](length // share, bench.seed), length, in_hand=True)
    return key_tasks.ask(bench, AT_EQUAL_KEYS[name](length // share, bench.seed), length)


def against(bench: Bench, length: int, names: tuple[str, ...]) -> Measurement:
    """Questions answered, the mean over shares of the keys, against the best of the others."""
    dense, shares = key_tasks.ask(bench, None, length), (8,) if bench.quick else SHARES
    found = {share: {name: at_equal_keys(bench, length, share, name) for name in names} for share in shares}
    average = {name: mean(every[name].accuracy for every in found.values()) for name in names}
    rival = max(names[1:], key=average.__getitem__)
    told = {f"1/{share}": {name: one.told() for name, one in every.items()} for share, every in found.items()}
    return Measurement(average[names[0]], rival, average[rival], dense.n, {"dense": dense.told(), "keys kept": told})


@claim(
    "tokenselect",
    claim="With 1/4 to 1/32 of 8k keys it answers more recall questions than block top-k, a window, random keys, H2O "
    "and SnapKV",
    metric="share of questions answered (mean over 1/4, 1/8, 1/16, 1/32 of the keys)",
    expected="> 1",
    shown=True,
)
def recalls_at_8k(bench: Bench) -> Measurement:
    names = tuple(name for name in AT_EQUAL_KEYS if not (bench.quick and name == "h2o"))
    return against(bench, short(bench), names)


@claim(
    "tokenselect",
    claim="With 1/4 to 1/32 of 32k keys it answers more recall questions than block top-k, a window, random keys "
    "and SnapKV",
    metric="share of questions answered (mean over 1/4, 1/8, 1/16, 1/32 of the keys)",
    expected="> 1",
)
def recalls_at_32k(bench: Bench) -> Measurement:
    names = tuple(name for name in AT_EQUAL_KEYS if name != "h2o")  # it weighs 32k x 32k, longer than all the rest
    return against(bench, 4096 if bench.quick else LONG, names)


@claim(
    "tokenselect",
    claim="With 1/4 to 1/32 of 8k keys it answers more than SnapKV that evicts with the question in hand",
    metric="share of questions answered (mean over 1/4, 1/8, 1/16, 1/32 of the keys)",
    expected="> 1",
)
def against_a_known_question(bench: Bench) -> Measurement:
    return against(bench, short(bench), ("tokenselect", IN_HAND))


@claim(
    "tokenselect",
    claim="With 1/8 and 1/32 of 8k keys it answers more than presses of kvpress 0.5.5 that compress the context",
    metric="share of questions answered (mean over 1/8 and 1/32 of the keys)",
    expected="> 1",
)
def against_kvpress(bench: Bench) -> Measurement:
    length, shares = short(bench), (8, 32)
    mine = {share: at_equal_keys(bench, length, share, "tokenselect") for share in shares}
    names = [(press, share) for press in PRESSES for share in shares]
    requests = [(press, {"compression_ratio": 1 - 1 / share}) for press, share in names]
    found = dict(zip(names, key_tasks.kvpress(bench, length, requests), strict=True))
    average = {press: mean(mean(found[press, share].values()) for share in shares) for press in PRESSES}
    rival = max(PRESSES, key=average.__getitem__)
    told = {f"{press}, 1/{share}": one for (press, share), one in found.items()}
    told |= {f"tokenselect, 1/{share}": one.told() for share, one in mine.items()}
    value = mean(one.accuracy for one in mine.values())
    return Measurement(value, f"kvpress {rival}", average[rival], mine[8].n, told)


def by_theta(bench: Bench) -> dict[float, dict[str, float]]:
    """One row's questions in one sequence with every threshold, all stepping in turn."""

    def run() -> dict[float, dict[str, float]]:
        length = short(bench)
        thetas = (0.5, 0.9, NEVER) if bench.quick else (*THETAS, NEVER)
        sides: dict[str, Policy | None] = {str(theta): ours(length // 16, reuse=theta) for theta in thetas}
        found = {}
        tasks = {task: key_tasks.stepped(bench, sides, task, length) for task in key_tasks.TASKS}
        for theta in thetas:
            runs = [one[str(theta)] for one in tasks.values()]
            counts = [n for run in runs for n in run.attached.policy.reused(run.attached).values()]
            found[theta] = {
                "hit rate": sum(hits for hits, _ in counts) / max(sum(asked for _, asked in counts), 1),
                "answered": mean(float(right) for run in runs for right in run.right),
                "ms per step": 1000 * median(second for run in runs for second in run.seconds),
            }
        return found

    return bench.shared("tokenselect by theta", run)


@claim(
    "tokenselect",
    claim="Selections are used again less often the higher theta is",
    metric="rises of the hit rate from one theta to the next higher one",
    expected="== 0",
    compare="value",
)
def hits_fall(bench: Bench) -> Measurement:
    found = by_theta(bench)
    rates = [one["hit rate"] for one in found.values()]
    rises = sum(after > before for before, after in pairwise(rates))
    return Measurement(float(rises), "none", 0.0, len(rates), {"by theta (2: never again)": found})


@claim(
    "tokenselect",
    claim="At theta 0.9 it answers as many questions as with a new selection for every token",
    metric="share of questions answered (a 16th of 8k keys, one sequence of questions)",
    expected=">= 0.99",
)
def reuse_is_harmless(bench: Bench) -> Measurement:
    found = by_theta(bench)
    n = len(key_tasks.TASKS) * key_tasks.rows_and_questions(bench, short(bench))[1]
    return Measurement(
        found[0.9]["answered"], "a new selection always", found[NEVER]["answered"], n, {"by theta": found}
    )


@claim(
    "tokenselect",
    claim="Trained on rows of 2k tokens, the model answers more at 16k when it reads 2k keys at compact positions than "
    "when it reads everything",
    metric="share of questions answered",
    expected="> 1",
)
def extrapolates(bench: Bench) -> Measurement:
    length = short(bench) if bench.quick else 2 * SHORT
    dense = key_tasks.ask(bench, None, length)
    compact = key_tasks.ask(bench, ours(2048 if not bench.quick else 512, positions="compact"), length)
    original = key_tasks.ask(bench, ours(2048 if not bench.quick else 512), length)
    told = {"dense": dense.told(), "compact": compact.told(), "original positions": original.told()}
    return Measurement(compact.accuracy, "dense", dense.accuracy, dense.n, told)


@claim(
    "tokenselect",
    claim="With its keys in host memory a step keeps at most a tenth of dense attention's keys and values on the "
    "device, and answers as many questions",
    metric="bytes of keys and values on the device over those of dense attention (a 16th of 8k keys)",
    expected="<= 0.1",
    compare="value",
)
def offloaded(bench: Bench) -> Measurement:
    length = short(bench)
    model, about = key_tasks.loaded(bench)[0], key_tasks.contexts(bench, "needles", length)
    right, shares, fetched, asked = {False: 0, True: 0}, [], 0, about.questions.shape[1]
    for offload in right:
        policy = ours(length // 16, offload=offload)
        for question in range(asked):
            bench.status(f"{length} tokens, offload={offload}: question {question + 1} of {asked}")
            cache, one = copy.deepcopy(about.caches[0]), replace(about, questions=about.questions[:, [question]])
            with attach(model, policy) as attached:
                right[offload] += int(key_tasks.answered(model, one, 0, cache, policy).sum())
                if offload:
                    shares.append(device_bytes(cache, attached) / cache_bytes(cache))
                    fetched += sum(state["aside"].fetched for state in attached.state[SITE].values())
    steps = asked * (about.questions.shape[2] - 1) * model.config.num_hidden_layers
    told = {
        "answered": right[True] / asked,
        "answered with keys on the device": right[False] / asked,
        "keys read per step and layer": length // 16,
        "keys fetched per step and layer": fetched / steps,
    }
    value = max(shares) if right[True] == right[False] else float("nan")
    return Measurement(value, "dense", 1.0, asked, told)


@claim(
    "tokenselect",
    claim="With 32k keys in the cache a decoding step is at least 4 times as fast as dense SDPA, with the fewest keys "
    "that lose at most 1 % of the questions",
    metric="seconds of dense SDPA per second (batch 1, median over steps of the ratio)",
    expected=">= 4",
    shown=True,
)
def faster_step(bench: Bench) -> Measurement:
    length = 4096 if bench.quick else LONG
    dense = key_tasks.ask(bench, None, length).accuracy
    losses = {
        share: dense - key_tasks.ask(bench, AT_EQUAL_KEYS["tokenselect"](length // share, bench.seed), length).accuracy
        for share in SHARES
    }
    fine = [share for share in SHARES if losses[share] <= 0.01]
    keys = length // max(fine, default=min(SHARES))
    sides: dict[str, Policy | None] = {
        "dense": None,
        "tokenselect": TokenSelect(positions="original", **key_tasks.parts(keys)),
        "a new vote always": ours(keys),
        "block_topk": AT_EQUAL_KEYS["block_topk"](keys, bench.seed),
        "sink_window": AT_EQUAL_KEYS["sink_window"](keys, bench.seed),
    }
    found = key_tasks.stepped(bench, sides, "needles", length)
    grown = grown_dense(bench, length)
    ratios = {
        name: median(a / b for a, b in zip(found["dense"].seconds, one.seconds, strict=True))
        for name, one in found.items()
    }
    stated = {
        "loss by share of the keys": {f"1/{share}": round(loss, 4) for share, loss in losses.items()},
        "keys": keys,
        "speed over dense": ratios,
        "ms per step": {name: 1000 * median(one.seconds) for name, one in found.items()},
        "ms per step of dense attention with a cache that grows in place": 1000 * grown,
    }
    value = ratios["tokenselect"] if fine else float("nan")
    return Measurement(value, "dense", 1.0, len(found["dense"].seconds), stated)


@torch.inference_mode()
def grown_dense(bench: Bench, length: int) -> float:
    """Seconds per step of dense attention that is spared the copies of transformers' cache."""
    about = key_tasks.contexts(bench, "needles", length)
    model, cache = key_tasks.loaded(bench)[0], copy.deepcopy(about.caches[0])
    let_grow(cache)
    seconds = []
    for token in about.questions[0].flatten():
        with timed() as cost:
            model(input_ids=token.view(1, 1), past_key_values=cache, use_cache=True)
        seconds.append(cost.seconds)
    return median(seconds)


@claim(
    "tokenselect",
    claim="With 32k keys in the cache a decoding step of layers as in a model of a billion weights is at least 4 times "
    "as fast as dense SDPA, 1k keys read and a vote at every step",
    metric=f"seconds of dense SDPA per second ({LARGE})",
    expected=">= 4",
    shown=True,
)
def faster_large_step(bench: Bench) -> Measurement:
    length, keys = (4096 if bench.quick else LONG), 1024
    sides: dict[str, Policy | None] = {
        "dense": None,
        "tokenselect": ours(keys),
        "always used again": ours(keys, reuse=-1.0),
        "block_topk": AT_EQUAL_KEYS["block_topk"](keys, bench.seed),
        "sink_window": AT_EQUAL_KEYS["sink_window"](keys, bench.seed),
    }
    speeds, told = raced(bench, sides, length, 6 if bench.quick else 24)
    return Measurement(speeds["tokenselect"], "dense", 1.0, told["steps"], told)
