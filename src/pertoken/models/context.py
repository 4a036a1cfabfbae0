"""Context: a stack and its cache over the active rows of one request, fed with committed chains and trees of
guesses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pertoken.core.attach import active
from pertoken.models.cache import TreeCache
from pertoken.models.stack import Stack

CHUNK = 512  # tokens per forward of a long prompt: bounds the mask to [row, CHUNK, context]


class Context:
    """What one model has read of every row. `known[row]` tokens of the row are in the cache; prompt: how many tokens of
    each row are given, for policies that treat them otherwise than those generated."""

    def __init__(self, stack: Stack, rows: int, capacity: int, prompt: Sequence[int] | None = None):
        self.stack = stack
        self.cache = TreeCache(stack.adapter, rows, capacity)
        self.cache.prompt = None if prompt is None else torch.tensor(prompt, device=stack.adapter.device)
        self.known = [0] * rows
        self.tail_lengths = [0] * rows

    @property
    def device(self) -> torch.device:
        return self.stack.adapter.device

    def feed(self, chains: Sequence[Sequence[int]], states: list[Tensor] | None = None) -> Tensor:
        """Read one chain of committed tokens per row (ragged, at least one somewhere) and keep them.

        states: filled with every layer's output on the last chunk, `tail_lengths` tokens of each row. Returns the
        un-normed hidden state `[row, width]` of each row's last token; a row without tokens gets zeros.
        """
        last = None
        longest = max(map(len, chains))
        for start in range(0, longest, CHUNK):
            part = [chain[start : start + CHUNK] for chain in chains]
            if states is not None:
                states.clear()
            hidden = self._feed(part, states)
            self.tail_lengths = [len(chunk) for chunk in part]
            if last is None:
                last = hidden.new_zeros(len(chains), hidden.shape[-1])
            for row, chunk in enumerate(part):
                if chunk:
                    last[row] = hidden[row, len(chunk) - 1]
        assert last is not None
        return last

    def _feed(self, chains: Sequence[Sequence[int]], states: list[Tensor] | None) -> Tensor:
        rows, longest = len(chains), max(map(len, chains))
        lengths = torch.tensor([len(c) for c in chains], device=self.device)
        ids = torch.tensor([[*c, *[0] * (longest - len(c))] for c in chains], device=self.device)
        offsets = torch.arange(longest, device=self.device)
        valid = offsets < lengths[:, None]
        positions = torch.tensor(self.known, device=self.device)[:, None] + offsets
        positions = positions.masked_fill(~valid, 0)
        allow = None
        if longest > 1 or rows > 1:
            allow = torch.ones(longest, longest, dtype=torch.bool, device=self.device).tril().expand(rows, -1, -1)
        base = self.cache.base
        hidden = self.stack.forward(ids, positions, self.cache, base, allow, valid, states=states, text=True)
        columns = (base + offsets).expand(rows, -1)
        self.cache.commit(columns, lengths, longest)
        for row, chain in enumerate(chains):
            self.known[row] += len(chain)
        return hidden

    def keep(self, columns: Sequence[Sequence[int]]) -> None:
        """Keep, per row, these provisional columns (offsets from the first one, in order) and drop the others."""
        longest = max(map(len, columns))
        kept = torch.tensor([[*c, *[0] * (longest - len(c))] for c in columns], dtype=torch.long, device=self.device)
        kept = kept.view(len(columns), longest) + self.cache.base
        counts = torch.tensor([len(c) for c in columns], device=self.device)
        self.cache.commit(kept, counts, longest)
        for row, kept_columns in enumerate(columns):
            self.known[row] += len(kept_columns)

    def select(self, rows: Sequence[int]) -> None:
        """Keep only these rows."""
        kept = torch.tensor(rows, device=self.device)
        for attachment in active(self.stack.adapter.model):
            attachment.select(kept, self.cache.rows, self.cache)
        self.cache.select_rows(kept)
        self.known = [self.known[r] for r in rows]
