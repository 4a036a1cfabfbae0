"""Fill in masked tokens: LLaDA's masked-diffusion loss (arXiv 2502.09992), on text and on prompts with answers.

Per row t ~ U(0, 1) and p = (1 - eps) t + eps; every token that is not given is masked with probability p, and the loss
is the sum over masked tokens of CE / p, divided by the number of tokens that could have been masked. Answers are padded
with the end of text up to the length of the row, and that padding is trained on. The output at i - 1 predicts token i
(Dream's alignment), which lets a run start from the weights of a next-token model.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from pertoken.zoo import corpus
from pertoken.zoo.objective import Objective
from pertoken.zoo.rows import Rows

MASK = "<|mask|>"
EPS = 1e-3
LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)  # shares of masked tokens at which held-out text is judged


class Bidirectional(nn.Module):
    """Normed hidden states `[batch, token, width]` of ids `[batch, token]`; every token reads every other, or what the
    additive mask `[batch, 1, 1, token]` lets it read."""

    def __init__(self, model: LlamaForCausalLM):
        super().__init__()
        self.model = model
        model.config.is_causal = False
        layers: Any = model.model.layers
        for layer in layers:
            layer.self_attn.is_causal = False

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        inner = self.model.model
        hidden = inner.embed_tokens(ids)
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        rotary = inner.rotary_emb(hidden, positions)
        for layer in inner.layers:
            hidden = layer(hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
        return inner.norm(hidden)


class MaskedTokens(Objective):
    """Learns from `Rows`; the tokenizer holds the mask token."""

    def prepare(self, compile_model: bool) -> None:
        self.data = Rows(self.recipe, self.tokenizer)
        self.count = self.data.count
        self.mask: int = self.tokenizer.token_to_id(MASK)  # type: ignore[assignment]
        self.model.config.mask_token_id, self.model.config.prediction_shift = self.mask, 1
        plain = Bidirectional(self.model)
        self.forward = torch.compile(plain) if compile_model else plain

    def rows(self, epoch: int) -> np.ndarray:
        return self.data.epoch(epoch)

    def loss(self, batch: np.ndarray, step: int, generator: torch.Generator) -> tuple[Tensor, float]:
        rows = torch.from_numpy(batch.astype(np.int64))
        given, ids = rows[:, :1], rows[:, 1:]
        open_ = torch.arange(ids.shape[1]) >= given
        spread = torch.arange(len(ids)) / len(ids)  # evenly spread levels: the batch's loss varies less
        t = (torch.rand(1, generator=generator) + spread) % 1.0
        p = ((1 - EPS) * t + EPS)[:, None]
        masked = open_ & (torch.rand(ids.shape, generator=generator) < p)
        hidden = self.forward(ids.masked_fill(masked, self.mask))
        losses = self.cross_entropies(hidden, ids, masked)
        weight = (1 / (p * open_.sum(1, keepdim=True))).expand_as(ids)[masked]
        return (losses * weight).sum() / len(ids), float(losses.detach().mean())

    def cross_entropies(self, hidden: Tensor, ids: Tensor, masked: Tensor) -> Tensor:
        """`[masked token]` nats; the first token of a row is never masked."""
        logits = self.model.lm_head(hidden[:, :-1][masked[:, 1:]]).float()
        return F.cross_entropy(logits, ids[masked], reduction="none")

    @torch.inference_mode()
    def evaluate(self, batches: int = 6) -> dict[str, float]:
        """The bound on the loss: mean over levels of the mean cross-entropy of masked tokens; and two of the levels."""
        length, generator = self.recipe.length, torch.Generator().manual_seed(1)
        order = corpus.windows(self.data.heldout, length - 1, 0, 1)[: 8 * batches]
        found = {}
        for level in LEVELS:
            sums, count = 0.0, 0
            for start in range(0, len(order), 8):
                ids = torch.from_numpy(order[start : start + 8].astype(np.int64))
                masked = torch.rand(ids.shape, generator=generator) < level
                masked[:, 0] = False
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    hidden = Bidirectional(self.model)(ids.masked_fill(masked, self.mask))
                    losses = self.cross_entropies(hidden, ids, masked)
                sums, count = sums + float(losses.sum()), count + len(losses)
            found[f"masked_{level}"] = sums / count
        return {"heldout": sum(found.values()) / len(found)} | {k: found[k] for k in ("masked_0.1", "masked_0.5")}
