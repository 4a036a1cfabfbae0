"""Python lines as syntax trees with the standard library alone.

Nodes are those of `ast`, named by their classes; what `ast` leaves out between them (keywords, names of attributes,
operators, brackets, comments) becomes leaves of the innermost node around it. A string is a node with its opening
quotes, its content and its closing quotes. A line that is no statement, nor the head of one, is not read.
"""

from __future__ import annotations

import ast
import keyword
import re
import warnings
from collections.abc import Iterator

from pertoken.denoise.syntax import DEEPEST, Node, unparsed

_LEAF = re.compile(
    rb"(?P<comment>#.*)|(?P<name>[A-Za-z_\x80-\xff][\w\x80-\xff]*)"
    rb"|(?P<sign>\*\*=|//=|<<=|>>=|\.\.\.|[-+*/%&|^@:=!<>]=|->|\*\*|//|<<|>>|\S)"
)
_STRING = re.compile(rb"([A-Za-z]*)(\"\"\"|'''|\"|')")
_CONSTANTS = {bool: "", int: "integer", float: "float", complex: "float", type(None): "none", type(...): "..."}


def parse(line: bytes) -> Node:
    """The tree of one line; `unparsed` where it is not Python by itself."""
    code = line.strip(b" \t\r\n\f")
    if not code or code.startswith(b"\xef\xbb\xbf") or re.search(rb"[\r\n\f\0]", code):
        return unparsed(line)
    tree = _tree(code)
    if tree is None:
        return unparsed(line)
    offset = line.index(code)
    try:
        return Node("module", 0, len(line), tuple(_inside(tree, code, 0, len(code), offset, 1)))
    except RecursionError:
        return unparsed(line)


def _tree(code: bytes) -> ast.AST | None:
    for whole in (code, code + b" pass") if code.endswith(b":") else (code,):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return ast.parse(whole.decode())
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
    return None


def _inside(tree: ast.AST, code: bytes, start: int, end: int, offset: int, depth: int) -> Iterator[Node]:
    """The nodes between `start` and `end` of the code, of which `tree` is the innermost node around them."""
    if depth > DEEPEST:
        raise RecursionError
    at = start
    for child in sorted(_placed(tree), key=lambda c: c.col_offset):
        first, last = child.col_offset, min(child.end_col_offset or 0, end)
        if first < at or first >= last:
            continue  # the body that completed the head of a statement
        yield from _leaves(code, at, first, offset)
        yield _node(child, code, first, last, offset, depth)
        at = last
    yield from _leaves(code, at, end, offset)


def _placed(tree: ast.AST) -> Iterator[ast.expr | ast.stmt]:
    """The nearest nodes below that have a place in the code."""
    for child in ast.iter_child_nodes(tree):
        if hasattr(child, "col_offset"):
            yield child  # type: ignore[misc]
        else:
            yield from _placed(child)


def _node(tree: ast.expr | ast.stmt, code: bytes, start: int, end: int, offset: int, depth: int) -> Node:
    kind, place = type(tree).__name__, (start + offset, end + offset)
    string = _STRING.match(code, start, end)
    if string and isinstance(tree, (ast.Constant, ast.JoinedStr)):
        parts = ((start, string.end(), "string_start"), (string.end(), end - len(string[2]), "string_content"))
        pieces = (*parts, (end - len(string[2]), end, "string_end"))
        return Node("string", *place, tuple(_leaf(code, *piece, offset) for piece in pieces if piece[0] < piece[1]))
    if isinstance(tree, ast.Constant):
        return _leaf(code, start, end, _CONSTANTS.get(type(tree.value)) or str(tree.value).lower(), offset)
    if isinstance(tree, ast.Name):
        return _leaf(code, start, end, "identifier", offset)
    return Node(kind, *place, tuple(_inside(tree, code, start, end, offset, depth + 1)))


def _leaf(code: bytes, start: int, end: int, kind: str, offset: int) -> Node:
    return Node(kind, start + offset, end + offset, (), code[start:end])


def _leaves(code: bytes, start: int, end: int, offset: int) -> Iterator[Node]:
    for found in _LEAF.finditer(code, start, end):
        text = found[0].decode(errors="replace")
        name = "identifier" if found["name"] and not keyword.iskeyword(text) else text
        yield _leaf(code, found.start(), found.end(), "comment" if found["comment"] else name, offset)
