"""Line charts as SVG text, with bands of uncertainty, and nothing to install."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

COLOURS = ("#2f5fd0", "#d9822b", "#c23b4b", "#2e8b6f", "#7a55c7", "#6b7280")
INK, FAINT, GRID = "#1f2937", "#6b7280", "#e5e7eb"
LEFT, TOP, BOTTOM, LABEL = 62, 88, 50, 13


@dataclass(frozen=True)
class Line:
    """points: (x, y) in any order; band: (x, low, high); dashed: for what is compared with; a single point of a dashed
    line is a level across the chart; colour: None for the next of the chart's."""

    name: str
    points: Sequence[tuple[float, float]]
    band: Sequence[tuple[float, float, float]] = ()
    dashed: bool = False
    colour: str | None = None


@dataclass(frozen=True)
class Chart:
    """title, note: two lines on top; x, y: what the axes are; log: equal ratios of x are equally wide; ticks: of the x
    axis, with their texts; percent: y is a share; names stand at the lines' ends."""

    title: str
    x: str
    y: str
    lines: Sequence[Line]
    note: str = ""
    log: bool = False
    ticks: Sequence[tuple[float, str]] = ()
    percent: bool = False
    width: int = 720
    height: int = 420
    low: float | None = None
    high: float | None = None
    colours: Sequence[str] = field(default=COLOURS)

    def save(self, path: str | Path) -> Path:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.svg(), encoding="utf-8")
        return path

    def svg(self) -> str:
        """The picture. Points that are not finite are left out."""
        lines = [_finite(line) for line in self.lines]
        right = 24 + round(max((7.6 * len(line.name) for line in lines), default=0))
        x, y = self._axes(lines, right)
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            f'font-family="system-ui, Helvetica, Arial, sans-serif" font-size="12" fill="{FAINT}">',
            f'<rect width="{self.width}" height="{self.height}" fill="#fff"/>',
            _text(18, 26, self.title, size=16, fill=INK, weight="600"),
            _text(18, 46, self.note),
        ]
        parts += self._grid(x, y, right)
        labels = []
        for number, line in enumerate(lines):
            colour = line.colour or self.colours[number % len(self.colours)]
            parts += self._line(line, colour, x, y, right)
            if len(line.points) == 1 and not line.dashed:
                at, value = line.points[0]
                parts.append(_text(x.place(at) + 9, y.place(value) + 4, line.name, fill=colour, weight="600"))
            elif line.points:
                labels.append((y.place(max(line.points)[1]), line.name, colour))
        parts += [_text(self.width - right + 10, at + 4, name, fill=c, weight="600") for at, name, c in _apart(labels)]
        return "\n".join([*parts, "</svg>\n"])

    def _axes(self, lines: list[Line], right: int) -> tuple[_Axis, _Axis]:
        across = [x for line in lines for x, _ in line.points if len(line.points) > 1 or not line.dashed]
        across += [x for x, _ in self.ticks]
        up = [v for line in lines for _, v in line.points] + [
            v for line in lines for _, *both in line.band for v in both
        ]
        low = self.low if self.low is not None else min(up, default=0.0)
        high = self.high if self.high is not None else max(up, default=1.0)
        x = _Axis(min(across, default=0.0), max(across, default=1.0), LEFT + 14, self.width - right - 6, self.log)
        return x, _Axis(low, high, self.height - BOTTOM, TOP, False).rounded()

    def _grid(self, x: _Axis, y: _Axis, right: int) -> list[str]:
        end, parts = self.width - right, []
        for value in y.ticks():
            at = y.place(value)
            text = f"{100 * value:.6g} %" if self.percent else f"{value:.6g}"
            parts.append(f'<line x1="{LEFT}" x2="{end}" y1="{at:.1f}" y2="{at:.1f}" stroke="{GRID}"/>')
            parts.append(_text(LEFT - 8, at + 4, text, anchor="end"))
        for value, text in self.ticks or [(v, _short(v)) for v in x.ticks()]:
            at, foot = x.place(value), self.height - BOTTOM
            parts.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{foot}" y2="{foot + 4}" stroke="{FAINT}"/>')
            parts.append(_text(at, foot + 18, text, anchor="middle"))
        parts.append(_text((LEFT + end) / 2, self.height - 10, self.x, anchor="middle", fill=INK))
        parts.append(_text(18, TOP - 18, self.y, fill=INK))
        return parts

    def _line(self, line: Line, colour: str, x: _Axis, y: _Axis, right: int) -> list[str]:
        points, parts = sorted(line.points), []
        if line.dashed and len(points) == 1:
            points = [(x.first, points[0][1]), (x.last, points[0][1])]
        band = sorted(line.band)
        if line.dashed and len(band) == 1:
            band = [(x.first, *band[0][1:]), (x.last, *band[0][1:])]
        if len(band) > 1:
            edge = [(a, high) for a, _, high in band] + [(a, low) for a, low, _ in reversed(band)]
            corners = " ".join(f"{x.place(a):.1f},{y.place(b):.1f}" for a, b in edge)
            parts.append(f'<polygon points="{corners}" fill="{colour}" opacity="0.13"/>')
        elif band:
            at, low, high = x.place(band[0][0]), y.place(band[0][1]), y.place(band[0][2])
            parts.append(
                f'<path d="M{at:.1f},{low:.1f}V{high:.1f}" stroke="{colour}" stroke-width="1.5" opacity=".5"/>'
            )
        path = " ".join(f"{x.place(a):.1f},{y.place(b):.1f}" for a, b in points)
        dash = ' stroke-dasharray="6 5"' if line.dashed else ""
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2.2"{dash}/>')
        if not (line.dashed and len(line.points) == 1):
            for a, b in points:
                title = escape(f"{line.name}: {a:.4g}, {b:.4g}")
                parts.append(
                    f'<circle cx="{x.place(a):.1f}" cy="{y.place(b):.1f}" r="3.6" fill="{colour}" stroke="#fff">'
                    f"<title>{title}</title></circle>"
                )
        return parts


@dataclass(frozen=True)
class _Axis:
    """Values from `first` to `last` on pixels from `start` to `stop`."""

    first: float
    last: float
    start: float
    stop: float
    log: bool

    def place(self, value: float) -> float:
        first, last, value = (math.log(v) if self.log else v for v in (self.first, self.last, value))
        share = (value - first) / (last - first) if last > first else 0.5
        return self.start + (self.stop - self.start) * share

    def ticks(self) -> list[float]:
        if self.log:
            first, last = math.floor(math.log10(self.first)), math.ceil(math.log10(self.last))
            fine = [m * 10.0**p for p in range(first, last + 1) for m in (1, 2, 5)]
            inside = [v for v in fine if self.first * (1 - 1e-9) <= v <= self.last * (1 + 1e-9)]
            return inside if len(inside) <= 8 else [v for v in inside if f"{v:e}".startswith("1")]
        step = self.step()
        count = math.floor(self.last / step + 1e-9) - math.ceil(self.first / step - 1e-9)
        return [(math.ceil(self.first / step - 1e-9) + i) * step for i in range(count + 1)]

    def step(self) -> float:
        """1, 2 or 5 times a power of ten; four to nine steps."""
        rough = (self.last - self.first) / 5 or 1.0
        power = 10 ** math.floor(math.log10(rough))
        return next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.99)

    def rounded(self) -> _Axis:
        """To whole steps on both sides."""
        step = self.step()
        low, high = math.floor(self.first / step + 1e-9) * step, math.ceil(self.last / step - 1e-9) * step
        return _Axis(low, high if high > low else low + step, self.start, self.stop, self.log)


def _finite(line: Line) -> Line:
    points = [p for p in line.points if all(map(math.isfinite, p))]
    return Line(line.name, points, [b for b in line.band if all(map(math.isfinite, b))], line.dashed, line.colour)


def _short(value: float) -> str:
    """3 G, 20 M, 0.05: large numbers with the prefix of their thousands."""
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g} {prefix}"
    return f"{value:.4g}"


def _text(x: float, y: float, text: str, anchor: str = "start", size: int = 12, **options: str) -> str:
    more = "".join(f' {"font-weight" if k == "weight" else k}="{v}"' for k, v in options.items())
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}"{more}>{escape(text)}</text>'


def _apart(labels: list[tuple[float, str, str]]) -> list[tuple[float, str, str]]:
    """Labels moved down until none covers another, then up together by half of what was moved."""
    placed: list[tuple[float, str, str]] = []
    for at, name, colour in sorted(labels):
        at = max(at, placed[-1][0] + LABEL) if placed else at
        placed.append((at, name, colour))
    moved = sum(p[0] - s[0] for p, s in zip(placed, sorted(labels), strict=True)) / max(len(labels), 1)
    return [(at - moved, name, colour) for at, name, colour in placed]
