"""Decisions: what each token gets, as frozen tensors on a token axis with a mask of the real tokens.

Every family of methods decides in one of these seven forms, so that decisions can be recorded, replayed, compared,
priced and drawn without knowing which method made them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Decision:
    """Base of the seven forms. `valid` `[batch, token]` is False on padding, which no law counts."""

    valid: Tensor
    kind: ClassVar[str] = "decision"

    def __post_init__(self) -> None:
        if self.valid.dtype != torch.bool or self.valid.ndim != 2:
            raise ValueError(
                f"{self.kind}: valid must be a bool tensor [batch, token], "
                f"got {self.valid.dtype} {list(self.valid.shape)}"
            )
        for name, tensor in self.tensors().items():
            if name != "valid" and tensor.shape[:1] != self.valid.shape[:1]:
                raise ValueError(
                    f"{self.kind}.{name} has batch {tensor.shape[0]}, valid has {self.valid.shape[0]}: give both "
                    "one row per sequence"
                )

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by field name, without those that are left out: what a trace stores."""
        return {name: value for name in self.__match_args__ if (value := getattr(self, name)) is not None}

    def rows(self, index: Tensor) -> Decision:
        """The decision of the given batch rows."""
        return type(self)(**{name: tensor[index] for name, tensor in self.tensors().items()})

    def spent(self) -> Tensor:
        """`[batch]` units spent per sequence, padding not counted."""
        raise TypeError(f"{self.kind} has no count of its own")


def _on_token_axis(decision: Decision, name: str, dtype_kind: str) -> None:
    tensor: Tensor = getattr(decision, name)
    if tensor.shape != decision.valid.shape:
        raise ValueError(f"{decision.kind}.{name} is {list(tensor.shape)}; valid is {list(decision.valid.shape)}")
    kind = "bool" if tensor.dtype == torch.bool else "float" if tensor.is_floating_point() else "int"
    if kind != dtype_kind:
        raise ValueError(f"{decision.kind}.{name} is {tensor.dtype}; it must be {dtype_kind}")


@dataclass(frozen=True)
class Keep(Decision):
    """Which tokens stay. keep `[batch, token]` bool."""

    keep: Tensor
    kind: ClassVar[str] = "keep"

    def __post_init__(self) -> None:
        super().__post_init__()
        _on_token_axis(self, "keep", "bool")

    def spent(self) -> Tensor:
        return (self.keep & self.valid).sum(-1)


@dataclass(frozen=True)
class Assign(Decision):
    """Which group each token merges into. group `[batch, token]` int, -1 where the token leaves."""

    group: Tensor
    kind: ClassVar[str] = "assign"

    def __post_init__(self) -> None:
        super().__post_init__()
        _on_token_axis(self, "group", "int")

    def spent(self) -> Tensor:
        groups = torch.where(self.valid, self.group, -1)
        return torch.tensor([row[row >= 0].unique().numel() for row in groups], device=groups.device)


@dataclass(frozen=True)
class Depth(Decision):
    """Which layers each token runs. layers `[batch, token, layer]` bool; small, of that shape: where a token runs a
    smaller module in place of the layer's own, None if there is none."""

    layers: Tensor
    small: Tensor | None = None
    kind: ClassVar[str] = "depth"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers.dtype != torch.bool or self.layers.shape[:2] != self.valid.shape or self.layers.ndim != 3:
            raise ValueError(
                f"depth.layers must be bool [batch, token, layer] over valid {list(self.valid.shape)}, got "
                f"{self.layers.dtype} {list(self.layers.shape)}"
            )
        if self.small is not None and (self.small.dtype != torch.bool or self.small.shape != self.layers.shape):
            raise ValueError(
                f"depth.small must be bool {list(self.layers.shape)} as layers are, got {self.small.dtype} "
                f"{list(self.small.shape)}"
            )

    def spent(self) -> Tensor:
        return (self.layers & self.valid[..., None]).sum((-1, -2))


@dataclass(frozen=True)
class Exit(Decision):
    """After how many layers each token leaves, as far as it is decided. left `[batch, token]` int: layers run; negative
    where the text stops with the token."""

    left: Tensor
    kind: ClassVar[str] = "exit"

    def __post_init__(self) -> None:
        super().__post_init__()
        _on_token_axis(self, "left", "int")

    def spent(self) -> Tensor:
        return (self.left.abs() * self.valid).sum(-1)


@dataclass(frozen=True)
class Weight(Decision):
    """How much each token counts in an objective. weight `[batch, token]` float."""

    weight: Tensor
    kind: ClassVar[str] = "weight"

    def __post_init__(self) -> None:
        super().__post_init__()
        _on_token_axis(self, "weight", "float")

    def spent(self) -> Tensor:
        return self.weight.masked_fill(~self.valid, 0).sum(-1)


@dataclass(frozen=True)
class Select(Decision):
    """Which keys each query reads. From a row's first real query on, queries fall into runs that share their keys.

    index `[batch, group, run, chosen]` int, columns of keys, -1 for none; one group for all heads, or one per key head.
    length `[batch]` int: queries per run, the last one may have fewer. valid is on the query axis.
    """

    index: Tensor
    length: Tensor
    kind: ClassVar[str] = "select"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.index.ndim != 4 or self.index.dtype != torch.long or self.length.dtype != torch.long:
            raise ValueError(
                f"select.index must be int64 [batch, group, run, chosen] and length int64 [batch], got "
                f"{self.index.dtype} {list(self.index.shape)} and {self.length.dtype}"
            )

    def spent(self) -> Tensor:
        """`[batch]` keys read, summed over queries; where groups differ, of the group that reads most."""
        kept = (self.index >= 0).sum(-1).amax(1)
        starts = torch.arange(kept.shape[1], device=kept.device) * self.length[:, None]
        queries = (self.valid.sum(-1, keepdim=True) - starts).clamp(min=0).minimum(self.length[:, None])
        return (kept * queries).sum(-1)


@dataclass(frozen=True)
class Commit(Decision):
    """One step of a decoder: the guesses of each row and what became of them.

    Guessed nodes lie on the token axis: tokens and parents `[batch, node]` (parent -1 is the last committed token),
    value `[batch, node]` float, the expected contribution when the node was drawn, source `[batch, node]` int, which
    drafter guessed it (`SOURCES`); accepted `[batch, node]` bool marks the path that was kept. Tokens committed in this
    step, path and correction together: committed `[batch, slot]`, count `[batch]`.
    """

    tokens: Tensor
    parents: Tensor
    value: Tensor
    source: Tensor
    accepted: Tensor
    committed: Tensor
    count: Tensor
    kind: ClassVar[str] = "commit"

    def __post_init__(self) -> None:
        super().__post_init__()
        kinds = {"tokens": "int", "parents": "int", "value": "float", "source": "int", "accepted": "bool"}
        for name, dtype_kind in kinds.items():
            _on_token_axis(self, name, dtype_kind)

    def spent(self) -> Tensor:
        return self.valid.sum(-1)


SOURCES = ("model", "ngram", "exit", "grammar")
KINDS: dict[str, type[Decision]] = {c.kind: c for c in (Keep, Assign, Depth, Exit, Weight, Select, Commit)}
