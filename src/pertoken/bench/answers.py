"""How good an answer is, without comparing it with another decode: true unit tests, syntax, likeness to the original.

Nothing that a model wrote is ever executed: the arguments and results of its tests are read as literals, and the
function under test is the prompt's own.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

import numpy as np

_WORDS = re.compile(r"\w+|[^\w\s]")
LARGEST = 10**6  # numbers beyond this are not computed with: a test could ask for a text of that length


@dataclass(frozen=True)
class Quality:
    """Means over answers. tests: share of answers that end in whole lines, all of them true tests (nan where there are
    none); lines: share of the lines written that are true tests; parses: prompt and answer are Python; likeness:
    similarity of the answer and the original, 1 if equal."""

    tests: float
    lines: float
    parses: float
    likeness: float


def true_lines(prompt: str, answer: str) -> tuple[int, int]:
    """How many lines of the answer are true `assert name(literals) == literal`, and how many lines it has."""
    functions = defined(prompt)
    lines = [line for line in answer.splitlines() if line.strip()]
    return sum(is_true(line, functions) for line in lines), len(lines)


def passes(prompt: str, answer: str) -> bool:
    """Whether the answer is at least one test and nothing else than true ones, the last line ended."""
    true, total = true_lines(prompt, answer)
    return 0 < true == total and answer.endswith("\n")


def defined(prompt: str) -> dict[str, Callable[..., Any]]:
    """The functions of a prompt that `zoo.unit_tests` made; never call it with a model's text."""
    scope: dict[str, Any] = {}
    exec(prompt, scope)
    return {name: found for name, found in scope.items() if name != "__builtins__"}


def is_true(line: str, functions: dict[str, Callable[..., Any]]) -> bool:
    """Whether a line is a true test of one of the functions."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            body = ast.parse(line).body
        match body:
            case [
                ast.Assert(test=ast.Compare(ast.Call(ast.Name(name), arguments, []), [ast.Eq()], [result]), msg=None)
            ]:
                given = [ast.literal_eval(argument) for argument in arguments]
                wanted = ast.literal_eval(result)
                small = all(abs(part) <= LARGEST for value in given for part in _numbers(value))
                return small and bool(functions[name](*given) == wanted)
    except (ArithmeticError, AttributeError, LookupError, RecursionError, SyntaxError, TypeError, ValueError):
        pass
    return False


def _numbers(value: Any) -> list[Any]:
    if isinstance(value, (list, tuple, set)):
        return [part for item in value for part in _numbers(item)]
    return [value] if isinstance(value, (int, float)) else []


def parses(text: str) -> bool:
    """Whether a text is Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def likeness(one: str, other: str) -> float:
    """Share of the characters of both texts in blocks that they have in common, in order."""
    return SequenceMatcher(None, one, other, autojunk=False).ratio()


def edit_similarity(one: str, other: str) -> float:
    """One minus the fewest insertions, deletions and replacements of characters that turn one text into the other
    (Levenshtein), over the length of the longer; 1 for equal texts."""
    if not one or not other:
        return float(one == other)
    letters, steps = np.array([ord(letter) for letter in other]), np.arange(len(other) + 1)
    row = steps
    for number, letter in enumerate(one, 1):
        best = np.minimum(row[1:] + 1, row[:-1] + (letters != ord(letter)))
        row = np.minimum.accumulate(np.concatenate([[number], best]) - steps) + steps
    return 1 - float(row[-1]) / max(len(one), len(other))


def rouge_l(one: str, other: str) -> float:
    """ROUGE-L (Lin 2004): F1 of the longest common subsequence of the words and signs of two texts; 1 if both have
    none."""
    words, others = _WORDS.findall(one), _WORDS.findall(other)
    if not words or not others:
        return float(words == others)
    row = [0] * (len(others) + 1)
    for word in words:
        before = 0
        for at, theirs in enumerate(others, 1):
            before, row[at] = row[at], before + 1 if word == theirs else max(row[at], row[at - 1])
    return 2 * row[-1] / (len(words) + len(others))


def judge(prompts: list[str], answers: list[str], originals: list[str], tests: bool) -> Quality:
    """Quality of answers to prompts; tests: whether they are unit tests in Python."""
    count, nan = len(answers), float("nan")
    lines = [true_lines(p, a) for p, a in zip(prompts, answers, strict=True)] if tests else []
    passing = sum(passes(p, a) for p, a in zip(prompts, answers, strict=True)) if tests else nan
    return Quality(
        passing / count,
        sum(true for true, _ in lines) / max(sum(total for _, total in lines), 1) if tests else nan,
        sum(parses(p + a) for p, a in zip(prompts, answers, strict=True)) / count,
        sum(likeness(a, o) for a, o in zip(answers, originals, strict=True)) / count,
    )
