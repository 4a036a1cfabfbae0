"""Regular expressions, read into a tree over characters.

The notation is ECMA-262's with its unicode flag, as JSON Schema asks for: alternation, groups, classes, `\\d \\w \\s`,
`\\p{...}` of general categories, `* + ? {m,n}` (lazy ones match the same texts), `^` and `$` for the ends of the text.
`.` is any character but a line break. What no finite automaton can say, or what would need the text around the match
(back references, look-around, word boundaries), is refused with its place.
"""

from __future__ import annotations

import unicodedata
from functools import lru_cache

from pertoken.decode.grammar.regex_tree import Anchor, Cat, Chars, Or, Regex, Times
from pertoken.decode.grammar.text import ESCAPES, Cursor
from pertoken.decode.grammar.unicode import LINE_ENDS, TOP, Ranges, complement, tidy

DIGIT: Ranges = ((48, 57),)
WORD: Ranges = ((48, 57), (65, 90), (95, 95), (97, 122))
SPACE: Ranges = tidy([(9, 13), (32, 32), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A), (0x2028, 0x2029),
                      (0x202F, 0x202F), (0x205F, 0x205F), (0x3000, 0x3000), (0xFEFF, 0xFEFF)])  # fmt: skip
CLASSES = {"d": DIGIT, "w": WORD, "s": SPACE}
CATEGORIES = {
    "Letter": "L", "Uppercase_Letter": "Lu", "Lowercase_Letter": "Ll", "Titlecase_Letter": "Lt", "Mark": "M",
    "Number": "N", "Decimal_Number": "Nd", "digit": "Nd", "Punctuation": "P", "punct": "P", "Symbol": "S",
    "Separator": "Z", "Space_Separator": "Zs", "Other": "C", "Control": "Cc",
}  # fmt: skip


@lru_cache(maxsize=1024)
def parse(pattern: str) -> Regex:
    """The tree of a pattern."""
    cursor = Cursor(pattern, "pattern")
    found = _choice(cursor)
    if cursor.peek:
        cursor.fail("')' without '('")
    return found


def _choice(cursor: Cursor) -> Regex:
    options = [_sequence(cursor)]
    while cursor.take("|"):
        options.append(_sequence(cursor))
    return options[0] if len(options) == 1 else Or(tuple(options))


def _sequence(cursor: Cursor) -> Regex:
    items: list[Regex] = []
    while cursor.peek not in ("", "|", ")"):
        start = cursor.at
        item = _item(cursor)
        while cursor.peek in ("*", "+", "?", "{"):
            if isinstance(item, Anchor):
                cursor.fail("there is nothing here that could be repeated")
            if cursor.peek == "{" and not cursor.source[cursor.at + 1 : cursor.at + 2].isdigit():
                cursor.fail("{ begins a repetition {m}, {m,} or {m,n}; write \\{ for the character")
            item = _times(cursor, item)
            if cursor.take("?"):  # lazy: the same texts
                continue
            if cursor.peek == "+" and cursor.source[cursor.at - 1] in "*+?}":
                cursor.fail("possessive repetitions are not supported; write it without the second sign", start)
        items.append(item)
    return items[0] if len(items) == 1 else Cat(tuple(items))


def _times(cursor: Cursor, item: Regex) -> Regex:
    sign = cursor.next("a repetition")
    if sign == "{":
        return Times(item, *cursor.bounds())
    return Times(item, int(sign == "+"), 1 if sign == "?" else None)


def _item(cursor: Cursor) -> Regex:
    start = cursor.at
    if cursor.take("("):
        return _group(cursor, start)
    if cursor.take("["):
        return Chars(_set(cursor, start))
    letter = cursor.next("a character")
    if letter == ".":
        return Chars(complement(LINE_ENDS))
    if letter in "^$":
        return Anchor(end=letter == "$")
    if letter in "*+?{":
        cursor.fail(f"{letter!r} has nothing before it to repeat; write \\{letter} for the character", start)
    return Chars(_escape(cursor, start) if letter == "\\" else _one(ord(letter)))


def _group(cursor: Cursor, start: int) -> Regex:
    if cursor.take("?") and not cursor.take(":"):
        cursor.take("P")
        if cursor.source[cursor.at : cursor.at + 2] in ("<=", "<!") or not cursor.take("<"):
            cursor.fail("look-around, flags and conditions are not supported; groups are (...), (?:...), (?<name>...)",
                        start)  # fmt: skip
        while cursor.next("the end of the group's name") != ">":
            pass
    cursor.enter()
    inner = _choice(cursor)
    cursor.need(")", " to close the group")
    cursor.leave()
    return inner


def _set(cursor: Cursor, start: int) -> Ranges:
    inverted, found = cursor.take("^"), []
    while not cursor.take("]"):
        at = cursor.at
        low = _member(cursor)
        following = cursor.source[cursor.at + 1 : cursor.at + 2]
        if cursor.peek == "-" and following not in ("]", "") and len(low) == 1 and low[0][0] == low[0][1]:
            cursor.at += 1
            high = _member(cursor)
            if len(high) != 1 or high[0][0] != high[0][1]:
                cursor.fail("a range ends in a single character", at)
            if high[0][0] < low[0][0]:
                cursor.fail("this range runs backwards", at)
            found.append((low[0][0], high[0][0]))
        else:
            found += low
    return complement(tidy(found)) if inverted else tidy(found)


def _member(cursor: Cursor) -> Ranges:
    start = cursor.at
    letter = cursor.next("']'")
    if letter == "\\":
        return _one(8) if cursor.take("b") else _escape(cursor, start)
    return _one(ord(letter))


def _escape(cursor: Cursor, start: int) -> Ranges:
    """Characters of an escape, behind its backslash."""
    letter = cursor.next("an escaped character")
    if letter.lower() in CLASSES:
        found = CLASSES[letter.lower()]
        return found if letter.islower() else complement(found)
    if letter in "pP":
        cursor.need("{", " after \\p")
        name = ""
        while not cursor.take("}"):
            name += cursor.next("'}'")
        found = category(CATEGORIES.get(name.partition("=")[2] or name, name.partition("=")[2] or name))
        if not found:
            cursor.fail(f"the property {name!r} is not known; known are general categories such as L, Lu, Nd, Letter",
                        start)  # fmt: skip
        return found if letter == "p" else complement(found)
    if letter == "c":
        control = cursor.next("a letter after \\c")
        if not (control.isascii() and control.isalpha()):
            cursor.fail("\\c needs a letter", start)
        return _one(ord(control) % 32)
    if letter in "xu":
        value = _code(cursor, letter)
        if 0xD800 <= value <= 0xDBFF and cursor.take("\\u"):
            value = 0x10000 + ((value - 0xD800) << 10) + (cursor.hexadecimal(4) - 0xDC00)
        if value > TOP or 0xD800 <= value <= 0xDFFF:
            cursor.fail(f"U+{value:04X} is no character", start)
        return _one(value)
    if letter in "bBkAZzGQE" or letter in "123456789":
        cursor.fail(f"\\{letter} is not supported (word boundaries, back references and the like)", start)
    if letter.isalnum() and letter not in ESCAPES:
        cursor.fail(f"\\{letter} is no escape", start)
    return _one(ord(ESCAPES.get(letter, letter)))


def _one(code: int) -> Ranges:
    return ((code, code),)


def _code(cursor: Cursor, letter: str) -> int:
    if letter == "u" and cursor.take("{"):
        end = cursor.source.find("}", cursor.at)
        value = cursor.hexadecimal(max(end - cursor.at, 1))
        cursor.need("}")
        return value
    return cursor.hexadecimal(2 if letter == "x" else 4)


@lru_cache(maxsize=64)
def category(name: str) -> Ranges:
    """Characters of a general category such as `L` or `Lu`; none if there is no such category."""
    found = [(c, c) for c in range(TOP + 1) if unicodedata.category(chr(c)).startswith(name)] if name else []
    return tidy(found)
