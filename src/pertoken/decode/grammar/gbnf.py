"""GBNF, the grammar notation of llama.cpp: `name ::= "text" | [a-z]+ other{2,5} ( ... )?`, comments after #.

`.` is any character except a line break. The rule to start with is `root`. A rule ends where the next one begins, so
that alternatives may be spread over lines.
"""

from __future__ import annotations

import re

from pertoken.core.errors import BadRequest
from pertoken.decode.grammar.ir import NOTHING, Grammar, Lit, Node, Ref, Repeat, alt, references, seq
from pertoken.decode.grammar.text import ESCAPES, Cursor
from pertoken.decode.grammar.unicode import characters, complement, tidy

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
BLANK = re.compile(r"(?:\s+|#[^\n]*)*")


def gbnf(source: str, root: str = "root") -> Grammar:
    """Parse a grammar. Raises `BadRequest` with line, column and caret for what is wrong with it."""
    cursor = Cursor(source, "GBNF grammar")
    rules: dict[str, Node] = {}
    used: dict[str, int] = {}
    _blank(cursor)
    while cursor.peek:
        start = cursor.at
        name = _name(cursor)
        if name is None:
            cursor.fail("a rule name expected")
        _blank(cursor)
        cursor.need("::=", f" after the rule name {name!r}")
        if name in rules:
            cursor.fail(f"rule {name!r} is defined twice", start)
        rules[name] = _choice(cursor, used)
        if cursor.peek == ")":
            cursor.fail("')' without '('")
    return finish(cursor, rules, used, root)


def finish(cursor: Cursor, rules: dict[str, Node], used: dict[str, int], root: str) -> Grammar:
    """The grammar of parsed rules, if it hangs together. used: where each name was first referred to."""
    for name, at in used.items():
        if name not in rules:
            cursor.fail(f"rule {name!r} is not defined; defined are {', '.join(sorted(rules)[:20])}", at)
    if root not in rules:
        known = ", ".join(sorted(rules)[:20]) or "none"
        raise BadRequest(f"{cursor.what}: no rule {root!r} to start with (rules: {known}); name one {root!r}")
    reached, stack = {root}, [root]
    while stack:
        for name in references(rules[stack.pop()]):
            if name not in reached:
                reached.add(name)
                stack.append(name)
    lost = [name for name in rules if name not in reached]
    if lost:
        raise BadRequest(
            f"{cursor.what}: rules {', '.join(map(repr, lost[:10]))} cannot be reached from {root!r}; remove them, or "
            "refer to them"
        )
    return Grammar(rules, root)


def _blank(cursor: Cursor) -> None:
    match = BLANK.match(cursor.source, cursor.at)
    assert match is not None
    cursor.at = match.end()


def _name(cursor: Cursor) -> str | None:
    match = NAME.match(cursor.source, cursor.at)
    if match is None:
        return None
    cursor.at = match.end()
    return match.group()


def _choice(cursor: Cursor, used: dict[str, int]) -> Node:
    options = [_sequence(cursor, used)]
    while cursor.take("|"):
        options.append(_sequence(cursor, used))
    return alt(*options)


def _starts_rule(cursor: Cursor) -> bool:
    """Whether a rule definition comes next."""
    match = NAME.match(cursor.source, cursor.at)
    if match is None:
        return False
    blank = BLANK.match(cursor.source, match.end())
    return blank is not None and cursor.source.startswith("::=", blank.end())


def _sequence(cursor: Cursor, used: dict[str, int]) -> Node:
    items: list[Node] = []
    while True:
        _blank(cursor)
        if cursor.peek in ("", "|", ")") or _starts_rule(cursor):
            return seq(*items)
        items.append(_repeated(cursor, _item(cursor, used)))


def _repeated(cursor: Cursor, item: Node) -> Node:
    while True:
        _blank(cursor)
        if cursor.take("*"):
            item = Repeat(item, 0, None)
        elif cursor.take("+"):
            item = Repeat(item, 1, None)
        elif cursor.take("?"):
            item = Repeat(item, 0, 1)
        elif cursor.take("{"):
            item = Repeat(item, *cursor.bounds())
        else:
            return item


def _item(cursor: Cursor, used: dict[str, int]) -> Node:
    start = cursor.at
    if cursor.take('"'):
        text = ""
        while not cursor.take('"'):
            text += _character(cursor, "the end of this text")
        return Lit(text.encode()) if text else NOTHING
    if cursor.take("["):
        return _set(cursor)
    if cursor.take("."):
        return characters(complement(((10, 10), (13, 13))))
    if cursor.take("("):
        cursor.enter()
        inner = _choice(cursor, used)
        cursor.need(")", " to close the group")
        cursor.leave()
        return inner
    name = _name(cursor)
    if name is None:
        cursor.fail(f"{cursor.peek!r} begins neither a text, a set, a group nor a rule name")
    used.setdefault(name, start)
    return Ref(name)


def _character(cursor: Cursor, wanted: str) -> str:
    letter = cursor.next(wanted)
    if letter == "\n":
        cursor.fail("a line break in a text or set; write \\n", cursor.at - 1)
    if letter != "\\":
        return letter
    letter = cursor.next("an escaped character")
    digits = {"x": 2, "u": 4, "U": 8}.get(letter)
    if digits is None:
        if letter.isalnum() and letter not in ESCAPES:
            cursor.fail(f"\\{letter} is no escape; known are \\n \\r \\t \\xNN \\uNNNN \\UNNNNNNNN", cursor.at - 2)
        return ESCAPES.get(letter, letter)
    value = cursor.hexadecimal(digits)
    if value > 0x10FFFF or 0xD800 <= value <= 0xDFFF:
        cursor.fail(f"U+{value:04X} is no character", cursor.at - digits)
    return chr(value)


def _set(cursor: Cursor) -> Node:
    start = cursor.at - 1
    inverted, found = cursor.take("^"), []
    while not cursor.take("]"):
        low = high = ord(_character(cursor, "']'"))
        if cursor.peek == "-" and cursor.source[cursor.at + 1 : cursor.at + 2] not in ("]", ""):
            cursor.at += 1
            high = ord(_character(cursor, "the end of a range"))
            if high < low:
                cursor.fail(f"the range {chr(low)}-{chr(high)} runs backwards", cursor.at - 1)
        found.append((low, high))
    ranges = complement(tidy(found)) if inverted else tidy(found)
    if not ranges:
        cursor.fail("this set has no characters", start)
    return characters(ranges)
