"""Terminals of Lark's notation: texts, ranges of characters, and patterns with flags."""

from __future__ import annotations

import re

from pertoken.core.errors import BadRequest
from pertoken.decode.grammar.ir import NOTHING, Lit, Node
from pertoken.decode.grammar.regex import node_of
from pertoken.decode.grammar.regex_reader import parse
from pertoken.decode.grammar.regex_tree import Cat, Chars, Or, Regex, Times
from pertoken.decode.grammar.text import ESCAPES, Cursor
from pertoken.decode.grammar.unicode import ANY, LINE_ENDS, Ranges, characters, complement, tidy

COMMON = {
    "DIGIT": r"[0-9]", "HEXDIGIT": r"[a-fA-F0-9]", "INT": r"[0-9]+", "SIGNED_INT": r"[+-]?[0-9]+",
    "DECIMAL": r"[0-9]+\.[0-9]*|\.[0-9]+",
    "FLOAT": r"[0-9]+[eE][+-]?[0-9]+|(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?",
    "NUMBER": r"(?:[0-9]+\.[0-9]*|\.?[0-9]+)(?:[eE][+-]?[0-9]+)?",
    "SIGNED_NUMBER": r"[+-]?(?:[0-9]+\.[0-9]*|\.?[0-9]+)(?:[eE][+-]?[0-9]+)?", "LCASE_LETTER": r"[a-z]",
    "UCASE_LETTER": r"[A-Z]", "LETTER": r"[A-Za-z]", "WORD": r"[A-Za-z]+", "CNAME": r"[_A-Za-z][_A-Za-z0-9]*",
    "ESCAPED_STRING": r'"(?:[^"\\\n]|\\.)*"', "WS_INLINE": r"[ \t]+", "WS": r"[ \t\f\r\n]+", "NEWLINE": r"(?:\r?\n)+",
    "CR": r"\r", "LF": r"\n",
}  # fmt: skip


def common(name: str) -> Node:
    """A terminal of Lark's library `common`."""
    return node_of(parse(COMMON[name]), characters)


def text(cursor: Cursor) -> Node:
    """A text or a range of characters, behind the first quote."""
    found = _quoted(cursor)
    if cursor.source.startswith('.."', cursor.at):
        cursor.at += 3
        start, last = cursor.at, _quoted(cursor)
        if len(found) != 1 or len(last) != 1 or found > last:
            cursor.fail('a range is written "a".."z", from a character to a later one', start)
        return characters(tidy([(ord(found), ord(last))]))
    if cursor.take("i"):
        return node_of(Cat(tuple(Chars(_cases(((ord(c), ord(c)),))) for c in found)), characters)
    return Lit(found.encode()) if found else NOTHING


def _quoted(cursor: Cursor) -> str:
    """A text behind its opening quote."""
    text = ""
    while not cursor.take('"'):
        letter = cursor.next('the closing "')
        if letter == "\n":
            cursor.fail("a line break in a text; write \\n", cursor.at - 1)
        if letter == "\\":
            letter = cursor.next("an escaped character")
            digits = {"x": 2, "u": 4, "U": 8}.get(letter)
            letter = chr(cursor.hexadecimal(digits)) if digits else ESCAPES.get(letter, letter)
        text += letter
    return text


def pattern(cursor: Cursor) -> Node:
    """A pattern with its flags."""
    start = cursor.at
    match = re.compile(r"/((?:[^/\\\n]|\\.)+)/([imslux]*)").match(cursor.source, start)
    if match is None:
        cursor.fail("this pattern does not end; it is written /.../ on one line")
    cursor.at = match.end()
    flags = set(match.group(2))
    if flags - {"i", "s", "u"}:
        cursor.fail(f"flags {', '.join(sorted(flags - set('isu')))} are not supported; i and s are", match.end() - 1)
    try:
        return node_of(_flagged(parse(match.group(1).replace("\\/", "/")), flags), characters)
    except BadRequest as error:
        raise BadRequest(f"{cursor.what}, line {cursor.source.count(chr(10), 0, start) + 1}: {error}") from error


def _flagged(pattern: Regex, flags: set[str]) -> Regex:
    """A pattern without regard to case (i), or with `.` for line breaks too (s)."""
    if isinstance(pattern, (Cat, Or)):
        return type(pattern)(tuple(_flagged(item, flags) for item in pattern.items))
    if isinstance(pattern, Times):
        return Times(_flagged(pattern.item, flags), pattern.least, pattern.most)
    if isinstance(pattern, Chars):
        ranges = ANY if "s" in flags and pattern.ranges == complement(LINE_ENDS) else pattern.ranges
        return Chars(_cases(ranges) if "i" in flags else ranges)
    return pattern


def _cases(ranges: Ranges) -> Ranges:
    """With the other case of every letter (of the first 12,288 characters of a range)."""
    found = list(ranges)
    for low, high in ranges:
        for code in range(low, min(high, low + 0x3000) + 1):
            found += [(ord(other), ord(other)) for other in (chr(code).lower(), chr(code).upper()) if len(other) == 1]
    return tidy(found)
