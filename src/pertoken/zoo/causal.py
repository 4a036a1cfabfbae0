"""Predict the next token of code with the model as it runs: whatever is attached to it sees the masks that it uses."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pertoken.zoo import corpus
from pertoken.zoo.objective import Objective
from pertoken.zoo.recalling import AtPositions


class Causal(Objective):
    """Rows are windows of the corpus `[row, length + 1]`."""

    def prepare(self, compile_model: bool) -> None:
        texts = {split: list(corpus.split_texts(split).values()) for split in ("train", "heldout")}
        self.stream, self.heldout = (corpus.token_stream(self.tokenizer, found) for found in texts.values())
        self.count = (len(self.stream) - 2 * self.recipe.length) // self.recipe.length
        plain = AtPositions(self.model)
        self.forward = torch.compile(plain) if compile_model else plain

    def rows(self, epoch: int) -> np.ndarray:
        return corpus.windows(self.stream, self.recipe.length, epoch, self.recipe.seed)

    def cross_entropy(self, rows: np.ndarray) -> Tensor:
        """Mean nats per token."""
        tokens = torch.from_numpy(rows.astype(np.int64))
        hidden = self.forward(tokens[:, :-1], torch.arange(tokens.shape[1] - 1).expand(len(tokens), -1))
        return F.cross_entropy(self.model.lm_head(hidden).flatten(0, 1).float(), tokens[:, 1:].flatten())

    def loss(self, batch: np.ndarray, step: int, generator: torch.Generator) -> tuple[Tensor, float]:
        found = self.cross_entropy(batch)
        return found, float(found.detach())

    @torch.inference_mode()
    def evaluate(self, batches: int = 12) -> dict[str, float]:
        """Held-out loss in nats per token, in bf16."""
        order = corpus.windows(self.heldout, self.recipe.length, 0, 1)[: 8 * batches]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = [self.cross_entropy(part) for part in np.array_split(order, -(-len(order) // 8))]
        return {"heldout": float(torch.stack(found).mean())}
