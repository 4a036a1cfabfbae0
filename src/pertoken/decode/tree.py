"""Token trees: the guesses of one step, one tree per row, and their padded batch form."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

ROOT = -1


@dataclass
class Tree:
    """One row's guesses below its last committed token (the root, not stored).

    Node `i` has a token, a parent (`ROOT` or an earlier node), a value (its expected contribution to the accepted
    length when it was drawn), a source (index into `core.decision.SOURCES`), and a depth (1 below the root). Siblings
    were drawn in index order. `sure` marks a node that was proposed outright rather than drawn from its parent's
    distribution.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    sure: list[bool] = field(default_factory=list)
    children: dict[int, list[int]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, token: int, parent: int, value: float = 0.0, source: int = 0, sure: bool = False) -> int:
        """Append a node and return its index."""
        node = len(self.tokens)
        self.tokens.append(token)
        self.parents.append(parent)
        self.values.append(value)
        self.sources.append(source)
        self.sure.append(sure)
        self.depths.append(1 if parent == ROOT else self.depths[parent] + 1)
        self.children.setdefault(parent, []).append(node)
        return node

    def path(self, node: int) -> list[int]:
        """Nodes from below the root down to `node`."""
        found = []
        while node != ROOT:
            found.append(node)
            node = self.parents[node]
        return found[::-1]

    def child_with(self, parent: int, token: int) -> int | None:
        """The first child of `parent` that carries `token`."""
        return next((c for c in self.children.get(parent, ()) if self.tokens[c] == token), None)


def ancestor_mask(parents: list[int], width: int) -> np.ndarray:
    """`[width + 1, width + 1]` bool: which of root (row 0) and nodes each one sees: its ancestors and itself.

    Rows past the last node see themselves only, so that padding never attends to nothing.
    """
    mask = np.eye(width + 1, dtype=bool)
    mask[:, 0] = True
    for node, parent in enumerate(parents):
        if parent != ROOT:
            mask[node + 1] |= mask[parent + 1]
    return mask


@dataclass(frozen=True)
class TreeBatch:
    """Trees of all rows, padded to the widest. Tensors are `[row, node]`; `allow` is `[row, 1 + node, 1 + node]`."""

    trees: list[Tree]
    tokens: Tensor
    depths: Tensor
    valid: Tensor
    allow: Tensor | None

    @classmethod
    def of(cls, trees: list[Tree], device: torch.device) -> TreeBatch:
        width = max(map(len, trees))
        tokens = np.zeros((len(trees), width), dtype=np.int64)
        depths = np.zeros((len(trees), width), dtype=np.int64)
        valid = np.zeros((len(trees), width), dtype=bool)
        for row, tree in enumerate(trees):
            size = len(tree)
            tokens[row, :size], depths[row, :size], valid[row, :size] = tree.tokens, tree.depths, True
        allow = None
        if width:
            allow = torch.from_numpy(np.stack([ancestor_mask(t.parents, width) for t in trees])).to(device)
        return cls(
            trees,
            torch.from_numpy(tokens).to(device),
            torch.from_numpy(depths).to(device),
            torch.from_numpy(valid).to(device),
            allow,
        )

    @property
    def width(self) -> int:
        return self.tokens.shape[1]
