"""Claims of R2R: where the large model is asked, against random places and against the small model's entropy.

The large model is zoo:code-target, the small one its distilled draft (zoo:code-draft). The router is trained here, on
answers to training prompts; a token is divergent if the large model, going on behind it, writes a line of another
structure (names and constants apart). Quality on held-out prompts: the share of lines that have the structure of the
large model's own.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from pertoken.bench import suite
from pertoken.bench.claims import Bench, Measurement, claim
from pertoken.decode.entropy_route import EntropyRoute
from pertoken.decode.r2r import R2R
from pertoken.decode.random_route import RandomRoute
from pertoken.decode.router import Router
from pertoken.decode.router_training import Lessons, lessons, other_structure, train_router
from pertoken.zoo import corpus

NEW = 40
LINES = "share of lines with the structure of the large model's, at an equal share of tokens asked for"


def taught(bench: Bench) -> Lessons:
    """Lessons from excerpts of training files."""

    def make() -> Lessons:
        models, rng = suite.pair(bench), random.Random(bench.seed)
        files = list(corpus.split_texts("train").values())
        prompts = []
        while len(prompts) < (16 if bench.quick else 64):
            lines = rng.choice(files).splitlines(keepends=True)
            at = rng.randrange(max(len(lines) - 12, 1))
            text = "".join(lines[at : at + 10])[:400]
            if text.strip():
                prompts.append(text)
        return lessons(models.target, models.draft, models.tokenizer, prompts, new=NEW, status=bench.status)

    return bench.shared("r2r lessons", make)


def router(bench: Bench) -> Router:
    small = suite.pair(bench).draft
    make = lambda: train_router(small, taught(bench), hidden=192, blocks=2, lr=1e-3, batch=256, epochs=30)  # noqa: E731
    return bench.shared("r2r router", make)


@dataclass(frozen=True)
class Side:
    """lines: share with the large model's structure; same: of its tokens in a row from the start; asked: share."""

    lines: float
    same: float
    asked: float


def wrote(bench: Bench, label: str, decoder: Any, batch: int = 16) -> tuple[list[list[int]], float]:
    """Outputs of a side on the held-out prompts, and the share of tokens that the large model chose."""

    def measure() -> tuple[list[list[int]], float]:
        models, found, asked, tokens = suite.pair(bench), [], 0, 0
        for part in suite.chunks(suite.texts(bench, 64, 12), batch):
            found += suite.generate(models.target, models.batch(part), NEW, decoder).tolist()
            if decoder is not None:
                asked, tokens = asked + decoder.stats.asked, tokens + decoder.stats.tokens
        return found, asked / tokens if tokens else 1.0

    return bench.shared(("r2r", label), measure)


def side(bench: Bench, label: str, decoder: Any) -> Side:
    """Compared with what the large model writes alone, line by line until the shorter text ends."""
    tokenizer, (large, _) = suite.pair(bench).tokenizer, wrote(bench, "large", None)
    mine, asked = wrote(bench, label, decoder)
    alike = total = same = 0
    for ours, theirs in zip(mine, large, strict=True):
        same += next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), NEW)
        lines = [tokenizer.decode(tokens).splitlines()[:-1] for tokens in (ours, theirs)]
        total += max(map(len, lines))
        alike += sum(not other_structure(a, b) for a, b in zip(*lines, strict=False))
    return Side(alike / max(total, 1), same / len(mine), asked)


def curves(bench: Bench) -> dict[str, list[Side]]:
    """Every router at several shares."""

    def measure() -> dict[str, list[Side]]:
        small, ours = suite.pair(bench).draft, router(bench)
        levels = (0.5, 0.8) if bench.quick else (0.2, 0.4, 0.6, 0.8)
        nats, rates = ((1.0, 2.0), (0.2, 0.5)) if bench.quick else ((0.6, 1.2, 2.0, 3.0), (0.1, 0.25, 0.45, 0.7))
        found = {"r2r": [side(bench, f"r2r {x}", R2R(small, router=ours, threshold=x)) for x in levels]}
        found["entropy_route"] = [side(bench, f"entropy {x}", EntropyRoute(small, threshold=x)) for x in nats]
        found["random_route"] = [side(bench, f"random {x}", RandomRoute(small, rate=x, seed=bench.seed)) for x in rates]
        ends = [side(bench, "small", R2R(small, threshold=1.1)), Side(1.0, float(NEW), 1.0)]
        return {name: sorted([*sides, *ends], key=lambda one: one.asked) for name, sides in found.items()}

    return bench.shared("r2r curves", measure)


def area(sides: list[Side]) -> float:
    """Mean quality over all shares of tokens asked for, straight lines between the points."""
    return sum((b.asked - a.asked) * (a.lines + b.lines) / 2 for a, b in pairwise(sides))


def against(bench: Bench, name: str) -> Measurement:
    found = curves(bench)
    detail = {label: [vars(one) for one in sides] for label, sides in found.items()}
    return Measurement(area(found["r2r"]), name, area(found[name]), len(suite.texts(bench, 64, 12)), detail)


@claim("r2r", claim="A trained router asks at better places than chance does", metric=LINES, expected="> 1", shown=True)
def beats_random(bench: Bench) -> Measurement:
    return against(bench, "random_route")


@claim(
    "r2r", claim="A trained router asks at better places than entropy does", metric=LINES, expected="> 1", shown=True
)
def beats_entropy(bench: Bench) -> Measurement:
    return against(bench, "entropy_route")


@claim(
    "r2r",
    claim="Most tokens are the large model's or differ without consequence: fewer than 30 % differ",
    metric="share of tokens in which the small model differs from the large one's answer",
    expected="< 0.3",
    compare="value",
)
def few_differ(bench: Bench) -> Measurement:
    found = taught(bench)
    differ, divergent = float(found.mismatch.float().mean()), float(found.divergent.float().mean())
    return Measurement(differ, "divergent", divergent, len(found.mismatch), {"divergent": divergent})


@claim(
    "r2r",
    claim="Fewer than half of the tokens that differ are divergent",
    metric="share of differing tokens behind which the line gets another structure",
    expected="< 0.5",
    compare="value",
)
def minority(bench: Bench) -> Measurement:
    found = taught(bench)
    share = float(found.divergent[found.mismatch].float().mean())
    return Measurement(share, "all that differ", 1.0, int(found.mismatch.sum()))


@claim(
    "r2r",
    claim="Asked for every token, the two models write what the large one writes alone, in ragged batches of 8",
    metric="share of prompts with identical ids",
    expected="== 1",
    compare="value",
)
def always(bench: Bench) -> Measurement:
    return suite.identical(bench, lambda models: R2R(models.draft, threshold=0.0), 8)


@claim(
    "r2r",
    claim="It activates less than two thirds of the large model's parameters per token where it finds 95 % of the "
    "divergent ones",
    metric="parameters activated per token",
    expected="< 0.667",
)
def parameters(bench: Bench) -> Measurement:
    models, ours = suite.pair(bench), router(bench)
    small, large = (sum(p.numel() for p in model.parameters()) for model in (models.draft, models.target))
    found = side(bench, "r2r own", R2R(models.draft, router=ours))
    detail = {"threshold": ours.threshold, **vars(found), "small": small, "large": large}
    return Measurement(
        small + found.asked * large, "all by the large model", large, len(suite.texts(bench, 64, 12)), detail
    )
