"""Drafters: where the distributions of a tree's nodes come from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pertoken.decode.request import Row
from pertoken.decode.tree import Tree
from pertoken.models.context import Context
from pertoken.models.stack import Stack

Place = tuple[int, int]  # (row, node); node ROOT is the row's last committed token


class TreeReader:
    """Reads nodes of growing trees into the provisional columns of a context, each at most once.

    columns[row]: the provisional column of each node that was read, counted from the cache's base; ROOT is in it if the
    root is provisional too.
    """

    def __init__(self, context: Context):
        self.context = context
        self.calls = self.tokens = 0
        self.columns: list[dict[int, int]] = []
        self.allow = np.zeros((0, 0, 0), dtype=bool)

    def start(self, columns: list[dict[int, int]], allow: np.ndarray) -> None:
        """Begin with these nodes read; allow `[row, column, column]`: which provisional columns each of them sees."""
        self.columns, self.allow = columns, allow

    def read(self, roots: Sequence[int], trees: Sequence[Tree], queues: Sequence[Sequence[int]]) -> Tensor:
        """Un-normed hidden states `[row, slot, width]` of these nodes of every row, from one forward; roots: the
        positions of the trees' roots."""
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
            for slot, node in enumerate(queue):
                column = used + slot
                above = self.columns[row].get(tree.parents[node])
                if above is not None:
                    allow[row, column] |= allow[row, above]
                self.columns[row][node] = column
                ids[row, slot], positions[row, slot] = tree.tokens[node], roots[row] + tree.depths[node]
                valid[row, slot] = True
        self.allow = allow
        device, cache = self.context.device, self.context.cache
        self.calls += 1
        self.tokens += int(valid.sum())
        return self.context.stack.forward(
            torch.from_numpy(ids).to(device),
            torch.from_numpy(positions).to(device),
            cache,
            cache.base + used,
            torch.from_numpy(allow[:, used:]).to(device),
            torch.from_numpy(valid).to(device),
        )


class ModelDrafter(TreeReader):
    """A model that reads the tree it is growing. Each node is read at most once, and only when its children are wanted.

    Its cache holds the committed tokens it has read; a step's nodes are provisional until `accept` keeps the path.
    Tokens that were committed without being read here (corrections, guesses of another source, leaves) are read first
    thing when the next step asks for a root.
    """

    def __init__(self, stack: Stack, rows: Sequence[Row], size: int):
        longest = max(len(row.tokens) for row in rows)
        given = [len(row.tokens) - row.generated for row in rows]
        super().__init__(Context(stack, len(rows), longest + 2 * size + 64, given))
        self.columns = [{} for _ in rows]
        self.blocks: list[Tensor] = []
        self.begin()

    def begin(self) -> None:
        """Forget the last step's nodes."""
        self.blocks = []
        self.start([{} for _ in self.columns], np.zeros((len(self.columns), 0, 0), dtype=bool))

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
            self.blocks.append(self.read([len(row.tokens) - 1 for row in rows], trees, queues))
        hidden = self.blocks[0] if len(self.blocks) == 1 else torch.cat(self.blocks, 1)
        picked = hidden[[row for row, _ in places], [self.columns[row][node] for row, node in places]]
        return self.context.stack.logits(picked)

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
