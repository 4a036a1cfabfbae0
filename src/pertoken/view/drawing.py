"""Where things go in the report's drawings: bars in units of one step, and the node-link picture of one token tree."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pertoken.core.decision import SOURCES
from pertoken.view.spans import CORRECTED, Bar, Turn, marked

REFUSED = "refused"
CHARACTER, PAD, GAP = 7.3, 7, 22
ROW, BOX, LONGEST = 26, 20, 14
MARGIN = 4


@dataclass(frozen=True)
class Segment:
    """A part of a step's bar: what it counts and its extent from the bottom, in guesses."""

    kind: str
    start: int
    height: int


@dataclass(frozen=True)
class Node:
    """A box with its left edge, middle line, width, text, kind, and tooltip."""

    x: float
    y: float
    width: float
    text: str
    kind: str
    title: str


@dataclass(frozen=True)
class Link:
    """An SVG path between two boxes; kept if both are on the committed path."""

    path: str
    kept: bool


@dataclass(frozen=True)
class Picture:
    """A tree drawn to scale, in pixels."""

    width: float
    height: float
    nodes: list[Node]
    links: list[Link]


def segments(bar: Bar) -> list[Segment]:
    """Accepted guesses by source, then the refused ones on top."""
    found, at = [], 0
    for source in SOURCES:
        if bar.accepted[source]:
            found.append(Segment(source, at, bar.accepted[source]))
            at += bar.accepted[source]
    return [*found, Segment(REFUSED, at, bar.drafted - at)] if bar.drafted > at else found


def telling(found: Sequence[Turn]) -> list[Turn]:
    """Up to three turns that show how a decoder went about it: most accepted, widest, and none accepted."""
    guessed = [turn for turn in found if turn.tokens]
    if not guessed:
        return []
    best = max(guessed, key=lambda turn: (len(turn.path), -len(turn.tokens)))
    widest = max(guessed, key=lambda turn: (len(turn.tokens) - len(turn.path), -turn.step))
    vain = max((turn for turn in guessed if not turn.path), key=lambda turn: len(turn.tokens), default=best)
    unique = {(turn.step, turn.row): turn for turn in (best, widest, vain)}
    return list(unique.values())


def tree_picture(turn: Turn, before: str, names: Mapping[int, str]) -> Picture:
    """The guesses of a turn from left to right; the committed path is the top line, the model's own token at its end.

    before: text of the token that the guesses go on from; names: text by token id.
    """
    tokens, parents = list(turn.tokens), list(turn.parents)
    kinds = [turn.sources[node] if node in turn.path else REFUSED for node in range(len(tokens))]
    kept = set(turn.path)
    if len(turn.committed) > len(turn.path):
        kept.add(len(tokens))
        kinds.append(turn.kinds()[-1])
        tokens.append(turn.committed[-1])
        parents.append(turn.end)
    lines, depths = _places(parents, kept)
    texts = {-1: _short(before)} | {node: _short(names.get(token) or f"#{token}") for node, token in enumerate(tokens)}
    starts, widths, right = _columns(texts, depths)
    nodes, links = [], []
    for node, text in texts.items():
        x, y = starts[depths[node]], MARGIN + lines[node] * ROW + BOX / 2
        kind = kinds[node] if node >= 0 else "root"
        nodes.append(Node(x, y, widths[depths[node]], text, kind, _title(node, kind, tokens, names, before)))
        if node >= 0:
            left, height = starts[depths[parents[node]]] + widths[depths[parents[node]]], MARGIN + BOX / 2
            bend, above = (left + x) / 2, lines[parents[node]] * ROW + height
            links.append(
                Link(f"M{left:.1f} {above:.1f}C{bend:.1f} {above:.1f} {bend:.1f} {y:.1f} {x:.1f} {y:.1f}", node in kept)
            )
    return Picture(
        right, max(lines.values()) * ROW + BOX + 2 * MARGIN, nodes, sorted(links, key=lambda link: link.kept)
    )


def _places(parents: Sequence[int], kept: set[int]) -> tuple[dict[int, int], dict[int, int]]:
    """Line and depth of every node; -1 is the root. First children share their parent's line."""
    children: dict[int, list[int]] = defaultdict(list)
    for node, parent in enumerate(parents):
        children[parent].append(node)
    tall = dict.fromkeys(range(-1, len(parents)), 1)
    for node in reversed(range(-1, len(parents))):
        tall[node] = max(1, sum(tall[child] for child in children[node]))
    lines, depths = {-1: 0}, {-1: 0}
    for node in range(-1, len(parents)):
        line = lines[node]
        for child in sorted(children[node], key=lambda child: child not in kept):
            lines[child], depths[child] = line, depths[node] + 1
            line += tall[child]
    return lines, depths


def _columns(texts: Mapping[int, str], depths: Mapping[int, int]) -> tuple[list[float], list[float], float]:
    """Left edge and width of each depth's boxes, and the right edge of all."""
    longest = [0] * (max(depths.values()) + 1)
    for node, text in texts.items():
        longest[depths[node]] = max(longest[depths[node]], len(text))
    widths = [length * CHARACTER + 2 * PAD for length in longest]
    starts = [MARGIN + sum(widths[:depth]) + depth * GAP for depth in range(len(widths))]
    return starts, widths, starts[-1] + widths[-1] + MARGIN


def _short(text: str) -> str:
    shown = marked(text) or "·"
    return shown if len(shown) <= LONGEST else shown[: LONGEST - 1] + "…"


def _title(node: int, kind: str, tokens: Sequence[int], names: Mapping[int, str], before: str) -> str:
    if node < 0:
        return f"last token before the step: {marked(before)}"
    role = {REFUSED: "guess not taken", CORRECTED: "the model's own token instead"}.get(kind, "committed")
    return f"{marked(names.get(tokens[node], ''))} (token {tokens[node]}): {role}"
