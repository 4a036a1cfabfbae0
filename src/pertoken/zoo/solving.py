"""Predict the answers of small reasoning problems, made anew for every epoch."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pertoken.zoo import reasoning
from pertoken.zoo.objective import Objective
from pertoken.zoo.recalling import AtPositions

ROWS = 2048
"""Rows per epoch."""


class Solving(Objective):
    """Rows `[row, 2, length]` of `reasoning.rows`."""

    def prepare(self, compile_model: bool) -> None:
        self.count = ROWS
        plain = AtPositions(self.model)
        self.forward = torch.compile(plain) if compile_model else plain

    def rows(self, epoch: int) -> np.ndarray:
        return reasoning.rows(
            self.count, self.recipe.length, self.tokenizer, reasoning.seed_of(self.recipe.seed, epoch)
        )

    def answers(self, rows: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Logits `[answer token, vocabulary]`, the true tokens, and the row of each."""
        ids, answer = torch.from_numpy(rows.astype(np.int64)).unbind(1)
        hidden = self.forward(ids[:, :-1], torch.arange(ids.shape[1] - 1).expand(len(ids), -1))
        asked = answer[:, 1:].bool()
        return self.model.lm_head(hidden[asked]).float(), ids[:, 1:][asked], asked.nonzero()[:, 0]

    def loss(self, batch: np.ndarray, step: int, generator: torch.Generator) -> tuple[Tensor, float]:
        logits, truth, _ = self.answers(batch)
        found = F.cross_entropy(logits, truth)
        return found, float(found.detach())

    @torch.inference_mode()
    def evaluate(self, count: int = 256) -> dict[str, float]:
        """Nats per token of held-out answers, and the share of their tokens that are predicted."""
        rows = reasoning.rows(count, self.recipe.length, self.tokenizer, 0, "heldout")
        losses, hits = [], []
        for part in np.array_split(rows, max(count // 64, 1)):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits, truth, _ = self.answers(part)
            losses.append(F.cross_entropy(logits, truth, reduction="none"))
            hits.append(logits.argmax(-1) == truth)
        return {"heldout": float(torch.cat(losses).mean()), "right": float(torch.cat(hits).float().mean())}
