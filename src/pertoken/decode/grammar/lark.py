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

from pertoken.decode.grammar.gbnf import finish
from pertoken.decode.grammar.ir import Grammar, Node, Ref, Repeat, alt, optional, seq, star
from pertoken.decode.grammar.lark_terminals import COMMON, common, pattern, text
from pertoken.decode.grammar.text import Cursor

NAME = re.compile(r"[a-z_][a-z0-9_]*|_?[A-Z][A-Z0-9_]*")
BLANK = re.compile(r"(?:[ \t\f\r]|//[^\n]*|\n(?=[ \t\r\n]*(?:\||//)))*")
LINES = re.compile(r"(?:\s|//[^\n]*)*")
IGNORED = "ignored"


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
            self._define(name_here, common(name), start)
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
            return self._terminal(text(cursor))
        if cursor.peek == "/":
            return self._terminal(pattern(cursor))
        name = self._name()
        if name is None:
            self._fail(f"{cursor.peek!r} begins neither a text, a pattern, a group nor a name")
        self.used.setdefault(name, start)
        return self._terminal(Ref(name)) if name.isupper() else Ref(name)

    def _terminal(self, node: Node) -> Node:
        """With what may be ignored behind it, where a terminal is used in a rule."""
        return node if self.inside or not self.skips else seq(node, Ref(IGNORED))
