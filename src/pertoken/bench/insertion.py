"""What the claims of ILM measure: planning on star graphs, and infilling of code, by ILM and by its rivals.

The models of the star graphs are made when first asked for, a few minutes each on one core, and kept in the user's
cache (`zoo.star_graphs.trained`).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pertoken.bench import suite
from pertoken.bench.claims import Bench
from pertoken.bench.diffusion import TWIN, loaded
from pertoken.core.trace import Trace
from pertoken.denoise.ilm import ILM, INSERT
from pertoken.zoo.star_graphs import END, Graphs, StarGraphs, StarRecipe, trained

MODEL, MASKED = "code-insertion", "code-diffusion"
TASK = StarGraphs(degree=2, arms=(4, 6), names=14)
SIZE = {"width": 64, "layers": 4, "steps": 8000}
LONGEST = 8  # missing tokens
PREFIX, SUFFIX = 64, 32  # tokens of context
STOPS_AT = (0.2, 0.35, 0.5, 0.65, 0.8)  # P(stop) that are tried on training texts


def star_model(bench: Bench, kind: str) -> Any:
    def make() -> Any:
        tell = lambda step, loss: bench.status(f"star graphs, {kind}: step {step}, loss {loss:.3f}")  # noqa: E731
        return trained(StarRecipe(kind, TASK, **SIZE), progress=tell)

    return bench.shared(("star", kind), make)


def graphs(bench: Bench) -> Graphs:
    count = 200 if bench.quick else 1000
    return bench.shared("graphs", lambda: TASK.sample(count, torch.Generator().manual_seed(10**6 + bench.seed)))


@dataclass
class Solved:
    """exact: share of graphs whose whole path is right; edges: share of edges in their place; steps: forwards per
    graph; trace: of the insertions."""

    exact: float
    edges: float
    steps: float
    trace: Trace | None = field(default=None, repr=False)


def solve(bench: Bench, kind: str, decoder: Any = None) -> Solved:
    """What the model of a kind makes of all graphs, in one batch."""

    def make() -> Solved:
        bench.status(f"star graphs, {kind}: {decoder or 'generate'}")
        model, asked = star_model(bench, kind), graphs(bench)
        inputs, trace = asked.prompts, None
        width = inputs["input_ids"].shape[1] - (kind == "insertion")  # the gap marker leaves
        more: dict[str, Any] = {} if decoder is None else {"custom_generate": decoder}
        options = {"max_new_tokens": TASK.longest_answer + 1, "do_sample": False, "pad_token_id": END} | more
        if kind == "masked":
            options["max_new_tokens"] = TASK.longest_answer
        if isinstance(decoder, ILM):
            with decoder.record() as trace:
                out = model.generate(**inputs, **options)
        else:
            out = model.generate(**inputs, **options)
        found = [row[: row.index(END)] if END in row else row for row in out[:, width:].tolist()]
        exact = sum(one == other for one, other in zip(found, asked.answers, strict=True)) / len(found)
        steps = out.shape[1] - width if decoder is None else decoder.stats.row_steps / len(found)
        return Solved(exact, float(TASK.edges_right(asked, found).mean()), steps, trace)

    return bench.shared(("solve", kind, decoder), make)


def ranks(trace: Trace, rows: int) -> list[list[int]]:
    """Per row: at which step each token of the answer was inserted, in the order of the text."""
    lines: list[list[int]] = [[] for _ in range(rows)]
    starts = [0] * rows
    for number, step in enumerate(trace.at(INSERT)):
        for at, row in enumerate(step.rows):
            places = step.decision.keep[at].nonzero().flatten().tolist()  # type: ignore[attr-defined]
            if number == 0:
                starts[row] = int(step.decision.valid[at].nonzero()[0])  # the only gap
            for place in sorted(places, reverse=True):
                lines[row].insert(place - starts[row], number)
    return lines


@dataclass(frozen=True)
class Hole:
    """A held-out text with 1 to `LONGEST` missing tokens of one line."""

    before: tuple[int, ...]
    missing: tuple[int, ...]
    behind: tuple[int, ...]


def holes(bench: Bench, split: str = "heldout", count: int = 256) -> list[Hole]:
    def make() -> list[Hole]:
        from pertoken.zoo import corpus

        tokenizer, rng, found = loaded(bench, name=MODEL).tokenizer, random.Random(bench.seed), []
        texts = list(corpus.split_texts(split).values())
        while len(found) < (count // 8 if bench.quick else count):
            ids = tokenizer(rng.choice(texts), add_special_tokens=False)["input_ids"]
            length = rng.randint(1, LONGEST)
            start = rng.randint(PREFIX, max(len(ids) - SUFFIX - length, PREFIX))
            missing = ids[start : start + length]
            if len(ids) >= start + length + SUFFIX and "\n" not in tokenizer.decode(missing):
                parts = ids[start - PREFIX : start], missing, ids[start + length : start + length + SUFFIX]
                found.append(Hole(*map(tuple, parts)))
        return found

    return bench.shared(("holes", split, count), make)


@torch.inference_mode()
def completeness(bench: Bench, split: str, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of holes of which every other one lacks 1 to all of its tokens: P(stop) `[hole]`, the state of the first token
    `[hole, width]`, and whether nothing is missing."""
    about, rng, found = loaded(bench, name=MODEL), random.Random(bench.seed), []
    for number, hole in enumerate(holes(bench, split, count)):
        left = list(hole.missing)
        for _ in range(rng.randint(1, len(left)) if number % 2 else 0):
            del left[rng.randrange(len(left))]
        ids = torch.tensor([[END, *hole.before, about.tokenizer.mask_token_id, *left, *hole.behind]])
        out = about.model(ids, attention_mask=torch.ones_like(ids), use_cache=False, output_hidden_states=True)
        slots = out.logits[0, PREFIX + 1 : PREFIX + 2 + len(left), about.model.config.stop_token_id].float()
        found.append((slots.sigmoid().prod(), out.hidden_states[-1][0, 0].float()))
    chances, states = map(torch.stack, zip(*found, strict=True))
    return chances, states, torch.arange(len(chances)) % 2 == 0


Fills = list[tuple[int, ...]]


def inserted(bench: Bench, part: list[Hole], decoder: ILM) -> Fills:
    """What ILM puts into each hole, at most twice as many tokens as are ever missing."""
    about = loaded(bench, name=MODEL)
    ids = torch.tensor([[*hole.before, about.tokenizer.mask_token_id, *hole.behind] for hole in part])
    more: dict[str, Any] = {"do_sample": False, "pad_token_id": END, "custom_generate": decoder}
    out = about.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2 * LONGEST, **more)
    counts = (out != END).sum(-1) - PREFIX - SUFFIX  # no hole has an end of text around it
    return [tuple(row[PREFIX : PREFIX + n]) for row, n in zip(out.tolist(), counts.tolist(), strict=True)]


@torch.inference_mode()
def unmasked(bench: Bench, part: list[Hole], count: int) -> tuple[Fills, Tensor]:
    """What masked diffusion fills `count` places with, one per step, surest first; and the mean log-probability `[row]`
    of what it committed."""
    about = loaded(bench, name=MASKED)
    mask = about.model.config.mask_token_id
    ids = torch.tensor([[END, *hole.before, *[mask] * count, *hole.behind] for hole in part])
    places = torch.arange(PREFIX + 1, PREFIX + 1 + count)
    total, row = torch.zeros(len(part)), torch.arange(len(part))
    for _ in range(count):
        scores = about.model(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, places - 1].float()
        scores[..., mask] = -torch.inf
        sure, tokens = scores.log_softmax(-1).max(-1)
        best = sure.masked_fill(ids[:, places] != mask, -torch.inf).argmax(-1)
        ids[row, places[best]] = tokens[row, best]
        total += sure[row, best]
    return [tuple(found) for found in ids[:, places].tolist()], total / count


def guessed(bench: Bench, part: list[Hole]) -> Fills:
    """Masked diffusion with the number of places, 1 to `LONGEST`, at which it is surest of its tokens."""
    tried = [unmasked(bench, part, count) for count in range(1, LONGEST + 1)]
    best = torch.stack([sure for _, sure in tried]).argmax(0).tolist()
    return [tried[choice][0][row] for row, choice in enumerate(best)]


@torch.inference_mode()
def continued(bench: Bench, part: list[Hole]) -> Fills:
    """The left-to-right twin's greedy continuation, cut where what stands behind the hole is likeliest."""
    about = loaded(bench, name=TWIN)
    ids = torch.tensor([[END, *hole.before] for hole in part])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    new = suite.generate(about.model, inputs, LONGEST, eos_token_id=None)
    likely = []
    for count in range(1, LONGEST + 1):
        whole = torch.cat([ids, new[:, :count], torch.tensor([hole.behind for hole in part])], 1)
        scores = about.model(whole, attention_mask=torch.ones_like(whole), use_cache=False).logits.float()
        own = scores.log_softmax(-1)[:, ids.shape[1] - 1 : -1].gather(-1, whole[:, ids.shape[1] :, None])
        likely.append(own.sum((1, 2)))
    best = torch.stack(likely).argmax(0).tolist()
    return [tuple(row[: count + 1]) for row, count in zip(new.tolist(), best, strict=True)]


@dataclass(frozen=True)
class Filled:
    """right: share of holes filled as they were; length: share of holes filled with the right number of tokens."""

    right: float
    length: float


def fill(bench: Bench, name: str, filler: Callable[[Bench, list[Hole]], Fills]) -> Filled:
    def make() -> Filled:
        asked, found = holes(bench), []
        for start in range(0, len(asked), 32):
            bench.status(f"infilling, {name}: {start} of {len(asked)}")
            found += filler(bench, asked[start : start + 32])
        pairs = list(zip(asked, found, strict=True))
        return Filled(
            sum(hole.missing == got for hole, got in pairs) / len(pairs),
            sum(len(hole.missing) == len(got) for hole, got in pairs) / len(pairs),
        )

    return bench.shared(("fill", name), make)


def stops_at(bench: Bench) -> tuple[float, dict[float, float]]:
    """P(stop) at which most holes of training texts get their length, and that share for each that was tried."""

    def make() -> tuple[float, dict[float, float]]:
        asked, shares = holes(bench, "train", 128), {}
        for threshold in STOPS_AT:
            bench.status(f"infilling of training texts up to P(stop) = {threshold}")
            found = inserted(bench, asked, ILM(threshold, force_first=True))
            right = sum(len(hole.missing) == len(got) for hole, got in zip(asked, found, strict=True))
            shares[threshold] = right / len(asked)
        return max(shares, key=shares.__getitem__), shares

    return bench.shared("stops at", make)


def fillers(bench: Bench) -> dict[str, Filled]:
    """All contenders. The fixed guess is the mean number of missing tokens; the last one is told the number."""

    def told(bench: Bench, part: list[Hole]) -> Fills:
        tried = {count: unmasked(bench, part, count)[0] for count in {len(hole.missing) for hole in part}}
        return [tried[len(hole.missing)][row] for row, hole in enumerate(part)]

    threshold = stops_at(bench)[0]
    infill = ILM(threshold, force_first=True)
    contenders: dict[str, Callable[[Bench, list[Hole]], Fills]] = {
        "ilm": lambda bench, part: inserted(bench, part, infill),
        "random gaps": lambda bench, part: inserted(bench, part, ILM(threshold, "random", force_first=True)),
        "masked diffusion, own guess": guessed,
        f"masked diffusion, {LONGEST // 2} places": lambda bench, part: unmasked(bench, part, LONGEST // 2)[0],
        "left to right": continued,
        "masked diffusion, told": told,
    }
    return {name: fill(bench, name, filler) for name, filler in contenders.items()}
