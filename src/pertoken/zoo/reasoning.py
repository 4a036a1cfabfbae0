"""Small reasoning problems made by program, with checkable answers: arithmetic of several digits, functions of lists.

A problem is one line, prompt and answer: `4821+937=5758`, `47*86=4042`, `sort 5 31 9=5 9 31`. The answer follows from
the prompt's text alone (`solve`), so that any answer can be checked. A sixteenth of all prompts, told by a hash of
their text, is held out: no seed of the training split gives one of them.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pertoken.core.errors import BadRequest
from pertoken.zoo.corpus import END_OF_TEXT

OPERATORS: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
}
FUNCTIONS: dict[str, Callable[[list[int]], list[int]]] = {
    "sort": sorted,
    "reverse": lambda items: items[::-1],
    "unique": lambda items: list(dict.fromkeys(items)),
    "evens": lambda items: [n for n in items if n % 2 == 0] or [0],
    "max": lambda items: [max(items)],
    "min": lambda items: [min(items)],
    "second": lambda items: [sorted(items)[-2]],
    "sum": lambda items: [sum(items)],
}
KINDS = (*OPERATORS, *FUNCTIONS)
SPLITS = ("train", "heldout")
HELD_OUT = 16  # one prompt in so many
LONGEST = 64  # more tokens than a problem has
EPOCH = 64  # batches that are made at once


@dataclass(frozen=True)
class Problem:
    """kind: one of `KINDS`; prompt: ends with "="; answer: ends with the end of the line."""

    kind: str
    prompt: str
    answer: str


def solve(prompt: str) -> str:
    """The answer to a prompt; raises `BadRequest` for a text that is none."""
    try:
        text, rest = prompt.split("=")
        if rest:
            raise ValueError("there is text behind the =")
        for sign, compute in OPERATORS.items():
            if sign in text:
                return f"{compute(*map(int, text.split(sign)))}\n"
        name, *items = text.split(" ")
        return " ".join(map(str, FUNCTIONS[name]([int(item) for item in items]))) + "\n"
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise BadRequest(
            f"{prompt!r} is no problem; write a number, one of {' '.join(OPERATORS)} and a number, or one of "
            f"{', '.join(FUNCTIONS)} and numbers with a space before each, and then ="
        ) from error


def right(prompt: str, answer: str) -> bool:
    """Whether the first line of an answer is the right one."""
    line, end, _ = answer.partition("\n")
    return line + end == solve(prompt)


def split_of(prompt: str) -> str:
    """Which split a prompt belongs to: "train" or "heldout"."""
    return SPLITS[zlib.crc32(prompt.encode()) % HELD_OUT == 0]


def problems(count: int, seed: int = 0, split: str = "train", kinds: Sequence[str] = KINDS) -> list[Problem]:
    """`count` problems of a split, of kinds in equal shares (products twice), in an order fixed by the seed."""
    unknown = sorted({*kinds} - {*KINDS})
    if split not in SPLITS or unknown or not kinds:
        raise BadRequest(
            f"split={split!r} and kinds={list(kinds)} are not all known; splits: {', '.join(SPLITS)}; kinds: "
            f"{', '.join(KINDS)}"
        )
    rng, found = random.Random(f"{seed} {split}"), []
    weights = [2 if kind == "*" else 1 for kind in kinds]
    while len(found) < count:
        kind = rng.choices(kinds, weights)[0]
        prompt = _prompt(kind, rng)
        if split_of(prompt) == split:
            found.append(Problem(kind, prompt, solve(prompt)))
    return found


def _prompt(kind: str, rng: random.Random) -> str:
    if kind in OPERATORS:
        digits = (2, 2) if kind == "*" else (rng.randint(2, 5), rng.randint(2, 5))
        numbers = sorted(
            (rng.randrange(10 ** (n - 1), 10**n) for n in digits), reverse=kind == "-" or rng.random() < 0.5
        )
        return f"{numbers[0]}{kind}{numbers[1]}="
    items = [rng.randrange(100) for _ in range(rng.randint(3, 6))]
    if kind == "unique":
        items = [rng.choice(items[:3]) for _ in range(rng.randint(4, 7))]
    return " ".join([kind, *map(str, items)]) + "="


def rows(count: int, length: int, tokenizer: Any, seed: int, split: str = "train") -> np.ndarray:
    """`[count, 2, length]`: problems one after the other, and 1 where the token belongs to an answer.

    What is left of a row behind the last problem that fits is end of text. tokenizer: one of `tokenizers`.
    """
    if length < LONGEST:
        raise BadRequest(f"rows of {length} tokens may hold no whole problem; give at least {LONGEST}")
    found = np.zeros((count, 2, length), dtype=np.uint16)
    found[:, 0] = tokenizer.token_to_id(END_OF_TEXT)
    row, place, batch = 0, 0, 0
    while row < count:
        made = problems(4096, seed_of(seed, batch), split)
        prompts = tokenizer.encode_batch([one.prompt for one in made], add_special_tokens=False)
        answers = tokenizer.encode_batch([one.answer for one in made], add_special_tokens=False)
        for prompt, answer in zip(prompts, answers, strict=True):
            ids = prompt.ids + answer.ids
            if place + len(ids) > length:
                row, place = row + 1, 0
                if row == count:
                    break
            found[row, 0, place : place + len(ids)] = ids
            found[row, 1, place + len(prompt.ids) : place + len(ids)] = 1
            place += len(ids)
        batch += 1
    return found


def batches(size: int, length: int, tokenizer: Any, seed: int, first: int = 0) -> Iterator[Tensor]:
    """Batches `[size, 2, length]` of `rows` without an end, from number `first` on."""
    epoch, begun = divmod(first, EPOCH)
    while True:
        made = rows(size * EPOCH, length, tokenizer, seed_of(seed, epoch))
        for number in range(begun, EPOCH):
            yield torch.from_numpy(made[number * size : (number + 1) * size].astype(np.int64))
        epoch, begun = epoch + 1, 0


def seed_of(*numbers: int) -> int:
    """One seed from several."""
    return zlib.crc32(repr(numbers).encode())
