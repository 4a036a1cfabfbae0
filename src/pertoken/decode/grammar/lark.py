"""A subset of Lark's grammar notation: `start: item ("," item)* -> list`, terminals in capitals, comments after //.

Read are rules and terminals with `| ( ) [ ] ? * + ~n ~n..m`, texts `"..."` and `"..."i`, ranges `"a".."z"`, patterns
`/.../` (of `regex`, flags i and s), `%ignore` and `%import common.NAME`. Aliases, priorities and the marks `?` and `!`
before a rule shape Lark's tree and not its language: they are read and dropped. There is no lexer here: a text is a
sentence if any way to cut it into terminals makes it one. Ignored terminals may stand before, between and after others.
Templates, `%declare`, `%override` and `%extend` are refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NoReturn

from pertoken.core.errors import BadRequest
from pertoken.decode.grammar.gbnf import finish
from pertoken.decode.grammar.ir import NOTHING, Grammar, Lit, Node, Ref, Repeat, alt, optional, seq, star
from pertoken.decode.grammar.regex import Cat, Chars, Or, Regex, Times, node_of, parse
from pertoken.decode.grammar.text import ESCAPES, Cursor
from pertoken.decode.grammar.unicode import ANY, LINE_ENDS, Ranges, characters, complement, tidy

NAME = re.compile(r"[a-z_][a-z0-9_]*|_?[A-Z][A-Z0-9_]*")
BLANK = re.compile(r"(?:[ \t\f\r]|//[^\n]*|\n(?=[ \t\r\n]*(?:\||//)))*")
LINES = re.compile(r"(?:\s|//[^\n]*)*")
IGNORED = "ignored"
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


def lark(source: str, root: str = "start") -> Grammar:
    """Parse a grammar. Raises `BadRequest` with line, column and caret for what is wrong with it or not read."""
    reader = _Reader(Cursor(source, "Lark grammar"))
    reader.read()
    rules = reader.rules
    if reader.ignored:
        rules[IGNORED] = star(alt(*reader.ignored))
        if root in rules:
            rules[root] = seq(Ref(IGNORED), rules[root])
    return finish(reader.cursor, rules, reader.used, root)


@dataclass
class _Reader:
    cursor: Cursor
    rules: dict[str, Node] = field(default_factory=dict)
    used: dict[str, int] = field(default_factory=dict)
    ignored: list[Node] = field(default_factory=list)
    inside: str = ""  # the terminal being defined, if it is one
    skips: bool = False  # whether anything is ignored

    def read(self) -> None:
        cursor = self.cursor
        self.skips = re.search(r"^%ignore", cursor.source, re.M) is not None
        self._lines()
        while cursor.peek:
            if cursor.take("%"):
                self._statement()
            else:
                self._definition()
            if cursor.peek not in ("", "\n"):
                cursor.fail(f"{cursor.peek!r} where the definition should end")
            self._lines()

    def _lines(self) -> None:
        match = LINES.match(self.cursor.source, self.cursor.at)
        assert match is not None
        self.cursor.at = match.end()

    def _blank(self) -> None:
        match = BLANK.match(self.cursor.source, self.cursor.at)
        assert match is not None
        self.cursor.at = match.end()

    def _name(self) -> str | None:
        match = NAME.match(self.cursor.source, self.cursor.at)
        if match is None:
            return None
        self.cursor.at = match.end()
        return match.group()

    def _statement(self) -> None:
        start, word = self.cursor.at - 1, self._name()
        self._blank()
        if word == "ignore":
            self.inside = "%ignore"
            self.ignored.append(self._choice())
        elif word == "import":
            self.cursor.need("common.", " (only Lark's own terminals are known)")
            at, name = self.cursor.at, self._name()
            if name not in COMMON:
                self.cursor.fail(f"common.{name} is not known; known are {', '.join(COMMON)}", at)
            self._blank()
            if self.cursor.take("->"):
                self._blank()
                name_here = self._name() or self._fail("a name expected after ->")
            else:
                name_here = name
            self._blank()
            self._define(name_here, node_of(parse(COMMON[name]), characters), start)
        else:
            self.cursor.fail(f"%{word} is not supported; %ignore and %import common.NAME are", start)

    def _definition(self) -> None:
        cursor, start = self.cursor, self.cursor.at
        while cursor.peek in ("?", "!"):
            cursor.at += 1
        name = self._name()
        if name is None:
            self._fail("a rule or terminal name expected")
        if cursor.take("."):
            cursor.number()
        if cursor.peek == "{":
            self._fail("templates are not supported; write the rule out")
        self._blank()
        cursor.need(":", f" after the name {name!r}")
        self.inside = name if name.isupper() else ""
        self._define(name, self._choice(), start)

    def _define(self, name: str, node: Node, start: int) -> None:
        if name in self.rules:
            self.cursor.fail(f"{name!r} is defined twice", start)
        self.rules[name] = node

    def _fail(self, problem: str) -> NoReturn:
        self.cursor.fail(problem)

    def _choice(self) -> Node:
        options = [self._sequence()]
        while self.cursor.take("|"):
            options.append(self._sequence())
        return alt(*options)

    def _sequence(self) -> Node:
        items: list[Node] = []
        while True:
            self._blank()
            if self.cursor.peek in ("", "|", ")", "]", "\n"):
                return seq(*items)
            if self.cursor.take("->"):
                self._blank()
                self._name()
                continue
            items.append(self._repeated(self._item()))

    def _repeated(self, item: Node) -> Node:
        cursor = self.cursor
        while True:
            if cursor.take("*"):
                item = Repeat(item, 0, None)
            elif cursor.take("+"):
                item = Repeat(item, 1, None)
            elif cursor.take("?"):
                item = Repeat(item, 0, 1)
            else:
                self._blank()
                if not cursor.take("~"):
                    return item
                self._blank()
                least = cursor.number()
                if least is None:
                    self._fail("a number expected after ~")
                most = cursor.number() if cursor.take("..") else least
                if most is None or most < least:
                    self._fail(f"~{least}..{most} asks for more than it allows")
                item = Repeat(item, least, most)

    def _item(self) -> Node:
        cursor, start = self.cursor, self.cursor.at
        if cursor.take("(") or cursor.take("["):
            closing = ")" if cursor.source[start] == "(" else "]"
            cursor.enter()
            inner = self._choice()
            self._lines()
            cursor.need(closing, " to close the group")
            cursor.leave()
            return inner if closing == ")" else optional(inner)
        if cursor.take('"'):
            return self._terminal(self._text())
        if cursor.peek == "/":
            return self._terminal(self._pattern())
        name = self._name()
        if name is None:
            self._fail(f"{cursor.peek!r} begins neither a text, a pattern, a group nor a name")
        self.used.setdefault(name, start)
        return self._terminal(Ref(name)) if name.isupper() else Ref(name)

    def _terminal(self, node: Node) -> Node:
        """With what may be ignored behind it, where a terminal is used in a rule."""
        return node if self.inside or not self.skips else seq(node, Ref(IGNORED))

    def _text(self) -> Node:
        cursor = self.cursor
        text = self._quoted()
        if cursor.source.startswith('.."', cursor.at):
            cursor.at += 3
            start, last = cursor.at, self._quoted()
            if len(text) != 1 or len(last) != 1 or text > last:
                cursor.fail('a range is written "a".."z", from a character to a later one', start)
            return characters(tidy([(ord(text), ord(last))]))
        if cursor.take("i"):
            return node_of(Cat(tuple(Chars(_cases(((ord(c), ord(c)),))) for c in text)), characters)
        return Lit(text.encode()) if text else NOTHING

    def _quoted(self) -> str:
        """A text behind its opening quote."""
        cursor, text = self.cursor, ""
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

    def _pattern(self) -> Node:
        cursor, start = self.cursor, self.cursor.at
        match = re.compile(r"/((?:[^/\\\n]|\\.)+)/([imslux]*)").match(cursor.source, start)
        if match is None:
            cursor.fail("this pattern does not end; it is written /.../ on one line")
        cursor.at = match.end()
        flags = set(match.group(2))
        if flags - {"i", "s", "u"}:
            cursor.fail(
                f"flags {', '.join(sorted(flags - set('isu')))} are not supported; i and s are", match.end() - 1
            )
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
