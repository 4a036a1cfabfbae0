"""Shapes of strings, arrays and objects: conjunctions of what keywords ask of them.

What a shape says of inner values it says by their schemas (`Conj`), which are looked at only when they are needed, so
that schemas may refer to themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from pertoken.decode.grammar.automaton import ALL, Automaton, difference, intersection, lengths, words
from pertoken.decode.grammar.ir import remembering
from pertoken.decode.grammar.regex_automaton import automaton
from pertoken.decode.grammar.regex_tree import Regex, anchored, possible
from pertoken.decode.grammar.schema_documents import TRUE, Conj

EVERY = 1 << 30  # more items than any array has


def _lower(one: int | None, other: int | None) -> int | None:
    return other if one is None else one if other is None else min(one, other)


@remembering
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

    @property
    def empty(self) -> bool:
        if not self.parts:
            return False
        if len(self.parts) == 1 and self.least == 0 and self.most is None and not isinstance(self.parts[0], Automaton):
            return self.automaton.empty if anchored(self.parts[0]) else not possible(self.parts[0])
        return self.automaton.empty

    @cached_property
    def automaton(self) -> Automaton:
        found = ALL
        for part in self.parts:
            found = intersection(found, part if isinstance(part, Automaton) else automaton(part))
        if self.least == 0 and self.most is None:
            return found
        return intersection(found, lengths(self.least, self.most))


@remembering
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


@remembering
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


@remembering
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

    @cached_property
    def _sorted(self) -> tuple[dict[str, Conj], list[tuple[Names, Conj]]]:
        """The rules of one name, joined by that name, and all others."""
        single: dict[str, Conj] = {}
        others = []
        for names, conj in self.rules:
            if names.other is None and not names.inverted and len(names.texts) == 1:
                (name,) = names.texts
                single[name] = single.get(name, TRUE) | conj
            else:
                others.append((names, conj))
        return single, others

    def of(self, name: str) -> Conj:
        """What the value of a name must match."""
        single, others = self._sorted
        return single.get(name, TRUE).union(*(conj for names, conj in others if names.has(name)))
