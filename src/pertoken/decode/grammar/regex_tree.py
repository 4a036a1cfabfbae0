"""Regular expressions as trees over characters."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from pertoken.decode.grammar.ir import remembering
from pertoken.decode.grammar.unicode import ANY, Ranges


@dataclass(frozen=True)
class Chars:
    """One character of a set."""

    ranges: Ranges


@remembering
@dataclass(frozen=True)
class Cat:
    """One after another; nothing at all for none."""

    items: tuple[Regex, ...]


@remembering
@dataclass(frozen=True)
class Or:
    """One of these."""

    items: tuple[Regex, ...]


@remembering
@dataclass(frozen=True)
class Times:
    """At least `least` times, at most `most` (None: no limit)."""

    item: Regex
    least: int
    most: int | None


@dataclass(frozen=True)
class Anchor:
    """The beginning or the end of the text."""

    end: bool


Regex = Chars | Cat | Or | Times | Anchor
ANYTHING = Times(Chars(ANY), 0, None)


def search(pattern: Regex) -> Regex:
    """The texts in which a pattern matches somewhere; anchors at its ends are used up, others stay."""
    if isinstance(pattern, Or):
        return Or(tuple(search(item) for item in pattern.items))
    items = list(pattern.items if isinstance(pattern, Cat) else (pattern,))
    before = after = ANYTHING
    while items and items[0] == Anchor(end=False):
        items.pop(0)
        before = Cat(())
    while items and items[-1] == Anchor(end=True):
        items.pop()
        after = Cat(())
    return Cat((before, *items, after))


@lru_cache(maxsize=4096)
def anchored(pattern: Regex) -> bool:
    """Whether any anchor is left in a pattern."""
    if isinstance(pattern, (Cat, Or)):
        return any(anchored(item) for item in pattern.items)
    return isinstance(pattern, Anchor) or (isinstance(pattern, Times) and anchored(pattern.item))


@lru_cache(maxsize=4096)
def possible(pattern: Regex) -> bool:
    """Whether any text matches a pattern without anchors."""
    if isinstance(pattern, Chars):
        return bool(pattern.ranges)
    if isinstance(pattern, Times):
        return pattern.least == 0 or possible(pattern.item)
    assert isinstance(pattern, (Cat, Or))
    return (all if isinstance(pattern, Cat) else any)(possible(item) for item in pattern.items)
