"""Pictures of what became of an image's patches: regions that merged, outlined and in their mean colour, beside it."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

LINE, GONE = (255, 255, 255), (24, 24, 24)
WIDTH = 384


def regions(pixels: np.ndarray, place: np.ndarray) -> Any:
    """A picture of the image and, right of it, its regions; see `halves`."""
    from PIL import Image

    small, right = halves(pixels, place)
    both = Image.new("RGB", (2 * right.width + 8, right.height), LINE)
    both.paste(small, (0, 0))
    both.paste(right, (right.width + 8, 0))
    return both


def halves(pixels: np.ndarray, place: np.ndarray, width: int = WIDTH) -> tuple[Any, Any]:
    """The image `[height, width, 3]` uint8, about `width` pixels wide, and its regions at that size.

    place `[rows, columns]` int: the token that each patch went into, -1 for one that left, which is drawn dark under
    its own colours. Regions are filled with their mean colour, and a line is drawn between patches of different tokens.
    """
    from PIL import Image, ImageDraw

    rows, columns = place.shape
    scale = max(width // columns, 4)
    small = Image.fromarray(pixels).resize((columns * scale, rows * scale), Image.Resampling.BICUBIC)
    found = np.asarray(small).astype(np.float32).reshape(rows, scale, columns, scale, 3).swapaxes(1, 2).copy()
    means = found.mean((2, 3))
    for token in np.unique(place):
        own = place == token
        if token < 0:
            found[own] = 0.35 * found[own] + 0.65 * np.array(GONE)
        elif own.sum() > 1:
            found[own] = means[own].mean(0)
    right = Image.fromarray(found.swapaxes(1, 2).reshape(rows * scale, columns * scale, 3).astype(np.uint8))
    draw = ImageDraw.Draw(right)
    for row in range(rows):
        for column in range(columns):
            x, y = column * scale, row * scale
            if column and place[row, column] != place[row, column - 1]:
                draw.line((x, y, x, y + scale), fill=LINE)
            if row and place[row, column] != place[row - 1, column]:
                draw.line((x, y, x + scale, y), fill=LINE)
    return small, right


def page(sections: Sequence[tuple[str, str, Any]], title: str) -> str:
    """A self-contained page of pictures. sections: heading, text, and a picture or None."""
    parts = [
        f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title>",
        "<style>body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:52rem;padding:0 1rem}"
        "img{max-width:100%;border:1px solid #8884}p{white-space:pre-line}"
        "@media(prefers-color-scheme:dark){body{background:#181818;color:#ddd}}</style>",
        f"<h1>{html.escape(title)}</h1>",
    ]
    for heading, text, picture in sections:
        parts.append(f"<h2>{html.escape(heading)}</h2><p>{html.escape(text)}</p>")
        if picture is not None:
            buffer = io.BytesIO()
            picture.save(buffer, "PNG")
            data = base64.b64encode(buffer.getvalue()).decode()
            parts.append(
                f'<img alt="{html.escape(heading)}: the image and its regions" src="data:image/png;base64,{data}">'
            )
    return "\n".join(parts) + "\n"


def write(sections: Sequence[tuple[str, str, Any]], title: str, path: Path) -> None:
    """The page as a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(sections, title), encoding="utf-8")
