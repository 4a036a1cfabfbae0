"""A clip as a strip: its frames side by side, what became of each below it, and what is said of runs of frames."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

PAPER, INK, FAINT = (255, 255, 255), (24, 24, 24), (120, 120, 120)
GAP, LINE = 6, 14


def strip(rows: Sequence[Sequence[Any]], said: Sequence[tuple[int, int, str]] = ()) -> Any:
    """One picture. rows: of pictures of one size, a column for each frame; said: first frame, frames and text of each
    run, which is written below a bracket over them."""
    from PIL import Image, ImageDraw

    wide, high = rows[0][0].size
    count = len(rows[0])
    letters = 6.2  # pixels of a letter of the usual font

    def columns(first: int, frames: int) -> tuple[int, int]:
        left = GAP + first * (wide + GAP)
        return left, left + frames * (wide + GAP) - GAP

    texts = []
    for first, frames, text in said:
        left, right = columns(first, frames)
        texts.append((left, right, textwrap.wrap(text, max(int((right - left) / letters), 8))))
    below = max((len(lines) for *_, lines in texts), default=0) * LINE + (3 * GAP if texts else 0)
    made = Image.new("RGB", (GAP + count * (wide + GAP), GAP + len(rows) * (high + GAP) + below), PAPER)
    draw = ImageDraw.Draw(made)
    for row, pictures in enumerate(rows):
        for column, picture in enumerate(pictures):
            made.paste(picture, (columns(column, 1)[0], GAP + row * (high + GAP)))
    top = GAP + len(rows) * (high + GAP)
    for left, right, lines in texts:
        draw.line([(left, top), (left, top + GAP // 2), (right, top + GAP // 2), (right, top)], fill=FAINT)
        for number, line in enumerate(lines):
            draw.text((left, top + GAP + number * LINE), line, fill=INK)
    return made
