"""Drafters: where the distributions of a tree's nodes come from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pertoken.decode.request import Row
from pertoken.decode.tree import ROOT, Tree
from pertoken.models.context import Context
from pertoken.models.stack import Stack

Place = tuple[int, int]  # (row, node); node ROOT is the row's last committed token


class ModelDrafter:
    """A model that reads the tree it is growing. Each node is read at most once, and only when its children are wanted.

    Its cache holds the committed tokens it has read; a step's nodes are provisional until `accept` keeps the path.
    Tokens that were committed without being read here (corrections, guesses of another source, leaves) are read first
    thing when the next step asks for a root.
    """

    def __init__(self, stack: Stack, rows: Sequence[Row], size: int):
        longest = max(len(row.tokens) for row in rows)
        self.context = Context(stack, len(rows), longest + 2 * size + 64)
        self.calls = 0
        self.columns: list[dict[int, int]] = [{} for _ in rows]
        self.blocks: list[Tensor] = []
        self.allow = np.zeros((len(rows), 0, 0), dtype=bool)

    def begin(self) -> None:
        """Forget the last step's nodes."""
        self.columns = [{} for _ in self.columns]
        self.blocks = []
        self.allow = np.zeros((len(self.columns), 0, 0), dtype=bool)

    def unread(self, rows: Sequence[Row]) -> int:
        """Most committed tokens that any row has and this model has not read."""
        return max(len(row.tokens) - known for row, known in zip(rows, self.context.known, strict=True))

    def roots(self, rows: Sequence[Row]) -> Tensor:
        """Logits `[row, vocabulary]` after the last committed token of every row."""
        chains = [row.tokens[known:] for row, known in zip(rows, self.context.known, strict=True)]
        self.calls += 1
        return self.context.stack.logits(self.context.feed(chains))

    def expand(self, rows: Sequence[Row], trees: Sequence[Tree], places: Sequence[Place]) -> Tensor:
        """Logits `[place, vocabulary]` after these nodes; unread ancestors are read along. Roots must have been
        read."""
        queues: list[list[int]] = [[] for _ in trees]
        for row, node in places:
            seen = self.columns[row]
            queues[row].extend(n for n in trees[row].path(node) if n not in seen and n not in queues[row])
        if any(queues):
            self._read(rows, trees, queues)
        hidden = self.blocks[0] if len(self.blocks) == 1 else torch.cat(self.blocks, 1)
        picked = hidden[[row for row, _ in places], [self.columns[row][node] for row, node in places]]
        return self.context.stack.logits(picked)

    def _read(self, rows: Sequence[Row], trees: Sequence[Tree], queues: Sequence[Sequence[int]]) -> None:
        """One forward over these nodes, which are provisional until `accept`."""
        width = max(map(len, queues))
        used = self.allow.shape[1]
        allow = np.zeros((len(trees), used + width, used + width), dtype=bool)
        allow[:, :used, :used] = self.allow
        ids = np.zeros((len(trees), width), dtype=np.int64)
        positions = np.zeros((len(trees), width), dtype=np.int64)
        valid = np.zeros((len(trees), width), dtype=bool)
        new = np.arange(width)
        allow[:, used + new, used + new] = True
        for row, (tree, queue) in enumerate(zip(trees, queues, strict=True)):
            last = len(rows[row].tokens) - 1
            for slot, node in enumerate(queue):
                column, parent = used + slot, tree.parents[node]
                if parent != ROOT:
                    allow[row, column] |= allow[row, self.columns[row][parent]]
                self.columns[row][node] = column
                ids[row, slot], positions[row, slot], valid[row, slot] = (
                    tree.tokens[node],
                    last + tree.depths[node],
                    True,
                )
        self.allow = allow
        device, cache = self.context.device, self.context.cache
        hidden = self.context.stack.forward(
            torch.from_numpy(ids).to(device),
            torch.from_numpy(positions).to(device),
            cache,
            cache.base + used,
            torch.from_numpy(allow[:, used:]).to(device),
            torch.from_numpy(valid).to(device),
        )
        self.calls += 1
        self.blocks.append(hidden)

    def accept(self, paths: Sequence[Sequence[int]]) -> None:
        """Keep what was read of each row's accepted path."""
        kept = []
        for columns, path in zip(self.columns, paths, strict=True):
            read = [columns[node] for node in path if node in columns]
            kept.append(read)
        self.context.keep(kept)

    def select(self, rows: Sequence[int]) -> None:
        """Keep only these rows."""
        self.context.select(rows)
        self.columns = [self.columns[r] for r in rows]
