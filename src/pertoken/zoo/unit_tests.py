"""A small corpus made by program: a function and several tests of it, of one shape, all true, in three languages."""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

LANGUAGES = ("python", "java", "cpp")


def _number(rng: random.Random) -> int:
    return rng.randint(0, 20)


def _word(rng: random.Random) -> str:
    return "".join(rng.choices(string.ascii_lowercase[:12], k=rng.randint(2, 4)))


def _numbers(rng: random.Random) -> list[int]:
    return [_number(rng) for _ in range(rng.randint(2, 4))]


MAKERS: dict[str, Callable[[random.Random], Any]] = {"int": _number, "text": _word, "list": _numbers}
TYPES = {
    "java": {"int": "int", "text": "String", "list": "int[]", "bool": "boolean"},
    "cpp": {"int": "int", "text": "std::string", "list": "std::vector<int>", "bool": "bool"},
}


@dataclass(frozen=True)
class Template:
    """A function of one expression. parameters: name to kind, a key of `MAKERS`; None: the language has no such one."""

    name: str
    parameters: dict[str, str]
    result: str
    python: str
    java: str | None = None
    cpp: str | None = None


TWO, ONE = {"a": "int", "b": "int"}, {"n": "int"}
ITEMS, WORD, WORDS = {"items": "list"}, {"word": "text"}, {"a": "text", "b": "text"}
TEMPLATES: tuple[Template, ...] = (
    Template("add", TWO, "int", "a + b", "a + b", "a + b"),
    Template("subtract", TWO, "int", "a - b", "a - b", "a - b"),
    Template("multiply", TWO, "int", "a * b", "a * b", "a * b"),
    Template("largest", TWO, "int", "max(a, b)", "Math.max(a, b)", "std::max(a, b)"),
    Template("smallest", TWO, "int", "min(a, b)", "Math.min(a, b)", "std::min(a, b)"),
    Template("distance", TWO, "int", "abs(a - b)", "Math.abs(a - b)", "std::abs(a - b)"),
    Template("square", ONE, "int", "n * n", "n * n", "n * n"),
    Template("double", ONE, "int", "n * 2", "n * 2", "n * 2"),
    Template("is_even", ONE, "bool", "n % 2 == 0", "n % 2 == 0", "n % 2 == 0"),
    Template("is_odd", ONE, "bool", "n % 2 == 1", "n % 2 == 1", "n % 2 == 1"),
    Template("half", ONE, "int", "n // 2", "n / 2", "n / 2"),
    Template("clamp", ONE, "int", "max(5, min(n, 15))", "Math.max(5, Math.min(n, 15))", "std::max(5, std::min(n, 15))"),
    Template("total", ITEMS, "int", "sum(items)"),
    Template("count", ITEMS, "int", "len(items)", "items.length", "items.size()"),
    Template("first", ITEMS, "int", "items[0]", "items[0]", "items[0]"),
    Template("last", ITEMS, "int", "items[-1]", "items[items.length - 1]", "items.back()"),
    Template("highest", ITEMS, "int", "max(items)"),
    Template("lowest", ITEMS, "int", "min(items)"),
    Template("ordered", ITEMS, "list", "sorted(items)"),
    Template("reverse", ITEMS, "list", "items[::-1]"),
    Template("contains", {"items": "list", "n": "int"}, "bool", "n in items"),
    Template("append", {"items": "list", "n": "int"}, "list", "items + [n]"),
    Template("shout", WORD, "text", "word.upper()", "word.toUpperCase()"),
    Template("mirror", WORD, "text", "word[::-1]"),
    Template("length", WORD, "int", "len(word)", "word.length()", "word.size()"),
    Template("initial", WORD, "text", "word[0]", "word.substring(0, 1)", "word.substr(0, 1)"),
    Template("join", WORDS, "text", "a + '_' + b", 'a + "_" + b', 'a + "_" + b'),
    Template("starts", WORDS, "bool", "a.startswith(b)", "a.startsWith(b)", "a.starts_with(b)"),
    Template("repeat", {"word": "text", "n": "int"}, "text", "word * (n % 4)", "word.repeat(n % 4)"),
    Template("letters", WORD, "list", "sorted(word)"),
)


def unit_tests(count: int, seed: int = 0, languages: tuple[str, ...] = LANGUAGES) -> list[tuple[str, str]]:
    """(function, tests) pairs, the first of the languages in every other one."""
    rng, pairs = random.Random(seed), []
    for index in range(count):
        language = languages[0] if index % 2 == 0 else rng.choice(languages[1:] or languages)
        template = rng.choice([t for t in TEMPLATES if getattr(t, language) is not None])
        name = rng.choice((template.name, f"get_{template.name}", f"{template.name}_of", f"my_{template.name}"))
        name = rng.choice((name, f"{name}_{_word(rng)}"))
        compute = eval(f"lambda {', '.join(template.parameters)}: {template.python}")
        tests = []
        for _ in range(rng.randint(3, 6)):
            given = [MAKERS[kind](rng) for kind in template.parameters.values()]
            tests.append((given, compute(*given)))
        write = _python if language == "python" else _typed
        pairs.append(write(template, name, tests, language))
    return pairs


def _python(template: Template, name: str, tests: list[tuple[list[Any], Any]], language: str) -> tuple[str, str]:
    source = f"def {name}({', '.join(template.parameters)}):\n    return {template.python}\n\n\n# tests\n"
    lines = [f"assert {name}({', '.join(map(repr, given))}) == {expected!r}\n" for given, expected in tests]
    return source, "".join(lines)


def _typed(template: Template, name: str, tests: list[tuple[list[Any], Any]], language: str) -> tuple[str, str]:
    types = TYPES[language]
    name = _camel(name) if language == "java" else name
    parameters = ", ".join(f"{types[kind]} {parameter}" for parameter, kind in template.parameters.items())
    static = "static " if language == "java" else ""
    expression = getattr(template, language)
    source = f"{static}{types[template.result]} {name}({parameters}) {{\n    return {expression};\n}}\n\n// tests\n"
    lines = []
    for given, expected in tests:
        call = f"{name}({', '.join(_literal(value, language) for value in given)})"
        value = _literal(expected, language)
        lines.append(f"assertEquals({value}, {call});\n" if language == "java" else f"EXPECT_EQ({call}, {value});\n")
    return source, "".join(lines)


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(part.capitalize() for part in rest)


def _literal(value: Any, language: str) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, list):
        items = "{" + ", ".join(map(str, value)) + "}"
        return f"new int[]{items}" if language == "java" else items
    return str(value)
