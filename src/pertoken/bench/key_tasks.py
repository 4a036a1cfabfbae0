"""What the claims about chosen keys share: contexts that are read once, questions behind them, and equal budgets.

A context of `zoo.recall` is read by dense attention, row by row. Each of its questions is then asked by itself, all of
a row as a batch on copies of its cache, token by token with a policy attached, so that policies differ in what the
question and its answer read and in nothing else. Three kinds cannot share all of that. H2O weighs the whole context
itself. SnapKV evicts when it has read the end of the context, and is asked then; with the question in hand it evicts
when it has read the end of the context and the question as one chunk, which serves that one question only. Policies
with compact positions read the context themselves.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.cache_utils import DynamicCache

from pertoken.attend.block_topk import BlockTopK
from pertoken.attend.h2o import H2O
from pertoken.attend.key_view import KeyView
from pertoken.attend.random_keys import RandomKeys
from pertoken.attend.sink_window import SinkWindow
from pertoken.attend.snapkv import SnapKV
from pertoken.attend.tokenselect import TokenSelect
from pertoken.bench.claims import Bench
from pertoken.core.attach import attach
from pertoken.core.budget import Budget
from pertoken.core.cost import timed
from pertoken.core.errors import BadRequest
from pertoken.core.policy import Policy, View
from pertoken.zoo import model_path, recall
from pertoken.zoo.star_graphs import cache_directory

MODEL, TASKS = "recall", recall.TASKS
SHARES = (4, 8, 16, 32)
SHORT, LONG = 8192, 32_768
ALL = Budget(tokens=2**40)  # not `Budget.full()`, with which H2O would weigh nothing

Made = Callable[[int, int], Policy]  # of keys in all, and a seed


def parts(keys: int) -> dict[str, Any]:
    """How `keys` in all are shared out, as the paper of TokenSelect does: 128 first, 512 last and 2048 chosen."""
    first, last = max(keys // 21, 1), max(4 * keys // 21, 1)
    return {"budget": Budget(tokens=keys - first - last), "sinks": first, "recent": last, "run": min(last, 512)}


SELECTING: dict[str, Made] = {
    "tokenselect": lambda keys, seed: TokenSelect(positions="original", **parts(keys)),
    "block_topk": lambda keys, seed: BlockTopK(**parts(keys)),
    "random_keys": lambda keys, seed: RandomKeys(seed=seed, **parts(keys)),
    "sink_window": lambda keys, seed: SinkWindow(Budget(tokens=0), sinks=4, recent=keys - 4),
}
EVICTING: dict[str, Made] = {
    "h2o": lambda keys, seed: H2O(Budget(tokens=keys)),
    "snapkv": lambda keys, seed: SnapKV(Budget(tokens=keys)),
}
IN_HAND = "snapkv, question in hand"
AT_EQUAL_KEYS = SELECTING | EVICTING


@dataclass
class Asked:
    """right: by task, `[row, question]`; mass: the share of dense attention that goes to the keys that were read, a
    mean over layers, heads and tokens, None where no keys are chosen."""

    right: dict[str, Tensor] = field(default_factory=dict)
    mass: float | None = None

    @property
    def accuracy(self) -> float:
        """Share of questions answered, the mean over tasks."""
        return mean(float(found.float().mean()) for found in self.right.values())

    @property
    def n(self) -> int:
        return sum(found.numel() for found in self.right.values())

    def told(self) -> dict[str, Any]:
        """For a claim's detail."""
        found = {task: round(float(one.float().mean()), 3) for task, one in self.right.items()}
        return found | ({} if self.mass is None else {"attention mass": round(self.mass, 4)})


@dataclass(frozen=True)
class Contexts:
    """ids `[row, token]` of the contexts; questions `[row, question, token]` with their answers; before: how many
    tokens of a question stand before its answer; caches: one per row, which has read it."""

    ids: Tensor
    questions: Tensor
    before: int
    caches: tuple[DynamicCache, ...]


def loaded(bench: Bench, name: str = MODEL, dtype: str = "fp32") -> tuple[Any, Any]:
    """A zoo model and its tokenizer."""

    def make() -> tuple[Any, Any]:
        from pertoken.models.load import load

        return load(f"zoo:{name}", dtype)

    return bench.shared(("recall model", name, dtype), make)


def rows_and_questions(bench: Bench, length: int) -> tuple[int, int]:
    """How many contexts, and questions in each."""
    if bench.quick:
        return 1, 4
    return (4, 16) if length <= 2 * SHORT else (2, 16)


def contexts(bench: Bench, task: str, length: int, policy: Policy | None = None) -> Contexts:
    """Contexts of about `length` tokens, read with a policy attached or by dense attention."""
    rows, questions = rows_and_questions(bench, length)

    def make() -> Contexts:
        model, tokenizer = loaded(bench)
        made = recall.recall(tokenizer)
        found = made.rows(task, length, rows, seed=bench.seed + 1, questions=questions)
        size = made.size(task)
        at = length - questions * size
        asked = found.ids[:, at:].reshape(rows, questions, size)
        before = int((found.question[0, at : at + size] < 0).sum())
        caches = []
        for row in range(rows):
            bench.status(f"{task}, {length} tokens: reading context {row + 1} of {rows}")
            with attach(model, policy) if policy is not None else nullcontext(), torch.inference_mode():
                out = model(input_ids=found.ids[row : row + 1, :at], use_cache=True, logits_to_keep=1)
            caches.append(out.past_key_values)
        return Contexts(found.ids[:, :at], asked, before, tuple(caches))

    return bench.shared(("contexts", task, length, policy), make)


def ask(
    bench: Bench,
    policy: Policy | None,
    length: int,
    tasks: tuple[str, ...] = TASKS,
    in_hand: bool = False,
) -> Asked:
    """All questions of contexts of a length, with a policy attached while they are asked; greedy, each token of an
    answer behind the right ones before it. in_hand: SnapKV evicts when it has read the question."""

    def make() -> Asked:
        found, masses = Asked(), []
        model = loaded(bench)[0]
        for task in tasks:
            about = contexts(bench, task, length, reading(policy))
            bench.status(f"{task}, {length} tokens: questions, {type(policy).__name__ if policy else 'dense'}")
            right = []
            for row, cache in enumerate(about.caches):
                with (
                    attach(model, policy) if policy is not None else nullcontext() as attached,
                    noted(attached) as seen,
                ):
                    copies = copied(cache, len(about.questions[row]))
                    right.append(answered(model, about, row, copies, policy, in_hand))
                masses += seen
            found.right[task] = torch.stack(right)
        found.mass = mean(masses) if masses else None
        return found

    return bench.shared(("asked", policy, length, tasks, in_hand), make)


def reading(policy: Policy | None) -> Policy | None:
    """With what a context is read before questions are asked with a policy."""
    if isinstance(policy, H2O):
        return H2O(ALL, recent=policy.recent)
    return policy if getattr(policy, "positions", "original") == "compact" else None


def copied(cache: DynamicCache, rows: int) -> DynamicCache:
    """A cache of one row, that many times."""
    found = copy.deepcopy(cache)
    found.batch_repeat_interleave(rows)
    return found


@torch.inference_mode()
def answered(
    model: Any, about: Contexts, row: int, cache: DynamicCache, policy: Policy | None, in_hand: bool = False
) -> Tensor:
    """`[question]` bool: which of a row's questions are answered, every token of the answer."""
    asked, before = about.questions[row], about.before
    steps = list(asked[:, : asked.shape[1] - 1].split(1, 1))
    if isinstance(policy, SnapKV):
        with_it = before if in_hand else 0
        cache.crop(with_it - policy.window)
        again = about.ids[row, with_it - policy.window :].expand(len(asked), -1)
        steps = [torch.cat([again, asked[:, :with_it]], 1), *steps[with_it:]]
    logits = []
    for ids in steps:
        out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits.append(out.logits[:, -1])
    guessed = torch.stack(logits[-(asked.shape[1] - before) :], 1).argmax(-1)
    return (guessed == asked[:, before:]).all(-1)


@dataclass
class Stepping:
    """One row's questions read one after another, one token per forward. seconds: of each step; right `[question]`."""

    seconds: list[float] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)
    attached: Any = None


def stepped(bench: Bench, sides: dict[str, Policy | None], task: str, length: int, row: int = 0) -> dict[str, Stepping]:
    """Each side on a copy of the model and of the cache of a context, all taking every step in turn."""
    about = contexts(bench, task, length)
    model, found, running = loaded(bench)[0], {}, {}
    with ExitStack() as stack:
        for side, policy in sides.items():
            own = copy.deepcopy(model)
            attached = stack.enter_context(attach(own, policy)) if policy is not None else None
            running[side] = own, copy.deepcopy(about.caches[row])
            found[side] = Stepping(attached=attached)
        for at, question in enumerate(about.questions[row]):
            bench.status(f"{task}, {length} tokens: steps, question {at + 1} of {len(about.questions[row])}")
            right = dict.fromkeys(sides, True)
            for place, token in enumerate(question):
                answers = about.before - 1 <= place < len(question) - 1
                for side, (own, cache) in running.items():
                    with timed() as cost, torch.inference_mode():
                        out = own(input_ids=token.view(1, 1), past_key_values=cache, use_cache=True)
                    found[side].seconds.append(cost.seconds)
                    if answers and int(out.logits[0, -1].argmax()) != int(question[place + 1]):
                        right[side] = False
            for side in sides:
                found[side].right.append(right[side])
    return found


@contextmanager
def noted(attached: Any) -> Iterator[list[float]]:
    """Within, the attention mass of every decision about keys is put on a list."""
    seen: list[float] = []
    if attached is None:
        yield seen
        return
    decide = attached.decide

    def watching(site: str, view: View) -> Any:
        decision = decide(site, view)
        if isinstance(view, KeyView):
            seen.append(float(mass(view, decision.index)[:, :, view.runs.real.any(-1).all(0)].mean()))
        return decision

    attached.decide = watching
    try:
        yield seen
    finally:
        del attached.decide


def mass(view: KeyView, index: Tensor) -> Tensor:
    """`[batch, heads, run]` share of dense attention, the mean over the queries of a run, that falls on the columns
    `index` `[batch, group, run, chosen]`, -1 for none; keys turned by their positions in the text."""
    runs, count = view.runs, view.keys.shape[2]
    everything = torch.arange(count, device=index.device).expand(len(index), 1, runs.count, -1)
    seen = runs.sight.reads(runs.slots, everything)[:, :, None]  # [batch, 1, 1, run, query, key]
    grouped = view.queries.float().unflatten(1, (view.keys.shape[1], -1))
    scores = view.scale * torch.einsum("bghrqd,bgkd->bghrqk", grouped, view.keys.float())
    law = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num()
    chosen = index.expand(-1, view.keys.shape[1], -1, -1)
    read = law.new_zeros(*chosen.shape[:3], count + 1)  # the last column takes what is none
    read.scatter_(-1, torch.where(chosen < 0, count, chosen), 1.0)
    kept = (law * read[:, :, None, :, None, :-1]).sum(-1).sum(-1)
    return (kept / runs.real.sum(-1).clamp(min=1)[:, None, None]).flatten(1, 2)


def kvpress(bench: Bench, length: int, requests: list[tuple[str, dict[str, float]]]) -> list[dict[str, float]]:
    """What presses of kvpress answer of the same questions, by task; see `kvpress_run`. Raises `BadRequest` where it is
    not installed beside the older transformers that it needs."""
    home = cache_directory() / "peers" / "kvpress"
    if not (home / "kvpress").is_dir():
        raise BadRequest(
            f"kvpress is not in {home}; put it there with pip install --no-deps --target {home} kvpress==0.5.5 "
            "transformers==5.2.0 tokenizers==0.22.1 huggingface_hub==1.4.0 datasets==4.4.1 and what these import"
        )
    script, path = Path(__file__).with_name("kvpress_run.py"), model_path(MODEL)
    found: list[dict[str, float]] = [{} for _ in requests]
    for task in TASKS:
        about = contexts(bench, task, length)
        bench.status(f"{task}, {length} tokens: kvpress")
        with TemporaryDirectory() as folder:
            told = {"ids": about.ids, "questions": about.questions, "before": torch.tensor([about.before])}
            save_file({name: x.contiguous() for name, x in told.items()}, f"{folder}/contexts.safetensors")
            ran = subprocess.run(
                [sys.executable, str(script), str(path), f"{folder}/contexts.safetensors"],
                input=json.dumps(requests),
                env=os.environ | {"PYTHONPATH": str(home)},
                capture_output=True,
                text=True,
                check=False,
            )
        if ran.returncode:
            raise RuntimeError(f"kvpress did not run: {ran.stderr.strip().splitlines()[-1:]}")
        for one, accuracy in zip(found, json.loads(ran.stdout), strict=True):
            one[task] = accuracy
    return found
