"""Predict the next token of the rows that the diffusion model learns from: its autoregressive twin."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pertoken.zoo import corpus
from pertoken.zoo.next_token import LayerSkipForward
from pertoken.zoo.objective import Objective
from pertoken.zoo.rows import Rows


class AnsweringTokens(Objective):
    """Learns from `Rows`: every token that is not given, up to and with the first end of text behind an answer."""

    def prepare(self, compile_model: bool) -> None:
        self.data = Rows(self.recipe, self.tokenizer)
        self.count = self.data.count
        plain = LayerSkipForward(self.model)
        self.forward = torch.compile(plain) if compile_model else plain

    def rows(self, epoch: int) -> np.ndarray:
        return self.data.epoch(epoch)

    def loss(self, batch: np.ndarray, step: int, generator: torch.Generator) -> tuple[Tensor, float]:
        rows = torch.from_numpy(batch.astype(np.int64))
        given, ids = rows[:, :1], rows[:, 1:]
        padding = (ids == self.data.end) & F.pad(ids == self.data.end, (1, -1))
        learnt = (torch.arange(ids.shape[1]) >= given) & ~padding
        losses = self.cross_entropies(ids)[learnt[:, 1:]]
        mean = losses.mean()
        return mean, float(mean.detach())

    def cross_entropies(self, ids: Tensor) -> Tensor:
        """`[row, token - 1]` nats of all tokens but the first."""
        keep = torch.ones(self.recipe.shape.layers, len(ids))
        hidden = self.forward(ids[:, :-1], keep, torch.zeros(0, dtype=torch.long))[-1]
        logits = self.model.lm_head(hidden).float()
        return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")

    @torch.inference_mode()
    def evaluate(self, batches: int = 12) -> dict[str, float]:
        """Held-out loss in nats per token."""
        order = corpus.windows(self.data.heldout, self.recipe.length, 0, 1)[: 8 * batches]
        found = []
        for start in range(0, len(order) - 7, 8):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                found.append(self.cross_entropies(torch.from_numpy(order[start : start + 8].astype(np.int64))).mean())
        return {"heldout": float(torch.stack(found).mean())}
