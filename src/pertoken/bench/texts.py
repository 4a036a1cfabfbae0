"""Texts of a comparison: prompts from files, tokens as pieces of text, and how much two outputs agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from pertoken.core.decision import Commit
from pertoken.core.trace import Trace


def read_prompts(path: Path) -> list[str]:
    """Prompts of a file: one per line, or for `*.jsonl` the "prompt" of each object. Empty lines are passed over."""
    import json

    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            prompts.append(line)
            continue
        try:
            prompts.append(json.loads(line)["prompt"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f'{path} line {number} is not an object with a "prompt": {line[:60]!r}') from error
    if not prompts:
        raise ValueError(
            f"{path} holds no prompt; write one per line, or one JSON object with a prompt per line (.jsonl)"
        )
    return prompts


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
