"""A small corpus made by program: a Python function and several assertions about it, of one shape, all true."""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from typing import Any

Make = Callable[[random.Random], Any]


def _number(rng: random.Random) -> int:
    return rng.randint(0, 20)


def _word(rng: random.Random) -> str:
    return "".join(rng.choices(string.ascii_lowercase[:12], k=rng.randint(2, 4)))


def _numbers(rng: random.Random) -> list[int]:
    return [_number(rng) for _ in range(rng.randint(2, 4))]


# name, parameters, body (one expression), and what the arguments are
TEMPLATES: tuple[tuple[str, str, str, tuple[Make, ...]], ...] = (
    ("add", "a, b", "a + b", (_number, _number)),
    ("subtract", "a, b", "a - b", (_number, _number)),
    ("multiply", "a, b", "a * b", (_number, _number)),
    ("largest", "a, b", "max(a, b)", (_number, _number)),
    ("smallest", "a, b", "min(a, b)", (_number, _number)),
    ("distance", "a, b", "abs(a - b)", (_number, _number)),
    ("square", "n", "n * n", (_number,)),
    ("double", "n", "n * 2", (_number,)),
    ("is_even", "n", "n % 2 == 0", (_number,)),
    ("is_odd", "n", "n % 2 == 1", (_number,)),
    ("half", "n", "n // 2", (_number,)),
    ("clamp", "n", "max(5, min(n, 15))", (_number,)),
    ("total", "items", "sum(items)", (_numbers,)),
    ("count", "items", "len(items)", (_numbers,)),
    ("first", "items", "items[0]", (_numbers,)),
    ("last", "items", "items[-1]", (_numbers,)),
    ("highest", "items", "max(items)", (_numbers,)),
    ("lowest", "items", "min(items)", (_numbers,)),
    ("ordered", "items", "sorted(items)", (_numbers,)),
    ("reverse", "items", "items[::-1]", (_numbers,)),
    ("contains", "items, n", "n in items", (_numbers, _number)),
    ("append", "items, n", "items + [n]", (_numbers, _number)),
    ("shout", "word", "word.upper()", (_word,)),
    ("mirror", "word", "word[::-1]", (_word,)),
    ("length", "word", "len(word)", (_word,)),
    ("initial", "word", "word[0]", (_word,)),
    ("join", "a, b", "a + '_' + b", (_word, _word)),
    ("starts", "a, b", "a.startswith(b)", (_word, _word)),
    ("repeat", "word, n", "word * (n % 4)", (_word, _number)),
    ("letters", "word", "sorted(word)", (_word,)),
)


def unit_tests(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """(function, assertions) pairs; a prompt ends where the first assertion begins."""
    rng, pairs = random.Random(seed), []
    for _ in range(count):
        name, parameters, expression, makers = rng.choice(TEMPLATES)
        name = rng.choice((name, f"get_{name}", f"{name}_of", f"my_{name}", f"{name}_{_word(rng)}"))
        scope: dict[str, Any] = {}
        source = f"def {name}({parameters}):\n    return {expression}\n"
        exec(source, scope)
        lines = []
        for _ in range(rng.randint(3, 6)):
            given = [make(rng) for make in makers]
            lines.append(f"assert {name}({', '.join(map(repr, given))}) == {scope[name](*given)!r}\n")
        pairs.append((f"{source}\n\n# tests\n", "".join(lines)))
    return pairs
