"""Reading grammars: a cursor over source text whose errors show line, column and a caret."""

from __future__ import annotations

from typing import NoReturn

from pertoken.core.errors import BadRequest

MOST_NESTED = 100
ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v", "0": "\0"}


class Cursor:
    """Where reading stands in a source text; what: the language, for messages."""

    def __init__(self, source: str, what: str):
        self.source, self.what, self.at, self.depth = source, what, 0, 0

    @property
    def peek(self) -> str:
        """The next character, empty at the end."""
        return self.source[self.at : self.at + 1]

    def take(self, text: str) -> bool:
        """Go past `text` if it comes next."""
        if not self.source.startswith(text, self.at):
            return False
        self.at += len(text)
        return True

    def next(self, wanted: str) -> str:
        """Go past the next character, whatever it is."""
        if not self.peek:
            self.fail(f"it ends where {wanted} should be")
        self.at += 1
        return self.source[self.at - 1]

    def need(self, text: str, why: str = "") -> None:
        if not self.take(text):
            found = repr(self.peek) if self.peek else "the end"
            self.fail(f"{text!r} expected{why}, found {found}")

    def number(self) -> int | None:
        """A decimal number, if one comes next."""
        start = self.at
        while self.peek.isascii() and self.peek.isdigit():
            self.at += 1
        if self.at - start > 9:
            self.fail("this number is too large for a repetition", start)
        return int(self.source[start : self.at]) if self.at > start else None

    def hexadecimal(self, digits: int) -> int:
        text = self.source[self.at : self.at + digits]
        if len(text) < digits or any(c not in "0123456789abcdefABCDEF" for c in text):
            self.fail(f"{digits} hexadecimal digits expected")
        self.at += digits
        return int(text, 16)

    def bounds(self) -> tuple[int, int | None]:
        """What stands in the braces of {m}, {m,}, {,n} or {m,n}, behind the first brace."""
        start = self.at
        least = self.number()
        most = least
        if self.take(","):
            most = self.number()
        elif least is None:
            self.fail("a number expected in {...}")
        self.need("}")
        least = least or 0
        if most is not None and most < least:
            self.fail(f"{{{least},{most}}} asks for more than it allows", start)
        return least, most

    def enter(self) -> None:
        self.depth += 1
        if self.depth > MOST_NESTED:
            self.fail(f"groups are nested more than {MOST_NESTED} deep")

    def leave(self) -> None:
        self.depth -= 1

    def fail(self, problem: str, at: int | None = None) -> NoReturn:
        """Raise `BadRequest` with the line and a caret under the place."""
        at = self.at if at is None else at
        line = self.source.count("\n", 0, at) + 1
        start = self.source.rfind("\n", 0, at) + 1
        end = self.source.find("\n", at)
        text = self.source[start : len(self.source) if end < 0 else end]
        column = at - start
        cut = max(0, column - 60)
        shown = f"  {text[cut : cut + 100]}\n  {' ' * (column - cut)}^"
        raise BadRequest(f"{self.what}, line {line}, column {column + 1}: {problem}\n{shown}")
