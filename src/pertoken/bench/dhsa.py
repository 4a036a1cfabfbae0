"""Claims of DHSA: what learnt chunk boundaries are worth, what the norm by length does, and how fast a prefill is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor

from pertoken.attend.boundaries import Boundaries
from pertoken.attend.boundary_training import TWICE, agreement, full_layers, lessons, train_boundaries
from pertoken.attend.dhsa import DHSA
from pertoken.attend.random_keys import RandomKeys
from pertoken.attend.selection import SITE
from pertoken.attend.sink_window import SinkWindow
from pertoken.attend.tokenselect import TokenSelect
from pertoken.bench import key_tasks
from pertoken.bench.claims import Bench, Measurement, claim
from pertoken.bench.key_exactness import TOKENS, exactness
from pertoken.bench.key_tasks import SHORT
from pertoken.core.attach import attach
from pertoken.core.budget import Budget
from pertoken.core.cost import timed
from pertoken.core.policy import Policy

TEXT = "code-target"
LENGTH = 512
RECENT: dict[str, Any] = {"sinks": 16, "recent": 16, "run": 64}
BUDGETS = (32, 64, 128)
BLOCKS = (8, 16, 32, 64)


def rows(bench: Bench, split: str, count: int) -> Tensor:
    """`[row, token]` of a split of the corpus, in files' order."""

    def make() -> Tensor:
        from pertoken.zoo import corpus

        tokenizer = key_tasks.loaded(bench, TEXT)[1]
        stream = corpus.token_stream(tokenizer.backend_tokenizer, list(corpus.split_texts(split).values()))
        whole = torch.from_numpy(stream[: len(stream) // LENGTH * LENGTH].astype("int64")).view(-1, LENGTH)
        return whole[torch.randperm(len(whole), generator=torch.Generator().manual_seed(bench.seed))]

    return bench.shared(("rows", split), make)[:count]


def heldout(bench: Bench) -> Tensor:
    return rows(bench, "heldout", 2 if bench.quick else 8)


def predictor(bench: Bench, layers: tuple[int, ...] | None = None) -> Boundaries:
    """Trained on files that the model was trained on."""

    def make() -> Boundaries:
        batches = list(rows(bench, "train", 12 if bench.quick else 128).split(2))
        tell = lambda step, loss: bench.status(f"boundaries, step {step}: loss {loss:.3f}")  # noqa: E731
        with torch.no_grad():
            return train_boundaries(
                key_tasks.loaded(bench, TEXT)[0], batches, layers=layers, lr=1e-3, seed=bench.seed, progress=tell
            )

    return bench.shared(("boundaries", layers), make)


@dataclass(frozen=True)
class Read:
    """mass: of attention that was kept; loss: nats per token; starts `[layer, row, token]`: where chunks begin, where
    that was predicted."""

    mass: float
    loss: float
    starts: Tensor | None = None


@torch.inference_mode()
def read(bench: Bench, policy: Policy | None) -> Read:
    """Held-out rows, with a policy attached."""

    def make() -> Read:
        bench.status(f"{LENGTH} tokens of code: {type(policy).__name__ if policy else 'dense'}")
        model, ids = key_tasks.loaded(bench, TEXT)[0], heldout(bench)
        if policy is None:
            return Read(1.0, float(model(ids, labels=ids).loss))
        with attach(model, policy) as attached, key_tasks.noted(attached) as seen:
            loss = float(model(ids, labels=ids).loss)
            states = [state for _, state in sorted(attached.state[SITE].items())]
        starts = torch.stack([state["starts"] for state in states]) if "starts" in states[0] else None
        return Read(mean(seen), loss, starts)

    return bench.shared(("read", policy, id(getattr(policy, "starts", None))), make)


def ours(bench: Bench, budget: int = 64, **settings: Any) -> DHSA:
    """With the threshold that the predictor was trained for: here no logit comes up to the paper's 1.1."""
    given: dict[str, Any] = {"theta": 0.0} | RECENT | settings
    return DHSA(Budget(tokens=budget), predictor=predictor(bench), **given)


def given(budget: int, starts: Tensor) -> DHSA:
    return DHSA(Budget(tokens=budget), starts=starts, **RECENT)


def blocks(budget: int) -> dict[str, Policy]:
    return {f"blocks of {size}": DHSA(Budget(tokens=budget), chunk=size, **RECENT) for size in BLOCKS}


def elsewhere(bench: Bench, starts: Tensor) -> Tensor:
    """As many boundaries in every row, at places drawn at random."""
    drawn = torch.rand(starts.shape, generator=torch.Generator().manual_seed(bench.seed))
    return drawn.argsort(-1).argsort(-1) < starts.sum(-1, keepdim=True)


def rivals(bench: Bench, budget: int) -> dict[str, Policy]:
    """Boundaries that nothing was learnt for, and those of the labels that the predictor learns."""

    def made() -> dict[str, Tensor]:
        model, tokenizer = key_tasks.loaded(bench, TEXT)
        ids, starts = heldout(bench), read(bench, ours(bench)).starts
        assert starts is not None
        text = tokenizer.convert_ids_to_tokens(ids.flatten().tolist())
        lines = torch.tensor(["Ċ" in token for token in text]).view(ids.shape)
        truth = torch.stack([ratio >= TWICE for _, ratio, _ in lessons(model, ids, predictor(bench).window)])
        return {"random boundaries": elsewhere(bench, starts), "lines": lines, "the labels": truth}

    found: dict[str, Policy] = {n: given(budget, starts) for n, starts in bench.shared("starts", made).items()}
    return found | blocks(budget)


@claim(
    "dhsa",
    claim="Where nothing is left out it is dense attention, a prefill in chunks is the whole, and a ragged batch is "
    "each row alone",
    metric="largest difference of logits over their largest size (three families, fp32)",
    expected="<= 1e-5",
    compare="value",
)
def exact(bench: Bench) -> Measurement:
    def made(model: Any, family: str) -> tuple[Policy, dict[str, Policy]]:
        net = Boundaries(model.config.num_key_value_heads * model.config.head_dim)
        policy = DHSA(Budget(tokens=8), sinks=2, recent=4, run=4, predictor=net, spacing=1, theta=-1.0)
        return policy, {"everything fits": replace(policy, budget=Budget(tokens=TOKENS))}

    return exactness(bench, ("llama", "qwen3", "gemma"), made)


def compared(bench: Bench, mine: Policy, others: Mapping[str, Policy], best: tuple[str, ...]) -> Measurement:
    """Attention mass that is kept, against the best of those named; all others are in the detail."""
    value = read(bench, mine)
    found = {name: read(bench, policy) for name, policy in others.items()}
    rival = max(best, key=lambda name: found[name].mass)
    told = {name: {"mass": one.mass, "nats per token": one.loss} for name, one in {"dhsa": value, **found}.items()}
    chunks = None if value.starts is None else float(value.starts.float().sum(-1).mean())
    detail = {"chunks per row of dhsa": chunks, "by boundaries": told}
    return Measurement(value.mass, rival, found[rival].mass, len(heldout(bench)), detail)


@claim(
    "dhsa",
    claim="Predicted chunks keep more attention mass than blocks of any size and than as many random boundaries",
    metric="share of attention mass kept (prefill of 512 tokens of code, 64 chosen)",
    expected="> 1",
    shown=True,
)
def chunks_above_blocks(bench: Bench) -> Measurement:
    others = rivals(bench, 64) | {"predicted, theta 1.1": ours(bench, theta=1.1)}
    named = tuple(name for name in others if name.startswith("blocks") or name == "random boundaries")
    return compared(bench, ours(bench), others, named)


@claim(
    "dhsa",
    claim="Predicted chunks keep more attention mass than the lines of the program",
    metric="share of attention mass kept (prefill of 512 tokens of code, 64 chosen)",
    expected="> 1",
)
def chunks_above_lines(bench: Bench) -> Measurement:
    return compared(bench, ours(bench), rivals(bench, 64), ("lines",))


@claim(
    "dhsa",
    claim="Chunks keep more attention mass than random keys, and than a window of as many",
    metric="share of attention mass kept (prefill of 512 tokens of code, 64 chosen)",
    expected="> 1",
)
def chunks_above_random(bench: Bench) -> Measurement:
    controls: dict[str, Policy] = {
        "random_keys": RandomKeys(Budget(tokens=64), seed=bench.seed, **RECENT),
        "sink_window": SinkWindow(Budget(tokens=64), **RECENT),
    }
    tokens = {"single tokens (tokenselect)": TokenSelect(Budget(tokens=64), positions="original", **RECENT)}
    return compared(bench, ours(bench), controls | tokens, tuple(controls))


@claim(
    "dhsa",
    claim="With chunks of unequal length, means times the root of the length keep more attention mass than plain means",
    metric="share of attention mass kept (prefill of 512 tokens of code, 64 chosen)",
    expected="> 1",
)
def norm_by_length(bench: Bench) -> Measurement:
    return compared(bench, ours(bench), {"plain means": ours(bench, scaled=False)}, ("plain means",))


@claim(
    "dhsa",
    claim="At every budget its chunks cost less loss than blocks do",
    metric="nats per token above dense attention (512 tokens of code; the mean over budgets of 32, 64 and 128)",
    expected="< 1",
)
def loss_between(bench: Bench) -> Measurement:
    dense, found = read(bench, None).loss, {}
    for budget in BUDGETS:
        policies: dict[str, Policy] = {"dhsa": ours(bench, budget), **blocks(budget)}
        found[budget] = {name: read(bench, policy).loss - dense for name, policy in policies.items()}
    rival = min(blocks(1), key=lambda name: mean(one[name] for one in found.values()))
    mine, theirs = (mean(one[name] for one in found.values()) for name in ("dhsa", rival))
    return Measurement(mine, rival, theirs, len(heldout(bench)), {"dense": dense, "above it by budget": found})


@claim(
    "dhsa",
    claim="The predictor finds the boundaries of held-out code far better than chance, and those of layers that it was "
    "not trained on",
    metric="F1 over that of as many random places (layers not trained on)",
    expected=">= 2",
)
def predictor_transfers(bench: Bench) -> Measurement:
    model = key_tasks.loaded(bench, TEXT)[0]
    layers = full_layers(model)
    half, other = tuple(layers[::2]), tuple(layers[1::2])
    batches = [heldout(bench)]
    theta = 0.0
    found = {
        "trained on all": agreement(predictor(bench), model, batches, theta),
        "trained on every other layer, these": agreement(predictor(bench, half), model, batches, theta, half),
        "trained on every other layer, the rest": agreement(predictor(bench, half), model, batches, theta, other),
    }
    rest = found["trained on every other layer, the rest"]
    return Measurement(rest["f1"], "random places", rest["chance"], len(batches[0]), found)


@claim(
    "dhsa",
    claim="Of 8k tokens that dense attention has read, it finds needles through 1k keys as dense attention does",
    metric="share of needles found",
    expected=">= 0.99",
)
def needle(bench: Bench) -> Measurement:
    length = 2048 if bench.quick else SHORT
    parts = key_tasks.parts(length // 8)
    dense = key_tasks.ask(bench, None, length, ("needles",))
    tokens = key_tasks.ask(bench, TokenSelect(positions="original", **parts), length, ("needles",))
    found = {
        f"blocks of {size}": key_tasks.ask(bench, DHSA(chunk=size, **parts), length, ("needles",)) for size in (8, 32)
    }
    mine = max(found.values(), key=lambda one: one.accuracy)
    told = {"tokenselect": tokens.told()} | {name: one.told() for name, one in found.items()}
    return Measurement(mine.accuracy, "dense", dense.accuracy, dense.n, told)


@torch.inference_mode()
def prefills(bench: Bench, sides: Mapping[str, Policy | None], length: int) -> dict[str, list[float]]:
    """Seconds of reading a context, sides in turn."""
    model = key_tasks.loaded(bench)[0]
    tokens = rows(bench, "train", 10**6).flatten()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(2 if bench.quick else 4):
        ids = tokens[turn * length : (turn + 1) * length][None]
        for name, policy in sides.items():
            bench.status(f"reading {length} tokens, turn {turn}: {name}")
            with timed() as cost:
                if policy is None:
                    model(input_ids=ids, use_cache=True, logits_to_keep=1)
                else:
                    with attach(model, policy):
                        model(input_ids=ids, use_cache=True, logits_to_keep=1)
            seconds[name].append(cost.seconds)
    return {name: found[1:] for name, found in seconds.items()}  # the first turn warms up


@claim(
    "dhsa",
    claim="It reads a prompt of 16k tokens at least 1.3 times as fast as dense SDPA",
    metric="seconds of dense SDPA per second (paper's budget of 2k keys, runs of 128)",
    expected=">= 1.3",
    shown=True,
)
def faster_prefill(bench: Bench) -> Measurement:
    length = 4096 if bench.quick else 2 * SHORT
    model, _ = key_tasks.loaded(bench)
    net = Boundaries(model.config.num_key_value_heads * model.config.head_dim)
    sides: dict[str, Policy | None] = {
        "dense": None,
        "dhsa": DHSA(run=128, predictor=net, theta=0.0, share=True),
        "boundaries in every layer": DHSA(run=128, predictor=net, theta=0.0),
        "blocks of 32": DHSA(run=128),
        "tokenselect": TokenSelect(positions="original"),
    }
    found = prefills(bench, sides, length)
    ratios = {name: median(a / b for a, b in zip(found["dense"], one, strict=True)) for name, one in found.items()}
    told = {"speed over dense": ratios, "seconds": found, "tokens": length}
    return Measurement(ratios["dhsa"], "dense", 1.0, len(found["dense"]), told)
