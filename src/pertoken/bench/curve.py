"""Loss curves of a training run as a table and a picture."""

from __future__ import annotations

import csv
from pathlib import Path

WIDTH, HEIGHT, EDGE = 640, 360, 48
COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7")


def write_curve(curve: list[dict[str, float]], directory: Path) -> list[Path]:
    """Write curve.csv and curve.svg; each point holds "step", "seconds" and losses in nats per token by name."""
    names = list(dict.fromkeys(key for point in curve for key in point))
    table, picture = directory / "curve.csv", directory / "curve.svg"
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(curve)
    losses = [name for name in names if name not in ("step", "seconds")]
    picture.write_text(_svg(curve, losses), encoding="utf-8")
    return [table, picture]


def _svg(curve: list[dict[str, float]], losses: list[str]) -> str:
    values = [point[name] for point in curve for name in losses if name in point] or [0.0, 1.0]
    low, high = min(values), max(max(values), min(values) + 1e-6)
    last = max((point["step"] for point in curve), default=1) or 1

    def place(step: float, value: float) -> str:
        x = EDGE + (WIDTH - 2 * EDGE) * step / last
        y = HEIGHT - EDGE - (HEIGHT - 2 * EDGE) * (value - low) / (high - low)
        return f"{x:.1f},{y:.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<text x="{EDGE}" y="{HEIGHT - 16}">step 0</text>',
        f'<text x="{WIDTH - EDGE}" y="{HEIGHT - 16}" text-anchor="end">{last:.0f}</text>',
        f'<text x="4" y="{EDGE}">{high:.2f}</text><text x="4" y="{HEIGHT - EDGE}">{low:.2f}</text>',
        f'<text x="{EDGE}" y="20">loss, nats per token</text>',
    ]
    for number, name in enumerate(losses):
        colour = COLOURS[number % len(COLOURS)]
        line = " ".join(place(point["step"], point[name]) for point in curve if name in point)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{WIDTH - EDGE}" y="{20 + 16 * number}" text-anchor="end" fill="{colour}">{name}</text>')
    return "\n".join([*parts, "</svg>\n"])
