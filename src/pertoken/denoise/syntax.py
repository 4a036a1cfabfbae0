"""Lines of code as syntax trees, of each of which every leaf knows its bytes.

A parser is a function from the bytes of one line to the root `Node`. Python, Java and C++ are parsed by tree-sitter
(the extra `code`); Python also by the standard library (`python_lines`). A tree is a function of its line's bytes
alone, so trees are kept by those bytes: a line is parsed again only if it changed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

from pertoken.core.errors import BadRequest

LANGUAGES = ("python", "java", "cpp")
ERROR = "ERROR"
DEEPEST = 64  # levels; a line nested deeper is no unit test, and is not compared with others

LITERALS = frozenset(
    (
        *("comment", "line_comment", "block_comment"),
        *("integer", "float", "none", "true", "false"),
        *("decimal_integer_literal", "hex_integer_literal", "octal_integer_literal", "binary_integer_literal"),
        *("decimal_floating_point_literal", "hex_floating_point_literal", "null_literal"),
        *("number_literal", "null"),
    )
)
STRING_TEXT = frozenset(
    (
        *("string_content", "string_fragment", "multiline_string_fragment", "raw_string_content"),
        *("escape_sequence", "character_literal", "character"),
    )
)


class Node(NamedTuple):
    """A piece of a line: its kind and bytes `[start, end)`; a leaf has a text, the others children in order."""

    kind: str
    start: int
    end: int
    children: tuple[Node, ...] = ()
    text: bytes = b""


Parser = Callable[[bytes], Node]


def unparsed(line: bytes) -> Node:
    """The tree of a line that cannot be read: it has nothing in common with any other."""
    return Node("module", 0, len(line), (Node(ERROR, 0, len(line), (), line),))


@lru_cache(maxsize=16)
def parser_for(language: str, kind: str = "auto") -> Parser:
    """The parser of a language. kind: "tree_sitter"; "ast" for Python without it; "auto" for what is installed.

    Raises `BadRequest` for an unknown language or kind, and where the grammar is missing.
    """
    if language not in LANGUAGES:
        raise BadRequest(f"language={language!r} is unknown; choose one of {', '.join(LANGUAGES)}")
    if kind not in ("auto", "ast", "tree_sitter"):
        raise BadRequest(f"parser={kind!r} is unknown; choose 'auto', 'ast' or 'tree_sitter', or give a function")
    missing = [name for name in ("tree_sitter", f"tree_sitter_{language}") if find_spec(name) is None]
    if language == "python" and (kind == "ast" or (kind == "auto" and missing)):
        from pertoken.denoise.python_lines import parse

        return lru_cache(maxsize=8192)(parse)
    if kind == "ast":
        raise BadRequest(f"parser='ast' reads Python, not {language}; use parser='tree_sitter'")
    if missing:
        raise BadRequest(
            f"{language} is parsed by {' and '.join(missing)}, not installed here; run pip install 'pertoken[code]'"
            + (", or use parser='ast'" if language == "python" else "")
        )
    return lru_cache(maxsize=8192)(_tree_sitter(language))


def _tree_sitter(language: str) -> Parser:
    module: Any = import_module("tree_sitter")
    grammar = module.Language(import_module(f"tree_sitter_{language}").language())

    def parse(line: bytes) -> Node:
        try:
            return _converted(module.Parser(grammar).parse(line).root_node, line, 0)
        except RecursionError:
            return unparsed(line)

    return parse


def _converted(found: Any, line: bytes, depth: int) -> Node:
    if depth > DEEPEST:
        raise RecursionError
    children = tuple(_converted(child, line, depth + 1) for child in found.children)
    start, end = found.start_byte, found.end_byte
    return Node(found.type, start, end, children, b"" if children else line[start:end])
