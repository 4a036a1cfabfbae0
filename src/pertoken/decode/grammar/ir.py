"""What every front end parses into: rules over bytes.

A node is one of `Lit`, `Set`, `Seq`, `Alt`, `Repeat`, `Ref`, `Graph` and `Words`; a `Grammar` maps rule names to nodes.
All text is UTF-8 bytes by then. `EMPTY` matches nothing at all, `NOTHING` the empty text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

Class = TypeVar("Class", bound=type)


def remembering(cls: Class) -> Class:
    """A frozen dataclass whose objects, large trees that are looked up often, compute their hash once."""
    kind: Any = cls
    compute = kind.__hash__

    def remembered(self: Any) -> int:
        found = self.__dict__.get("_hash")
        if found is None:
            found = self.__dict__["_hash"] = compute(self)
        return found

    kind.__hash__ = remembered
    return cls


@dataclass(frozen=True, slots=True)
class Lit:
    """These bytes."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Set:
    """One byte of a set; bit b of `mask` says whether byte b is in it."""

    mask: int


@remembering
@dataclass(frozen=True)
class Seq:
    """One after another."""

    items: tuple[Node, ...]


@remembering
@dataclass(frozen=True)
class Alt:
    """One of these."""

    items: tuple[Node, ...]


@remembering
@dataclass(frozen=True)
class Repeat:
    """At least `least` times, at most `most` (None: no limit)."""

    item: Node
    least: int
    most: int | None


@dataclass(frozen=True, slots=True)
class Ref:
    """What the rule of this name matches."""

    name: str


@remembering
@dataclass(frozen=True)
class Graph:
    """An automaton whose edges (state, node, state) carry nodes; it starts in state 0 and may end in any of `finals`.

    It says in few states what a tree of the other nodes would repeat: shared suffixes, optional members with commas,
    results of set operations.
    """

    edges: tuple[tuple[int, Node, int], ...]
    finals: tuple[int, ...]


@remembering
@dataclass(frozen=True)
class Words:
    """One of these texts, at least two, sorted."""

    texts: tuple[bytes, ...]


Node = Lit | Set | Seq | Alt | Repeat | Ref | Graph | Words
NOTHING = Lit(b"")
EMPTY = Alt(())


@dataclass
class Grammar:
    """Rules and the name of the one to start with.

    plain: the front end vouches that no rule matches the empty text, that none is left-recursive and that all can end,
    so that no analysis is needed; known: rules that other grammars have too, so that their automata are worth keeping.
    """

    rules: dict[str, Node]
    root: str = "root"
    plain: bool = False
    known: tuple[str, ...] = ()


def seq(*items: Node) -> Node:
    """`Seq`, flattened, with neighbouring literals joined; `EMPTY` if one item is."""
    flat: list[Node] = []
    for item in items:
        for part in item.items if isinstance(item, Seq) else (item,):
            if isinstance(part, Lit):
                last = flat[-1] if flat else None
                if isinstance(last, Lit):
                    flat[-1] = Lit(last.data + part.data)
                elif part.data:
                    flat.append(part)
            elif isinstance(part, Alt) and not part.items:
                return EMPTY
            else:
                flat.append(part)
    if not flat:
        return NOTHING
    return flat[0] if len(flat) == 1 else Seq(tuple(flat))


def alt(*items: Node) -> Node:
    """`Alt`, flattened, with single bytes joined into one set."""
    if len(items) == 1:
        return items[0]
    flat: list[Node] = []
    mask = 0
    for item in items:
        for part in item.items if isinstance(item, Alt) else (item,):
            if isinstance(part, Set):
                mask |= part.mask
            elif isinstance(part, Lit) and len(part.data) == 1:
                mask |= 1 << part.data[0]
            else:
                flat.append(part)
    flat = list(dict.fromkeys(flat)) if len(flat) > 1 else flat
    if mask:
        flat.insert(0, Set(mask))
    return flat[0] if len(flat) == 1 else Alt(tuple(flat))


def optional(item: Node) -> Node:
    return Repeat(item, 0, 1)


def star(item: Node) -> Node:
    return Repeat(item, 0, None)


def plus(item: Node) -> Node:
    return Repeat(item, 1, None)


def byte_set(values: Iterable[int]) -> Set:
    mask = 0
    for value in values:
        mask |= 1 << value
    return Set(mask)


@lru_cache(maxsize=4096)
def ranges(mask: int) -> tuple[tuple[int, int], ...]:
    """Maximal runs (first, last) of the bytes in a set."""
    found, low = [], 0
    while mask >> low:
        low += ((mask >> low) & -(mask >> low)).bit_length() - 1
        run = ~(mask >> low)
        high = low + (run & -run).bit_length() - 2
        found.append((low, high))
        low = high + 1
    return tuple(found)


def literals(texts: Iterable[bytes]) -> Node:
    """One of many texts."""
    texts = sorted(set(texts))
    if len(texts) < 2:
        return Lit(texts[0]) if texts else EMPTY
    return Words(tuple(texts))


def children(node: Node) -> tuple[Node, ...]:
    """The nodes directly inside."""
    if isinstance(node, (Seq, Alt)):
        return node.items
    if isinstance(node, Repeat):
        return (node.item,)
    if isinstance(node, Graph):
        return tuple(inner for _, inner, _ in node.edges)
    return ()


def references(node: Node) -> Iterable[str]:
    """Names of the rules referred to, in order, with repetitions."""
    stack = [node]
    while stack:
        here = stack.pop()
        if isinstance(here, Ref):
            yield here.name
        else:
            stack.extend(reversed(children(here)))


def nullable(node: Node, rules: Mapping[str, bool]) -> bool:
    """Whether a node matches the empty text, given which rules do (unknown ones do not)."""
    if isinstance(node, Lit):
        return not node.data
    if isinstance(node, Set):
        return False
    if isinstance(node, Seq):
        return all(nullable(item, rules) for item in node.items)
    if isinstance(node, Alt):
        return any(nullable(item, rules) for item in node.items)
    if isinstance(node, Repeat):
        return node.least == 0 or nullable(node.item, rules)
    if isinstance(node, Ref):
        return rules.get(node.name, False)
    if isinstance(node, Words):
        return not node.texts[0]
    reached, stack = {0}, [0]
    while stack:
        at = stack.pop()
        for here, inner, after in node.edges:
            if here == at and after not in reached and nullable(inner, rules):
                reached.add(after)
                stack.append(after)
    return not reached.isdisjoint(node.finals)
