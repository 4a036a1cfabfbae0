"""Sets of JSON values: what a schema means, closed under intersection and union.

A set says for every JSON type which of its values it has: null or not, some of the two booleans, an automaton of
written numbers, and unions of shapes of strings, arrays and objects (see `schema_shapes`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from pertoken.core.errors import BadRequest
from pertoken.decode.grammar.automaton import NONE, Automaton, intersection, union
from pertoken.decode.grammar.json_text import NUMBERS
from pertoken.decode.grammar.schema_documents import FALSE, Conj
from pertoken.decode.grammar.schema_shapes import Items, Members, Text

MOST_SHAPES = 256
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
            _meets(self.strings, other.strings, ANYTHING.strings),
            _meets(self.arrays, other.arrays, ANYTHING.arrays),
            _meets(self.objects, other.objects, ANYTHING.objects),
        )

    def join(self, other: Values) -> Values:
        if self is NOTHING or other is NOTHING:
            return self if other is NOTHING else other
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
        if not any(shape.seen for shape in (*self.arrays, *self.objects)):
            return self
        return replace(
            self,
            arrays=tuple(dict.fromkeys(replace(shape, seen=0) for shape in self.arrays)),
            objects=tuple(dict.fromkeys(replace(shape, seen=()) for shape in self.objects)),
        )


def _meet_numbers(one: Automaton, other: Automaton) -> Automaton:
    if NUMBERS in (one, other):
        return other if one is NUMBERS else one
    return NONE if one.empty or other.empty else intersection(one, other)


def _meets(some: tuple[Shape, ...], others: tuple[Shape, ...], every: tuple[Any, ...]) -> tuple[Shape, ...]:
    if some is every or others is every or not some or not others:
        return others if some is every or not others else some
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


def anything(**but: Any) -> Values:
    """All values, but of some types these ones."""
    return Values(**{**vars(ANYTHING), **but})


def any_of(sets: Iterable[Values]) -> Values:
    found = NOTHING
    for values in sets:
        found = found.join(values)
    return found


def barred(conj: Conj) -> bool:
    """Whether a schema obviously allows nothing."""
    return conj >= FALSE or any((number, not sign) in conj for number, sign in conj)
