"""Texts of a comparison: prompts from files, tokens as pieces of text, and how much two outputs agree."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pertoken.core.decision import Commit
from pertoken.core.trace import Trace

ANSWERS = ("answer", "completion")


@dataclass(frozen=True)
class Example:
    """A prompt and, where there is one, a reference answer to it."""

    prompt: str
    answer: str | None = None


def read_prompts(path: Path) -> list[str]:
    """Prompts of a file, as `read_examples` reads it."""
    return [example.prompt for example in read_examples(path)]


def read_examples(path: Path) -> list[Example]:
    """Prompts of a file: one per line; for `*.tsv` with an answer behind a tab; for `*.jsonl` the "prompt" of each
    object, with its "answer" or "completion" if it has one. Empty lines are passed over.

    Raises `ValueError` for what is not so, for a file without a prompt, and where only some prompts have answers.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a directory; give a file of prompts: .txt, .tsv or .jsonl")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); give a text file"
        ) from error
    kept = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    found = [(number, _example(path, number, line)) for number, line in kept]
    if not found:
        raise ValueError(
            f"{path} holds no prompt; write one per line, or one JSON object with a prompt per line (.jsonl)"
        )
    if empty := [number for number, one in found if not one.prompt.strip()]:
        raise ValueError(f"{path} line {empty[0]} has an empty prompt; give it some text to go on from")
    without = [number for number, one in found if one.answer is None]
    if without and len(without) < len(found):
        raise ValueError(f"{path} line {without[0]} has no answer, others have; give all prompts answers, or none")
    return [one for _, one in found]


def _example(path: Path, number: int, line: str) -> Example:
    import json

    if path.suffix == ".tsv":
        prompt, tab, answer = line.partition("\t")
        return Example(prompt, answer if tab else None)
    if path.suffix != ".jsonl":
        return Example(line)
    try:
        told = json.loads(line)
        answer = next((told[name] for name in ANSWERS if name in told), None)
        if not isinstance(told["prompt"], str) or not isinstance(answer, (str, type(None))):
            raise TypeError("prompt and answer must be texts")
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f'{path} line {number} is not an object with a "prompt": {line[:60]!r}') from error
    return Example(told["prompt"], answer)


def agreement(rows: list[list[int]], others: list[list[int]]) -> float:
    """Share of positions with the same token; a position that only one side has counts as different."""
    pairs = list(zip(rows, others, strict=True))
    positions = sum(max(len(row), len(other)) for row, other in pairs)
    same = sum(a == b for row, other in pairs for a, b in zip(row, other, strict=False))
    return same / positions if positions else 1.0


def texts(trace: Trace, tokenizer: Any, batch: dict[str, Tensor], outputs: list[list[int]]) -> dict[str, Any]:
    """What a reader needs to draw a trace: prompts and outputs in pieces, and the text of every token guessed."""
    masks, prompts = batch["attention_mask"].bool(), batch["input_ids"]
    rows = [
        {"prompt": pieces(tokenizer, ids[mask].tolist()), "output": pieces(tokenizer, output)}
        for ids, mask, output in zip(prompts, masks, outputs, strict=True)
    ]
    commits = [step.decision for step in trace.steps if isinstance(step.decision, Commit)]
    guessed = sorted({token for commit in commits for token in commit.tokens[commit.valid].tolist()})
    return {"rows": rows, "vocabulary": {str(token): tokenizer.decode([token]) for token in guessed}}


def pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    """The text that each token adds. A character spread over several tokens is given to the last of them."""
    found, shown = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        whole = not text.endswith("\ufffd") or end == len(ids)
        found.append(text[len(shown) :] if whole else "")
        shown = text if whole else shown
    return found
