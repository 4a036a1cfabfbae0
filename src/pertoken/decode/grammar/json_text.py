"""How JSON values are written: characters of strings, numbers and their bounds as automata over their digits.

Numbers that some keyword restricts are written without an exponent: the order and the divisibility of such decimals can
be told by a finite automaton from left to right. Strings that some keyword restricts are written as `json.dumps` with
`ensure_ascii=False` does, so that a text has one spelling.
"""

from __future__ import annotations

import json
from decimal import Decimal
from functools import lru_cache
from json.encoder import encode_basestring

from pertoken.core.errors import BadRequest
from pertoken.decode.grammar.automaton import Automaton, Edges, trimmed, words
from pertoken.decode.grammar.ir import EMPTY, Lit, Node, Repeat, alt, byte_set, seq
from pertoken.decode.grammar.regex_automaton import automaton
from pertoken.decode.grammar.regex_reader import parse
from pertoken.decode.grammar.unicode import Ranges, characters, complement, minus

BARE: Ranges = complement(((0, 0x1F), (0x22, 0x22), (0x5C, 0x5C)))  # what may stand in a string without a backslash
MOST_DIVISOR = 4096


NOT_BARE = complement(BARE)


@lru_cache(maxsize=4096)
def written(ranges: Ranges) -> Node:
    """One character of a set inside a string, in `json.dumps`' spelling."""
    escaped = [code for low, high in minus(ranges, BARE) for code in range(low, high + 1) if code < 0x5D]
    bare = characters(minus(ranges, NOT_BARE))
    return alt(*(Lit(json.dumps(chr(code))[1:-1].encode()) for code in escaped), bare) if escaped else bare


def any_character() -> Node:
    """One character inside a string, in any spelling; halves of surrogate pairs only together."""
    digit, hexa = byte_set(range(48, 58)), byte_set(b"0123456789abcdefABCDEF")
    lower, upper = byte_set(b"89abAB"), byte_set(b"cdefCDEF")
    pair = seq(byte_set(b"dD"), lower, hexa, hexa, Lit(b"\\u"), byte_set(b"dD"), upper, hexa, hexa)
    single = alt(
        seq(alt(digit, byte_set(b"abcefABCEF")), hexa, hexa, hexa),
        seq(byte_set(b"dD"), byte_set(b"01234567"), hexa, hexa),
    )
    return alt(characters(BARE), seq(Lit(b"\\"), alt(byte_set(b'"\\/bfnrt'), seq(Lit(b"u"), alt(single, pair)))))


def quoted(inner: Node) -> Node:
    return EMPTY if inner == EMPTY else seq(Lit(b'"'), inner, Lit(b'"'))


def any_string(least: int = 0, most: int | None = None) -> Node:
    return quoted(Repeat(any_character(), least, most))


def spelling(text: str) -> bytes:
    """A string as `json.dumps` with `ensure_ascii=False` writes it."""
    return encode_basestring(text).encode()


def compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


NUMBERS = automaton(parse(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?"))
DECIMALS = automaton(parse(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?"))
INTEGERS = automaton(parse(r"-?(?:0|[1-9][0-9]*)"))
WHOLE = automaton(parse(r"-?(?:0|[1-9][0-9]*)(?:\.0+)?"))


def exactly(value: Decimal) -> Automaton:
    """All decimals of this value."""
    return _signed(value, frozenset({0}))


def spelled(value: int | float) -> Automaton:
    """This number as `json.dumps` writes it."""
    return words([json.dumps(value)])


def bound(value: Decimal, above: bool, inclusive: bool) -> Automaton:
    """All decimals on one side of a value."""
    return _signed(value, frozenset({1 if above else -1} | ({0} if inclusive else set())))


def _signed(value: Decimal, wanted: frozenset[int]) -> Automaton:
    """Decimals whose comparison with a value (-1, 0, 1) is one of those wanted."""
    edges: Edges = [[]]
    finals: list[int] = []
    for sign in (1, -1):
        machine, outcome = _compare(abs(value))
        offset = len(edges)
        edges += [[(low, high, to + offset) for low, high, to in row] for row in machine]
        for state, result in outcome.items():
            if value.is_zero():
                result *= sign
            elif (value > 0) != (sign > 0):
                result = sign
            else:
                result *= sign
            if result in wanted:
                finals.append(state + offset)
        if sign > 0:
            edges[0] += edges[offset]
        else:
            edges[0].insert(0, (45, 45, offset))
    return trimmed(edges, finals)


@lru_cache(maxsize=256)
def _compare(value: Decimal) -> tuple[Edges, dict[int, int]]:
    """Automaton of unsigned decimals and how a text that ends in a state compares with a value >= 0."""
    digits, _, fraction = f"{value:f}".partition(".")
    fraction = fraction.rstrip("0")
    if len(digits) + len(fraction) > 1000:
        raise BadRequest(f"a bound of {len(digits) + len(fraction)} digits is too long; at most 1000 are supported")
    numbers: dict[tuple[str, int, int], int] = {}
    edges: Edges = []
    outcome: dict[int, int] = {}

    def state(kind: str, at: int, order: int) -> int:
        """start; int: `at` digits read, order so far; zero: a lone 0; dot: behind the point; frac."""
        key = (kind, at, order)
        if key not in numbers:
            numbers[key] = len(edges)
            edges.append([])
            fill(numbers[key], *key)
        return numbers[key]

    def fill(number: int, kind: str, at: int, order: int) -> None:
        row: list[tuple[int, int, int]] = []
        if kind in ("int", "zero"):
            length = (at > len(digits)) - (at < len(digits))
            whole = length or order
            outcome[number] = whole or (-1 if fraction else 0)
            row.append((46, 46, state("dot", 0, whole)))
        if kind == "frac":
            outcome[number] = order or (-1 if at < len(fraction) else 0)
        if kind != "zero":
            for digit in range(48, 58):
                if kind in ("start", "int"):
                    here = ord(digits[at]) if at < len(digits) else 48
                    now = order or (digit > here) - (digit < here)
                    after = ("zero" if kind == "start" and digit == 48 else "int", min(at + 1, len(digits) + 1), now)
                else:
                    here = ord(fraction[at]) if at < len(fraction) else 48
                    now = order or (digit > here) - (digit < here)
                    after = ("frac", 0 if now else min(at + 1, len(fraction)), now)
                to = state(*after)
                if row and row[-1][2] == to and row[-1][1] == digit - 1:
                    row[-1] = (row[-1][0], digit, to)
                else:
                    row.append((digit, digit, to))
        edges[number] = row

    state("start", 0, 0)
    return edges, outcome


@lru_cache(maxsize=256)
def multiples(divisor: Decimal) -> Automaton:
    """All decimals that a positive number divides."""
    scale = max(-int(divisor.normalize().as_tuple().exponent), 0)
    modulus = int(divisor.scaleb(scale))
    if modulus * (scale + 2) > MOST_DIVISOR:
        raise BadRequest(
            f"multipleOf {divisor} needs too many states; at most {MOST_DIVISOR} (digits without the point)"
        )
    shift = pow(10, scale, modulus) if modulus > 1 else 0
    numbers: dict[tuple[str, int, int], int] = {("minus", 0, 0): 0}
    order, edges, finals = [("minus", 0, 0)], [], []
    for kind, at, rest in order:
        row: list[tuple[int, int, int]] = []
        after: list[tuple[int, tuple[str, int, int]]] = []
        if kind == "minus":
            after.append((45, ("start", 0, 0)))
        if kind in ("int", "zero"):
            after.append((46, ("frac", 0, rest * shift % modulus)))
            if rest * shift % modulus == 0:
                finals.append(len(edges))
        if kind == "frac" and at > 0 and rest == 0:
            finals.append(len(edges))
        for digit in range(10) if kind != "zero" else ():
            if kind != "frac":
                lone = kind != "int" and digit == 0
                after.append((48 + digit, ("zero" if lone else "int", 0, (rest * 10 + digit) % modulus)))
            elif at < scale:
                after.append((48 + digit, ("frac", at + 1, (rest + digit * 10 ** (scale - at - 1)) % modulus)))
            elif digit == 0:
                after.append((48, ("frac", max(at, 1), rest)))
        for code, key in after:
            if key not in numbers:
                numbers[key] = len(order)
                order.append(key)
            row.append((code, code, numbers[key]))
        edges.append(row)
    return trimmed(edges, finals)
