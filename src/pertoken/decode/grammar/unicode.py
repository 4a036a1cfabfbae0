"""Sets of characters as byte automata: UTF-8 in the node language of `ir`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

from pertoken.decode.grammar.ir import EMPTY, Node, Set, alt, seq

TOP = 0x10FFFF
SURROGATES = (0xD800, 0xDFFF)
Ranges = tuple[tuple[int, int], ...]
ANY: Ranges = ((0, 0xD7FF), (0xE000, TOP))
LINE_ENDS: Ranges = ((10, 10), (13, 13), (0x2028, 0x2029))


def tidy(ranges: Iterable[Sequence[int]]) -> Ranges:
    """Sorted, joined, without surrogates."""
    found: list[tuple[int, int]] = []
    for low, high in sorted((low, high) for low, high in ranges):
        if found and low <= found[-1][1] + 1:
            found[-1] = (found[-1][0], max(high, found[-1][1]))
        elif low <= high:
            found.append((low, high))
    return minus(found, (SURROGATES,)) if any(h >= 0xD800 and lo <= 0xDFFF for lo, h in found) else tuple(found)


def minus(ranges: Iterable[tuple[int, int]], taken: Iterable[tuple[int, int]]) -> Ranges:
    """Characters of the first that are not in the second."""
    rest = list(ranges)
    for low, high in taken:
        after = []
        for first, last in rest:
            if last < low or first > high:
                after.append((first, last))
                continue
            if first < low:
                after.append((first, low - 1))
            if last > high:
                after.append((high + 1, last))
        rest = after
    return tuple(rest)


def complement(ranges: Iterable[tuple[int, int]]) -> Ranges:
    return minus(ANY, ranges)


def intersect(one: Iterable[tuple[int, int]], other: Iterable[tuple[int, int]]) -> Ranges:
    return minus(one, complement(tidy(other)))


PLAIN: Ranges = ((0x20, 0x21), (0x23, 0x5B), (0x5D, 0x7F))  # one byte, and JSON writes them as they are
NOT_PLAIN = complement(PLAIN)


@lru_cache(maxsize=4096)
def parted(ranges: Ranges) -> tuple[Ranges, Ranges]:
    """The characters of a set in `PLAIN`, and the others."""
    return minus(ranges, NOT_PLAIN), minus(ranges, PLAIN)


def _span(low: int, high: int) -> Set:
    return Set((1 << (high + 1)) - (1 << low))


def _split(low: bytes, high: bytes) -> list[Node]:
    """Byte sequences between two of equal length, both given with the same number of continuation bytes."""
    if len(low) == 1:
        return [_span(low[0], high[0])]
    if low[0] == high[0]:
        return [seq(_span(low[0], low[0]), *([alt(*_split(low[1:], high[1:]))]))]
    found: list[Node] = []
    first, last = low[0], high[0]
    tail = len(low) - 1
    if low[1:] != b"\x80" * tail:
        found.append(seq(_span(first, first), alt(*_split(low[1:], b"\xbf" * tail))))
        first += 1
    end = None
    if high[1:] != b"\xbf" * tail:
        end = seq(_span(last, last), alt(*_split(b"\x80" * tail, high[1:])))
        last -= 1
    if first <= last:
        found.append(seq(_span(first, last), *[_span(0x80, 0xBF)] * tail))
    return [*found, end] if end is not None else found


@lru_cache(maxsize=1024)
def characters(ranges: Ranges) -> Node:
    """One character of a set, as UTF-8."""
    found: list[Node] = []
    for low, high in ranges:
        for edge in (0x7F, 0x7FF, 0xFFFF, TOP):
            if low > high:
                break
            if low <= edge:
                top = min(high, edge)
                found += _split(chr(low).encode(), chr(top).encode())
                low = top + 1
    return alt(*found) if found else EMPTY
