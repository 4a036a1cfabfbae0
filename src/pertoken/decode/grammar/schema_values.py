"""Sets of JSON values: what a schema means, closed under intersection and union.

A set says for every JSON type which of its values it has: null or not, some of the two booleans, an automaton of
written numbers, and unions of *shapes* of strings, arrays and objects. A shape is a conjunction; what it says of inner
values it says by their schemas (`Conj`), which are looked at only when they are needed, so that schemas may refer to
themselves.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

from pertoken.core.errors import BadRequest
from pertoken.decode.grammar.automaton import (
    ALL,
    NONE,
    Automaton,
    automaton,
    difference,
    intersection,
    lengths,
    union,
    words,
)
from pertoken.decode.grammar.json_text import NUMBERS
from pertoken.decode.grammar.regex import Regex
from pertoken.decode.grammar.schema_documents import FALSE, TRUE, Conj

MOST_SHAPES = 256
EVERY = 1 << 30  # more items than any array has


def _lower(one: int | None, other: int | None) -> int | None:
    return other if one is None else one if other is None else min(one, other)


@dataclass(frozen=True)
class Text:
    """Strings of `least` to `most` characters that are in all of `parts`."""

    least: int = 0
    most: int | None = None
    parts: tuple[Regex | Automaton, ...] = ()

    def meet(self, other: Text) -> Text | None:
        least, most = max(self.least, other.least), _lower(self.most, other.most)
        if most is not None and least > most:
            return None
        return Text(least, most, tuple(dict.fromkeys(self.parts + other.parts)))

    @cached_property
    def automaton(self) -> Automaton:
        found = ALL
        for part in self.parts:
            found = intersection(found, part if isinstance(part, Automaton) else automaton(part))
        if self.least == 0 and self.most is None:
            return found
        return intersection(found, lengths(self.least, self.most))


@dataclass(frozen=True)
class Names:
    """A set of member names: these texts, or all but these, or those of an automaton."""

    texts: frozenset[str] = frozenset()
    inverted: bool = False
    other: Automaton | None = None

    def has(self, name: str) -> bool:
        return self.other.has(name) if self.other is not None else (name in self.texts) != self.inverted

    @cached_property
    def automaton(self) -> Automaton:
        if self.other is not None:
            return self.other
        return difference(ALL, words(self.texts)) if self.inverted else words(self.texts)

    def meet(self, other: Names) -> Names:
        if self.other is None and other.other is None:
            if self.inverted and other.inverted:
                return Names(self.texts | other.texts, inverted=True)
            if self.inverted or other.inverted:
                some, barred = (other, self) if self.inverted else (self, other)
                return Names(some.texts - barred.texts)
            return Names(self.texts & other.texts)
        return Names(other=intersection(self.automaton, other.automaton))

    def without(self, other: Names) -> Names:
        if other.other is None:
            return self.meet(Names(other.texts, not other.inverted))
        return Names(other=difference(self.automaton, other.automaton))

    @property
    def empty(self) -> bool:
        return self.other.empty if self.other is not None else not (self.inverted or self.texts)


EVERY_NAME = Names(inverted=True)


@dataclass(frozen=True)
class Items:
    """Arrays: schemas of the first items and of the rest, how many, how many of those from an index on match a schema
    (`contains`: index, schema, least, most), whether all differ. seen: items that some keyword has looked at."""

    prefix: tuple[Conj, ...] = ()
    rest: Conj = TRUE
    least: int = 0
    most: int | None = None
    contains: tuple[tuple[int, Conj, int, int | None], ...] = ()
    unique: bool = False
    seen: int = 0

    def at(self, index: int) -> Conj:
        return self.prefix[index] if index < len(self.prefix) else self.rest

    def meet(self, other: Items) -> Items | None:
        least, most = max(self.least, other.least), _lower(self.most, other.most)
        if most is not None and least > most:
            return None
        size = max(len(self.prefix), len(other.prefix))
        return Items(
            tuple(self.at(i) | other.at(i) for i in range(size)),
            self.rest | other.rest,
            least,
            most,
            tuple(dict.fromkeys(self.contains + other.contains)),
            self.unique or other.unique,
            max(self.seen, other.seen),
        )


@dataclass(frozen=True)
class Members:
    """Objects: schemas of the members whose names are in a set (all `rules` hold); names in the order in which they are
    written; names that must be there; how many members; sets of names of which one must be there (`some`). seen: names
    that some keyword has looked at."""

    rules: tuple[tuple[Names, Conj], ...] = ()
    order: tuple[str, ...] = ()
    required: frozenset[str] = frozenset()
    least: int = 0
    most: int | None = None
    some: tuple[Names, ...] = ()
    seen: tuple[Names, ...] = ()

    def meet(self, other: Members) -> Members | None:
        least, most = max(self.least, other.least), _lower(self.most, other.most)
        required = self.required | other.required
        if most is not None and max(least, len(required)) > most:
            return None
        return Members(
            tuple(dict.fromkeys(self.rules + other.rules)),
            tuple(dict.fromkeys(self.order + other.order)),
            required,
            least,
            most,
            tuple(dict.fromkeys(self.some + other.some)),
            tuple(dict.fromkeys(self.seen + other.seen)),
        )

    def of(self, name: str) -> Conj:
        """What the value of a name must match."""
        return TRUE.union(*(conj for names, conj in self.rules if names.has(name)))


Shape = TypeVar("Shape", Text, Items, Members)


@dataclass(frozen=True)
class Values:
    """A set of JSON values."""

    null: bool = False
    booleans: frozenset[bool] = frozenset()
    numbers: Automaton = NONE
    strings: tuple[Text, ...] = ()
    arrays: tuple[Items, ...] = ()
    objects: tuple[Members, ...] = ()

    def meet(self, other: Values) -> Values:
        if self is ANYTHING or other is ANYTHING:
            return self if other is ANYTHING else other
        return Values(
            self.null and other.null,
            self.booleans & other.booleans,
            _meet_numbers(self.numbers, other.numbers),
            _meets(self.strings, other.strings),
            _meets(self.arrays, other.arrays),
            _meets(self.objects, other.objects),
        )

    def join(self, other: Values) -> Values:
        return Values(
            self.null or other.null,
            self.booleans | other.booleans,
            NUMBERS if NUMBERS in (self.numbers, other.numbers) else union(self.numbers, other.numbers),
            _joined(self.strings + other.strings, Text()),
            _joined(self.arrays + other.arrays, Items()),
            _joined(self.objects + other.objects, Members()),
        )

    def plain(self) -> Values:
        """Without the record of what keywords have looked at."""
        return replace(
            self,
            arrays=tuple(dict.fromkeys(replace(shape, seen=0) for shape in self.arrays)),
            objects=tuple(dict.fromkeys(replace(shape, seen=()) for shape in self.objects)),
        )


def _meet_numbers(one: Automaton, other: Automaton) -> Automaton:
    if NUMBERS in (one, other):
        return other if one is NUMBERS else one
    return NONE if one.empty or other.empty else intersection(one, other)


def _meets(some: tuple[Shape, ...], others: tuple[Shape, ...]) -> tuple[Shape, ...]:
    if len(some) * len(others) > MOST_SHAPES:
        raise BadRequest(
            f"schemas that must hold together have {len(some)} and {len(others)} alternatives, which makes more than "
            f"{MOST_SHAPES} cases; give fewer alternatives in anyOf, oneOf, not and allOf at one place"
        )
    found = (one.meet(other) for one in some for other in others)  # type: ignore[arg-type]
    return tuple(dict.fromkeys(shape for shape in found if shape is not None))


def _joined(shapes: tuple[Shape, ...], every: Shape) -> tuple[Shape, ...]:
    found = tuple(dict.fromkeys(shapes))
    if every in found and not any(getattr(shape, "seen", None) for shape in found):
        return (every,)
    if len(found) > MOST_SHAPES:
        raise BadRequest(f"a schema has more than {MOST_SHAPES} alternatives; give fewer at one place")
    return found


ANYTHING = Values(True, frozenset({True, False}), NUMBERS, (Text(),), (Items(),), (Members(),))
NOTHING = Values()


def any_of(sets: Iterable[Values]) -> Values:
    found = NOTHING
    for values in sets:
        found = found.join(values)
    return found


def barred(conj: Conj) -> bool:
    """Whether a schema obviously allows nothing."""
    return conj >= FALSE or any((number, not sign) in conj for number, sign in conj)
