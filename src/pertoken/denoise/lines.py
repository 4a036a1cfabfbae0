"""A row's text as it stands, its lines, and the tokens that lie wholly on marked bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from pertoken.denoise.pieces import Pieces

BLANKS = b" \t\n\r\f\v"
IDLE = BLANKS + b"0123456789,[](){}'\""  # a line of these alone says nothing about structure
FENCE = b"```"
TAGS = {"python": b"python python3 py", "java": b"java", "cpp": b"cpp c++ cc cxx"}


@dataclass
class Text:
    """columns, ends, open `[token]`: where each token stands in the canvas, where it ends in the bytes, whether it is
    undecided; data: the bytes; begin: the byte at which the canvas begins; marked `[byte]`."""

    columns: np.ndarray
    ends: np.ndarray
    open: np.ndarray
    data: bytes
    begin: int
    marked: np.ndarray
    language: str

    @classmethod
    def of(
        cls, pieces: Pieces, ids: np.ndarray, undecided: np.ndarray, shown: np.ndarray, start: int, language: str
    ) -> Text:
        """The text of a row `[column]` up to the first special token of the canvas, which begins at column `start`."""
        over = pieces.special[pieces.known(ids)] & (np.arange(len(ids)) >= start)
        columns = np.flatnonzero(shown.astype(bool) & ~(over & shown.astype(bool)).cumsum().astype(bool))
        data, ends = pieces.text(ids[columns])
        before = int((columns < start).sum())
        begin = int(ends[before - 1]) if before else 0
        return cls(columns, ends, undecided[columns] > 0, data.tobytes(), begin, np.zeros(len(data), bool), language)

    def lines(self, decided: bool = False) -> Iterator[tuple[int, int]]:
        """Bytes `[start, end)` of the lines that can be compared: those with an undecided token, with `decided` all of
        the canvas; where the canvas has a code fence or begins inside one, only lines inside fences."""
        widths = np.diff(self.ends, prepend=0)
        opened = np.concatenate([[0], np.repeat(self.open, widths).cumsum()])
        breaks = np.flatnonzero(np.frombuffer(self.data, np.uint8) == 10) + 1
        edges = np.unique(np.concatenate([[0], breaks, [len(self.data)]])).tolist()
        for start, end in self._fenced(list(pairwise(edges))):
            wanted = end > self.begin if decided else opened[end] > opened[start]
            if wanted and self.data[start:end].translate(None, IDLE):
                yield start, end

    def _fenced(self, lines: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """The lines inside fences of the language, or all of the canvas where fences say nothing about it."""
        if FENCE not in self.data:
            return lines
        inside = ours = limited = False
        within = []
        for start, end in lines:
            line = self.data[start:end].strip()
            on_canvas = end > self.begin
            fence = line.startswith(FENCE)
            limited |= on_canvas and (inside or fence)
            if fence:
                inside = not inside
                tag = b"".join(line.strip(b"`").lower().split()[:1])
                ours = inside and (not tag or tag in TAGS[self.language].split())
            elif inside and ours:
                within.append((start, end))
        return within if limited else lines

    def covered(self) -> np.ndarray:
        """`[token]`: undecided, not blank, every byte marked or blank."""
        blank = np.isin(np.frombuffer(self.data, np.uint8), np.frombuffer(BLANKS, np.uint8))
        starts = self.ends - np.diff(self.ends, prepend=0)
        good, blanks = (np.concatenate([[0], flags.cumsum()]) for flags in (self.marked | blank, blank))
        width = self.ends - starts
        return self.open & (good[self.ends] - good[starts] == width) & (blanks[self.ends] - blanks[starts] < width)
