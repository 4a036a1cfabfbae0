"""What the claims of the denoising methods share: models, tasks, agreement, and cost at equal agreement.

A *task* is a list of held-out prompts with their originals, and a canvas. A decoder's output is compared with the
*reference*: the output with one commit per step and no cache. Costs are per row: `steps` are forwards that the row was
part of (NFE), `forwards` positions computed for it.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from pertoken.bench import suite
from pertoken.bench.answers import Quality, judge
from pertoken.bench.claims import Bench
from pertoken.bench.code_tasks import UNSEEN
from pertoken.denoise.loop import Denoise

MODEL, TWIN = "code-diffusion", "code-twin"
BLOCK = 32
LONGEST_PROMPT = 64  # tokens: with a canvas of 128 as long as the rows of training
COUNTS = ("steps", "row_steps", "token_forwards", "tokens", "seconds", "token_layers", "whole_layers")


@dataclass(frozen=True)
class Loaded:
    """A model and its tokenizer."""

    model: Any
    tokenizer: Any

    def batch(self, texts: Iterable[str]) -> dict[str, Tensor]:
        """Left-padded inputs."""
        return dict(self.tokenizer(list(texts), return_tensors="pt", padding=True))

    def length(self, text: str) -> int:
        """Tokens of the text itself."""
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def loaded(bench: Bench, dtype: str = "fp32", name: str = MODEL) -> Loaded:
    """A zoo model in a dtype: the diffusion model, or its autoregressive twin."""

    def make() -> Loaded:
        from pertoken.models.load import load

        return Loaded(*load(f"zoo:{name}", dtype))

    return bench.shared(("diffusion", name, dtype), make)


@dataclass(frozen=True)
class Task:
    """Prompts and originals, as many each, and the canvas in positions. tests: the originals are unit tests."""

    name: str
    prompts: tuple[str, ...]
    originals: tuple[str, ...]
    length: int
    tests: bool = False

    def on(self, length: int) -> Task:
        """The same prompts on another canvas."""
        return Task(self.name, self.prompts, self.originals, length, self.tests)


def functions(bench: Bench, length: int, full: int, quick: int) -> Task:
    """Signatures and docstrings of held-out functions, whose bodies are between a quarter and all of the canvas."""
    count = quick if bench.quick else full
    return bench.shared(("functions", length, count), lambda: _functions(loaded(bench), length, count))


def _functions(about: Loaded, length: int, count: int) -> Task:
    from pertoken.zoo import corpus
    from pertoken.zoo.functions import functions as functions_of

    pairs = list(dict.fromkeys(functions_of(list(corpus.split_texts("heldout").values()))))
    random.Random(0).shuffle(pairs)
    trained, found = list(corpus.split_texts("train").values()), []
    for prompt, body in pairs:
        own, needed = about.length(prompt), about.length(body)
        if own < LONGEST_PROMPT and length // 4 <= needed < length and not _copied(prompt, body, trained):
            found.append((prompt, body))
            if len(found) == count:
                break
    return _task(f"functions of {length // 4} to {length} tokens", found, length)


def _copied(prompt: str, body: str, trained: list[str]) -> bool:
    """Whether a function stands word for word in a training text."""
    from pertoken.zoo.functions import functions as functions_of

    line = max((prompt + body).splitlines(), key=lambda line: len(line.strip())).strip()
    return any((prompt, body) in functions_of([text]) for text in trained if line in text)


def unit_tests(bench: Bench, full: int, quick: int, length: int = 128) -> Task:
    """Python functions whose tests are to be written; all fit a canvas of 128."""
    count = quick if bench.quick else full
    return bench.shared(("unit tests", length, count), lambda: _unit_tests(loaded(bench), length, count))


def _unit_tests(about: Loaded, length: int, count: int) -> Task:
    from pertoken.zoo.unit_tests import unit_tests as made

    found = [pair for pair in dict.fromkeys(made(3 * count, UNSEEN, ("python",))) if about.length(pair[1]) < 128]
    return _task("unit tests", found[:count], length, tests=True)


def excerpts(bench: Bench, length: int, full: int, quick: int, whole: bool = False) -> Task:
    """Excerpts of held-out files to be gone on with, of about 64 tokens, or 128 if whole: no originals."""
    found = tuple(text if whole else _latter(text) for text in suite.texts(bench, full, quick))
    return Task(f"held-out code behind {128 if whole else 64} tokens", found, ("",) * len(found), length)


def _latter(text: str) -> str:
    """The second half of a text, from the start of a line."""
    return text[text.find("\n", len(text) // 2) + 1 :] or text


def _task(name: str, pairs: list[tuple[str, str]], length: int, tests: bool = False) -> Task:
    prompts, originals = zip(*pairs, strict=True)
    return Task(name, prompts, originals, length, tests)


@dataclass(frozen=True)
class Output:
    """What a decoder made of a task: ids `[row, position]`, filled with the end of text behind it, and counts summed
    over batches as in `denoise.loop.Stats`."""

    task: Task
    ids: Tensor
    texts: tuple[str, ...]
    calls: int
    row_steps: int
    token_forwards: int
    tokens: int
    seconds: float
    token_layers: int
    whole_layers: int
    depth: int

    @property
    def steps(self) -> float:
        """Forwards per row."""
        return self.row_steps / len(self.ids)

    @property
    def forwards(self) -> float:
        """Positions computed per row."""
        return self.token_forwards / len(self.ids)

    @property
    def quality(self) -> Quality:
        return judge(list(self.task.prompts), list(self.texts), list(self.task.originals), self.task.tests)


def decode(
    bench: Bench,
    task: Task,
    decoder: Any,
    dtype: str = "fp32",
    batch: int = 16,
    use: Loaded | None = None,
    **options: Any,
) -> Output:
    """The decoder's output on a task, made once per bench; use: another model than the zoo's."""
    about = use or loaded(bench, dtype)

    def make() -> Output:
        ids, sums = [], dict.fromkeys(COUNTS, 0)
        for part in suite.chunks(list(task.prompts), batch):
            ids.append(suite.generate(about.model, about.batch(part), task.length, decoder, **options))
            for name in sums:
                sums[name] += getattr(decoder.stats, name)
        found = torch.cat(ids)
        texts = tuple(about.tokenizer.batch_decode(found, skip_special_tokens=True))
        return Output(task, found, texts, sums.pop("steps"), depth=about.model.config.num_hidden_layers, **sums)

    return bench.shared(("decode", task, decoder, about, batch, *sorted(options.items())), make)


def reference(bench: Bench, task: Task, block: int | None = BLOCK, **more: Any) -> Output:
    """The output with one commit per step and no cache."""
    return decode(bench, task, Denoise(block=block), **more)


@dataclass(frozen=True)
class Agreement:
    """positions: share of equal positions up to the later of the two ends; rows: share of equal rows."""

    positions: float
    rows: float


def agreement(one: Tensor, other: Tensor, end: int | None = 0) -> Agreement:
    """How alike two outputs `[row, position]` are; both are filled with the end of text behind it."""
    same, counted = one == other, torch.ones_like(one, dtype=torch.bool)
    if end is not None:
        counted = torch.maximum(_until(one, end), _until(other, end)) > torch.arange(one.shape[1], device=one.device)
    return Agreement(float(same[counted].double().mean()), float(same.all(-1).double().mean()))


def _until(ids: Tensor, end: int) -> Tensor:
    """`[row, 1]` positions up to and with the first end of text."""
    ended = ids == end
    return torch.where(ended.any(-1), ended.int().argmax(-1) + 1, ids.shape[1])[:, None]


@dataclass(frozen=True)
class Point:
    """A setting's place in the plane of cost and agreement."""

    label: str
    steps: float
    forwards: float
    agreement: float
    identical: float

    @property
    def plain(self) -> list[Any]:
        """For a claim's detail: label, steps, forwards, agreement, identical."""
        return [self.label, *(round(v, 4) for v in (self.steps, self.forwards, self.agreement, self.identical))]


def points(
    bench: Bench, task: Task, decoders: Mapping[Any, Any], block: int | None = BLOCK, **more: Any
) -> list[Point]:
    """One point per decoder, measured against the reference."""
    wanted, found = reference(bench, task, block, **more), []
    for label, decoder in decoders.items():
        bench.status(f"{task.name}, canvas {task.length}: {label}")
        out = decode(bench, task, decoder, **more)
        alike = agreement(out.ids, wanted.ids)
        found.append(Point(str(label), out.steps, out.forwards, alike.positions, alike.rows))
    return found


def exact(bench: Bench, task: Task, **more: Any) -> Point:
    """The reference's own place."""
    wanted = reference(bench, task, **more)
    return Point("reference", wanted.steps, wanted.forwards, 1.0, 1.0)


Cost = Literal["steps", "forwards"]


def front(found: list[Point], cost: Cost = "steps") -> list[Point]:
    """The points that no other beats in both cost and agreement, cheapest first."""
    best: list[Point] = []
    for point in sorted(found, key=lambda p: (getattr(p, cost), -p.agreement)):
        if not best or point.agreement > best[-1].agreement:
            best.append(point)
    return best


def cost_at(found: list[Point], level: float, cost: Cost = "steps") -> float:
    """The least cost of agreement `level`: between two points of the front, that of a mixture of both (some rows with
    one setting, the rest with the other); infinite where no point reaches the level."""
    best = front(found, cost)
    if level <= best[0].agreement:
        return getattr(best[0], cost)
    for low, high in pairwise(best):
        if level <= high.agreement:
            share = (level - low.agreement) / (high.agreement - low.agreement)
            return getattr(low, cost) * (1 - share) + getattr(high, cost) * share
    return float("inf")


def agreement_at(found: list[Point], budget: float, cost: Cost = "steps") -> float:
    """The best agreement for at most this cost, by the same mixtures; minus infinity below the cheapest point."""
    best = front(found, cost)
    if budget >= getattr(best[-1], cost):
        return best[-1].agreement
    for low, high in reversed(list(pairwise(best))):
        if budget >= getattr(low, cost):
            share = (budget - getattr(low, cost)) / (getattr(high, cost) - getattr(low, cost))
            return low.agreement * (1 - share) + high.agreement * share
    return float("-inf")


def side(about: Loaded, name: str, decoder: Any, length: int, **options: Any) -> suite.Side:
    """A contender for `suite.race`: only tokens up to and with the first end of text count."""
    end = about.model.generation_config.eos_token_id

    def work(inputs: dict[str, Tensor]) -> Tensor:
        return counted(suite.generate(about.model, inputs, length, decoder, **options), end)

    return suite.Side(name, work)


def counted(ids: Tensor, end: int | None) -> Tensor:
    """The tokens of `[row, position]` up to and with each row's first end of text, in one line."""
    return ids if end is None else ids[torch.arange(ids.shape[1], device=ids.device) < _until(ids, end)]
