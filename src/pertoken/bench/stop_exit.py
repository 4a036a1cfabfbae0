"""Claims of Stop & Exit: tokens that leave by what their state tells, against a fixed layer and random ones at equal
layers; and what stopping saves.

The model is zoo:code-target, whose head reads every layer (it was trained with early-exit losses); the controller is
zoo:code-stop. Text is held-out code: windows of which the first 64 tokens are the prompt.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pertoken.bench import suite
from pertoken.bench.answers import likeness
from pertoken.bench.claims import Bench, Measurement, claim
from pertoken.bench.skipdecode import PROMPT, rows
from pertoken.core.attach import attach
from pertoken.core.budget import Budget
from pertoken.core.decision import Exit
from pertoken.core.trace import Trace
from pertoken.decode.lossless import lossless
from pertoken.depth.controller import Controller
from pertoken.depth.exits import ExitPolicy
from pertoken.depth.fixed_exit import FixedExit
from pertoken.depth.random_exit import RandomExit
from pertoken.depth.stop_exit import StopExit

COMPLETION = 16
RIGHT = "share of next tokens that are right, held-out code"


def controller(bench: Bench) -> Controller:
    return bench.shared("controller", lambda: Controller.load("zoo:code-stop"))


def forced(bench: Bench, label: str, policy: ExitPolicy | None) -> dict[str, Any]:
    """Teacher forcing: right `[row, place]` after the prompt, and how many layers each of these tokens ran."""

    def measure() -> dict[str, Any]:
        model, ids = suite.pair(bench).target, rows(bench)
        right, ran = [], []
        with torch.inference_mode():
            for part in ids.split(8):
                trace = Trace()
                if policy is None:
                    logits = model(part[:, :-1], use_cache=False).logits
                else:
                    with attach(model, policy, trace=trace):
                        logits = model(part[:, :-1], use_cache=False).logits
                right.append((logits.argmax(-1) == part[:, 1:])[:, PROMPT - 1 :])
                last = trace.steps[-1].decision if trace.steps else None
                everywhere = torch.full_like(part[:, 1:], model.config.num_hidden_layers)
                ran.append((last.left.abs() if isinstance(last, Exit) else everywhere)[:, PROMPT - 1 :])
        return {"right": torch.cat(right), "layers": torch.cat(ran)}

    return bench.shared(("forced", label), measure)


def accuracy(found: dict[str, Any]) -> float:
    return float(found["right"].float().mean())


def ours(bench: Bench, exit: float | None = 0.9, stop: float | None = None) -> dict[str, Any]:
    policy = StopExit(controller(bench), exit, stop, prompt=True)
    return forced(bench, f"stop_exit {exit} {stop}", policy)


def fixed_at(bench: Bench, mean: float) -> tuple[float, dict[int, float]]:
    """Accuracy of leaving at a fixed layer, on the line between the two whole numbers around the mean."""
    depth = suite.pair(bench).target.config.num_hidden_layers
    found = {}
    for ran in {min(int(mean), depth), min(int(mean) + 1, depth)}:
        policy = FixedExit(Budget(layers=ran), prompt=True) if ran < depth else None
        found[ran] = accuracy(forced(bench, f"fixed {ran}", policy))
    low = min(found)
    return found[low] + (mean - low) * (found[max(found)] - found[low]), found


@claim(
    "stop_exit",
    claim="Tokens that leave by what their state tells are more often right than tokens that all leave at one layer",
    metric=RIGHT + ", equal mean layers",
    expected="> 1",
    shown=True,
)
def beats_fixed(bench: Bench) -> Measurement:
    mine = ours(bench)
    mean = float(mine["layers"].float().mean())
    baseline, around = fixed_at(bench, mean)
    detail = {"mean layers": mean, "fixed exits": around, "all layers": accuracy(forced(bench, "dense", None))}
    return Measurement(accuracy(mine), "fixed_exit", baseline, mine["right"].numel(), detail)


@claim(
    "stop_exit",
    claim="Tokens that leave by what their state tells are more often right than as many that leave at random",
    metric=RIGHT + ", the same number leaving after each layer",
    expected="> 1",
    shown=True,
)
def beats_random(bench: Bench) -> Measurement:
    mine = ours(bench)
    depth = suite.pair(bench).target.config.num_hidden_layers
    shares = tuple((ran, float((mine["layers"] == ran).float().mean())) for ran in range(1, depth))
    other = forced(bench, "random", RandomExit(shares, bench.seed, prompt=True))
    detail = {
        name: float(side["layers"].float().mean()) for name, side in (("stop_exit", mine), ("random_exit", other))
    }
    return Measurement(accuracy(mine), "random_exit", accuracy(other), mine["right"].numel(), {"mean layers": detail})


def curve(bench: Bench) -> dict[float, dict[str, float]]:
    """Mean layers and accuracy by threshold, the quickest first."""
    grid = (0.5, 0.9, 0.99) if bench.quick else (0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
    return {
        level: {"layers": float(side["layers"].float().mean()), "right": accuracy(side)}
        for level in grid
        for side in [ours(bench, level)]
    }


@claim(
    "stop_exit",
    claim="At a loss of at most 2 % of the right tokens it saves at least 10 % of the layer calls",
    metric="layers per token",
    expected="<= 0.9",
)
def saves_layers(bench: Bench) -> Measurement:
    dense, depth = accuracy(forced(bench, "dense", None)), suite.pair(bench).target.config.num_hidden_layers
    found = curve(bench)
    good = [side["layers"] for side in found.values() if side["right"] >= 0.98 * dense]
    detail = {"all layers": dense, "curve": found}
    return Measurement(min(good, default=float(depth)), "all layers", depth, rows(bench).shape[0], detail)


@claim(
    "stop_exit",
    claim="The first layer's tokens are right more than 30 % of the time",
    metric=RIGHT,
    expected="> 0.3",
    compare="value",
)
def first_layer(bench: Bench) -> Measurement:
    found = {
        ran: accuracy(forced(bench, f"fixed {ran}", FixedExit(Budget(layers=ran), prompt=True))) for ran in (1, 3, 6)
    }
    baseline, detail = accuracy(forced(bench, "dense", None)), {"accuracy by layer": found}
    return Measurement(found[1], "all layers", baseline, rows(bench).shape[0], detail)


@claim(
    "stop_exit",
    claim="Where it would stop with probability 0.7, the full model is wrong more than 80 % of the time",
    metric="share of stopping places at which the model's token is wrong",
    expected="> 0.8",
    compare="value",
)
def stop_precision(bench: Bench) -> Measurement:
    def measure() -> Tensor:
        model, judge, found = suite.pair(bench).target, controller(bench), []
        with torch.inference_mode():
            for part in rows(bench).split(8):
                out = model(part[:, :-1], use_cache=False, output_hidden_states=True)
                chances = torch.stack([judge(out.hidden_states[ran]).softmax(-1) for ran in judge.layers])
                stops = ((chances.argmax(-1) == 0) & (chances[..., 0] > 0.7)).any(0)
                found.append(torch.stack([stops, out.logits.argmax(-1) != part[:, 1:]])[:, :, PROMPT - 1 :])
        return torch.cat(found, 1)

    stops, wrong = bench.shared("stop places", measure)
    base = float(wrong.float().mean())
    detail = {"places at which it would stop": float(stops.float().mean())}
    return Measurement(float(wrong[stops].float().mean()), "all places", base, int(stops.sum()), detail)


@dataclass(frozen=True)
class Completed:
    """Greedy completions of 16 tokens, one number per row: tokens written, how many of them before the first wrong one,
    and likeness to the text (0 to 1)."""

    tokens: Tensor
    right: Tensor
    likeness: Tensor

    def wasted(self, tokens: Tensor | None = None) -> float:
        """Mean number of tokens behind the first wrong one; tokens: had rows been cut there, broadcast to them."""
        cut = self.tokens if tokens is None else torch.minimum(tokens, self.tokens)
        return float((cut - self.right).clamp(min=0).mean())

    @property
    def right_of_kept(self) -> float:
        """Share that begins as the text does for 5 tokens, of those that were not stopped before."""
        kept = self.tokens >= 5
        return float((self.right[kept] >= 5).float().mean()) if kept.any() else 0.0

    def told(self) -> dict[str, float]:
        """For a claim's detail."""
        found = {"tokens": float(self.tokens.mean()), "wasted tokens": self.wasted()}
        return found | {"likeness": float(self.likeness.mean()), "right of kept": self.right_of_kept}


def completions(bench: Bench, label: str, policy: ExitPolicy | None) -> Completed:
    """Of all rows, with a policy attached or without."""

    def measure() -> Completed:
        models, model = suite.pair(bench), suite.pair(bench).target
        end, found = models.tokenizer.eos_token_id, []
        model.generation_config.eos_token_id = end
        for part in rows(bench).split(8):
            inputs = {"input_ids": part[:, :PROMPT], "attention_mask": torch.ones_like(part[:, :PROMPT])}
            with attach(model, policy) if policy is not None else nullcontext():
                out = suite.generate(model, inputs, COMPLETION)
            for row, truth in zip(out.tolist(), part[:, PROMPT : PROMPT + COMPLETION].tolist(), strict=True):
                wrote = row[: row.index(end)] if end in row else row
                same = next((i for i, (a, b) in enumerate(zip(wrote, truth, strict=False)) if a != b), len(wrote))
                texts = [models.tokenizer.decode(tokens) for tokens in (wrote, truth[: len(wrote)])]
                found.append((len(wrote), same, likeness(*texts)))
        model.generation_config.eos_token_id = None
        return Completed(*torch.tensor(found, dtype=torch.float32).unbind(1))

    return bench.shared(("completions", label), measure)


def stopping(bench: Bench) -> tuple[Completed, Completed]:
    policy = StopExit(controller(bench), exit=None, stop=0.7)
    return completions(bench, "stopping", policy), completions(bench, "plain", None)


@claim(
    "stop_exit",
    claim="Stopping saves at least 20 % of the tokens that are written behind a wrong one",
    metric="tokens written behind the first wrong one, of 16 per completion",
    expected="<= 0.8",
    shown=True,
)
def wasted(bench: Bench) -> Measurement:
    mine, plain = stopping(bench)
    detail = {"stop_exit": mine.told(), "full": plain.told()}
    return Measurement(mine.wasted(), "full", plain.wasted(), len(rows(bench)), detail)


@claim(
    "stop_exit",
    claim="It saves more of the tokens that are written behind a wrong one than stopping at the same lengths at random",
    metric="tokens written behind the first wrong one, of 16 per completion",
    expected="< 1",
    shown=True,
)
def wasted_beats_random(bench: Bench) -> Measurement:
    mine, plain = stopping(bench)
    control = plain.wasted(mine.tokens[:, None])  # the mean over every length on every row
    return Measurement(mine.wasted(), "the same lengths on random rows", control, len(rows(bench)))


@claim(
    "stop_exit",
    claim="Completions that it does not stop begin right more often than all completions do",
    metric="share of completions whose first five tokens are those of the text",
    expected="> 1",
)
def acceptance(bench: Bench) -> Measurement:
    mine, plain = stopping(bench)
    detail = {"stop_exit": mine.told(), "full": plain.told()}
    return Measurement(mine.right_of_kept, "full", plain.right_of_kept, len(rows(bench)), detail)


def speed(bench: Bench, batch: int) -> Measurement:
    """Tokens per second of generating with exits at the card's threshold, and without."""
    trials, new = 2 if bench.quick else (3 if batch > 1 else 8), 32 if bench.quick else 96
    model, policy = suite.pair(bench).target, StopExit(controller(bench), stop=None)
    plain, batches = partial(suite.generate, model, new=new), suite.batches(bench, batch, trials + 1)
    found = suite.race_attached(model, policy, plain, batches, ("stop_exit", "generate"), "exit 0.9")
    found.detail["layers per token, teacher-forced"] = float(ours(bench)["layers"].float().mean())
    return found


for _batch in (1, 16):
    claim(
        "stop_exit",
        claim=f"Exits at the card's threshold pay in wall clock, batch {_batch}",
        metric="tokens per second, 96 new tokens and reading 128 of prompt",
        expected="> 1",
    )(partial(speed, batch=_batch))


@claim(
    "stop_exit",
    claim="As a drafter (`lossless`), greedy ids equal plain generation's in ragged batches of 8 (fp32)",
    metric="share of prompts with identical ids",
    expected="== 1",
    compare="value",
)
def drafts_exactly(bench: Bench) -> Measurement:
    policy = StopExit(controller(bench), exit=0.6, stop=None)
    return suite.identical(bench, lambda models: lossless(policy, size=4, economy=False), 8)
