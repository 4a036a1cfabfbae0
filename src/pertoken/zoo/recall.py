"""Recall: rows in which a few tokens must be found again far behind, and how often a model finds them.

A row is `[end of text, context, questions]` of exactly `length` tokens. The context holds pairs of a key and a value
among filler; a question repeats a key as it was told, and its answer is the value.

| task | a pair, and a question with its answer | filler |
|---|---|---|
| `lines` | a line `word: word word` | Python text, where the pairs do not fill the context |
| `pairs` | two random tokens: multi-query associative recall (Zoology, arXiv 2312.04927) | other random tokens |
| `needles` | a line `MAGIC_word = 48` | Python text |

The tokens are those of the other code models. Their vocabulary of 4096 costs a good third of the weights, but a word is
one token, so a key can be matched whole and 32k tokens hold 100 kB of text. With bytes a key would be spelt, its match
would need layers of its own, and the rows of the same text would be three times as long.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from pertoken.core.errors import BadRequest
from pertoken.zoo import corpus

TASKS = ("lines", "pairs", "needles")
DIGITS = 2  # of a needle's number

Predict = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Rows:
    """Rows of one task and length.

    ids `[row, token]`; question `[row, token]`: the question whose answer the token belongs to, -1 if none; depth
    `[row, question]`: where the answer is told, from 0, first in the context, to 1, last in it; begins `[row, token]`:
    the tokens that begin a line, a pair or a question.
    """

    task: str
    ids: Tensor
    question: Tensor
    depth: Tensor
    begins: Tensor

    @property
    def answer(self) -> Tensor:
        """`[row, token]`: the tokens to be predicted."""
        return self.question >= 0


class Recall:
    """Makes rows; their text is from `stream`, in tokens of `tokenizer`."""

    def __init__(self, tokenizer: Tokenizer, stream: np.ndarray):
        vocabulary = {text: i for text, i in sorted(tokenizer.get_vocab().items()) if not text.startswith("<|")}
        self.end = tokenizer.encode(corpus.END_OF_TEXT).ids[0]
        self.tokens = np.array(list(vocabulary.values()))
        self.newlines = np.zeros(tokenizer.get_vocab_size(), dtype=bool)
        self.newlines[[i for text, i in vocabulary.items() if text.startswith("Ċ")]] = True
        self.stream = stream.astype(np.int64)
        self.lines = np.flatnonzero(self.newlines[self.stream])
        words = [text for text in vocabulary if re.fullmatch("Ġ?[a-z]{3,}", text)]
        encoded = [tokenizer.encode(f"\nMAGIC_{word}").ids for word in sorted({word.lstrip("Ġ") for word in words})]
        before = tokenizer.encode("\nMAGIC_").ids
        plain = np.array([vocabulary[word] for word in words if not word.startswith("Ġ")])
        spaced = np.array([vocabulary[word] for word in words if word.startswith("Ġ")])
        newline, colon, equals = (tokenizer.encode(text).ids for text in ("\n", ":", " ="))
        first = np.array([vocabulary[f"Ġ{digit}"] for digit in range(1, 10)])
        more = np.array([vocabulary[str(digit)] for digit in range(10)])
        self.form: dict[str, tuple[list[int], np.ndarray, list[int], list[np.ndarray]]] = {
            "lines": (newline, plain, colon, [spaced, spaced]),
            "pairs": ([], self.tokens, [], [self.tokens]),
            "needles": (
                before,
                np.array([ids[-1] for ids in encoded if ids[:-1] == before]),
                equals,
                [first, *(DIGITS - 1) * [more]],
            ),
        }  # before the key, keys, between key and value, what each token of a value is drawn from

    def size(self, task: str) -> int:
        """Tokens of a pair, and of a question with its answer."""
        before, _, between, values = self.form[task]
        return len(before) + 1 + len(between) + len(values)

    def most(self, task: str, length: int, questions: int) -> int:
        """The most pairs that rows with so many questions have place for; half of all tokens are keys of `pairs`."""
        keys = len(self.form[task][1]) // (2 if task == "pairs" else 1)
        return min(keys, (length - 1) // self.size(task) - questions)

    def rows(
        self,
        task: str,
        length: int,
        count: int,
        seed: int = 0,
        pairs: int | None = None,
        questions: int = 4,
        depth: float | None = None,
    ) -> Rows:
        """`count` rows fixed by `seed`. pairs: default 4 needles, and of the others as many as there is place for;
        depth: of the pairs that are asked for, default anywhere."""
        if task not in TASKS:
            raise BadRequest(f"task {task!r} is unknown; choose one of {', '.join(TASKS)}")
        most = self.most(task, length, questions)
        wanted = pairs if pairs is not None else min(max(4, questions), most) if task == "needles" else most
        if not 1 <= questions <= wanted <= most:
            raise BadRequest(
                f"{wanted} pairs and {questions} questions do not fit into {length} tokens of task {task!r}: at least "
                f"one question, at least as many pairs, and with {questions} questions at most {max(most, 0)} pairs"
            )
        if depth is not None and not 0 <= depth <= 1:
            raise BadRequest(f"depth={depth} is not in the context; give 0 (its first token) to 1 (its last)")
        rng = np.random.default_rng((seed, length, TASKS.index(task)))
        made = [self.row(task, length, wanted, questions, depth, rng) for _ in range(count)]
        return Rows(task, *(torch.from_numpy(np.stack(part)) for part in zip(*made, strict=True)))

    def row(
        self, task: str, length: int, pairs: int, questions: int, depth: float | None, rng: np.random.Generator
    ) -> tuple[np.ndarray, ...]:
        """ids, question, depth and begins of one row."""
        before, keys, between, values = self.form[task]
        size, valued = self.size(task), len(values)
        context = length - 1 - questions * size
        if task == "pairs":
            mixed = rng.permutation(keys)
            keys, fill = mixed[:pairs], rng.choice(mixed[pairs:], context - pairs * size)
            values, places = [mixed[pairs:]], np.arange(len(fill) + 1)
        else:
            start = int(self.lines[rng.integers(max(np.searchsorted(self.lines, len(self.stream) - context), 1))])
            fill = self.stream.take(np.arange(start, start + context - pairs * size), mode="wrap")
            places = np.append(np.flatnonzero(self.newlines[fill]), len(fill))
        told = np.empty((pairs, size), dtype=np.int64)
        told[:, : size - valued] = [*before, 0, *between]
        told[:, len(before)] = rng.choice(keys, pairs, replace=False)
        for column, drawn_from in enumerate(values, size - valued):
            told[:, column] = rng.choice(drawn_from, pairs)
        where = (rng.permutation(pairs) + rng.random(pairs)) / pairs
        asked = rng.choice(pairs, questions, replace=False)
        if depth is not None:
            where[asked] = depth
        order = np.argsort(where, kind="stable")
        wish = where[order] * len(fill)
        right = np.searchsorted(places, wish).clip(max=len(places) - 1)
        left = (right - 1).clip(0)
        place = np.where(wish - places[left] < places[right] - wish, places[left], places[right])
        begin = np.empty(pairs, dtype=np.int64)
        begin[order] = place + np.arange(pairs) * size
        ids = np.concatenate(
            [[self.end], np.insert(fill, np.repeat(place, size), told[order].ravel()), told[asked].ravel()]
        )
        question = np.full(length, -1)
        asking = question[1 + context :].reshape(questions, size)
        asking[:, size - valued :] = np.arange(questions)[:, None]
        begins = self.newlines[ids] if task != "pairs" else np.ones(length, dtype=bool)
        if task == "pairs":
            begins[1 + begin + 1] = False
        begins[1 + context :] = np.arange(questions * size) % size == 0
        return ids, question, begin[asked] / max(context - size, 1), begins


@cache
def _recall(tokenizer_json: str, split: str) -> Recall:
    tokenizer = Tokenizer.from_str(tokenizer_json)
    return Recall(tokenizer, corpus.token_stream(tokenizer, list(corpus.split_texts(split).values())))


def recall(tokenizer: Any, split: str = "heldout") -> Recall:
    """Rows with the text of a split of the corpus; tokenizer: of tokenizers or transformers."""
    return _recall(getattr(tokenizer, "backend_tokenizer", tokenizer).to_str(), split)


def forced(model: Any, batch: int = 1) -> Predict:
    """Greedy predictions of a causal model that reads each row at once. For one question they are right to the last
    token iff greedy decoding is; a later question sees the right answers of those before it."""

    def predict(ids: Tensor, positions: Tensor) -> Tensor:
        found = []
        for rows in ids.split(batch):
            logits = model(input_ids=rows, use_cache=False, logits_to_keep=positions.to(rows.device)).logits
            found.append(logits.argmax(-1))
        return torch.cat(found)

    return predict


def stepwise(model: Any, batch: int = 1) -> Predict:
    """As `forced`, but what comes before the first answer is read at once and the rest token by token with a cache: as
    a model answers, and what matters for policies that treat prompt and new tokens differently."""

    def predict(ids: Tensor, positions: Tensor) -> Tensor:
        first, found = int(positions.min()) + 1, []
        for rows in ids.split(batch):
            out = model(input_ids=rows[:, :first], use_cache=True, logits_to_keep=1)
            steps = [out.logits]
            for at in range(first, int(positions.max()) + 1):
                out = model(input_ids=rows[:, at : at + 1], past_key_values=out.past_key_values, use_cache=True)
                steps.append(out.logits)
            found.append(torch.cat(steps, 1)[:, positions.to(rows.device) + 1 - first].argmax(-1))
        return torch.cat(found)

    return predict


@torch.inference_mode()
def answered(predict: Predict, rows: Rows, device: str | torch.device = "cpu") -> Tensor:
    """`[row, question]`: whether all tokens of the answer are predicted. predict: ids `[row, token]`, positions
    `[position]` -> the token predicted to follow each of these `[row, position]`."""
    positions = rows.answer[:, 1:].any(0).nonzero().flatten()
    predicted = predict(rows.ids.to(device), positions).cpu()
    wrong = predicted != rows.ids[:, positions + 1]
    question = rows.question[:, positions + 1]
    count = rows.depth.shape[1]
    missed = torch.zeros(len(wrong), count + 1).scatter_add_(1, question.where(question >= 0, count), wrong.float())
    return missed[:, :count] == 0


def accuracies(
    predict: Predict,
    made: Recall,
    tasks: Iterable[str] = TASKS,
    lengths: Iterable[int] = (2048, 4096, 8192),
    rows: int = 8,
    seed: int = 1,
    device: str | torch.device = "cpu",
    **form: Any,
) -> list[dict[str, Any]]:
    """One record per task and length: the share of questions answered, and how many there were; form: of `rows`."""
    found = []
    for task in tasks:
        for length in lengths:
            right = answered(predict, made.rows(task, length, rows, seed, **form), device)
            found.append({"task": task, "length": length, "accuracy": float(right.float().mean()), "n": right.numel()})
    return found
