"""Predict the answers of recall rows, on rows that grow longer, at positions far beyond their length.

Induction is learnt far sooner on short rows with many questions, so the rows of a step are of one length, which grows
with the steps (`Recipe.lengths`); a batch always holds `batch * length` tokens. To be of use beyond the length of
training, a row's positions skip ahead at some beginnings of lines and pairs, up to the model's last position (after
PoSE, arXiv 2309.10400): every distance is seen, and what stands together stays together. The base of RoPE is so high
that half of each head hardly turns, which leaves room to match a key at any distance.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from pertoken.zoo import recall
from pertoken.zoo.objective import Objective

JUMPS = 8
"""The most jumps of position in a row."""


class AtPositions(nn.Module):
    """Normed hidden states `[batch, token, width]` of ids `[batch, token]` at positions `[batch, token]`, causal."""

    def __init__(self, model: LlamaForCausalLM):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        whole = torch.ones_like(ids)  # without a mask, transformers would take positions that skip for packed texts
        return self.model.model(
            input_ids=ids, position_ids=positions, attention_mask=whole, use_cache=False
        ).last_hidden_state


@torch.no_grad()
def look_back(model: LlamaForCausalLM, sharpness: float = 8.0) -> None:
    """First weights from which induction forms within hundreds of steps; from the usual ones it takes thousands.

    The embeddings share a direction. Head h of the first layer sees nothing else: its keys are one vector, its queries
    the same one turned by h + 1 positions, so that it reads the token h + 1 before, by `sharpness` per frequency.
    Values and outputs of all layers are orthogonal, so that what is read is passed on. All of it is then trained.
    """
    inner: Any = model.model
    config: Any = model.config
    table, std = inner.embed_tokens.weight, config.hidden_size**-0.5
    shared = torch.randn(config.hidden_size)
    table.normal_(std=std).add_(std * shared)
    for layer in inner.layers:
        for projection in (layer.self_attn.v_proj, layer.self_attn.o_proj):
            nn.init.orthogonal_(projection.weight, gain=0.5)
    direction = shared / shared.norm()
    normed = table / table.pow(2).mean(-1, keepdim=True).sqrt()
    frequency = inner.rotary_emb.inv_freq[:4]
    size = (sharpness * config.head_dim**0.5) ** 0.5 / float((normed @ direction).mean())
    attention = inner.layers[0].self_attn
    for projection, heads, turn in (
        (attention.k_proj, config.num_key_value_heads, 0),
        (attention.q_proj, config.num_attention_heads, 1),
    ):
        vector = torch.zeros(heads, 2, config.head_dim // 2)
        angle = turn * (1 + torch.arange(heads))[:, None] * frequency
        vector[..., : len(frequency)] = size * torch.stack([angle.cos(), -angle.sin()], 1)
        projection.weight.copy_(vector.flatten()[:, None] * direction)


def skipping(begins: np.ndarray, last: int, rng: np.random.Generator) -> np.ndarray:
    """Positions `[token]` of a row that rise by one, and by more at up to `JUMPS` beginnings; in every fourth row not.

    The row's span is log-uniform between its length and `last` positions, and so is its first position in what is left.
    """
    length = len(begins)
    steps = np.ones(length, dtype=np.int64)
    steps[0] = 0
    places = np.flatnonzero(begins[1:]) + 1
    if rng.random() < 0.75 and len(places):
        span = int(np.exp(rng.uniform(np.log(length), np.log(last))))
        at = rng.choice(places, rng.integers(1, JUMPS + 1))
        np.add.at(steps, at, rng.multinomial(span - length, rng.dirichlet(np.ones(len(at)))))
    positions = steps.cumsum()
    return positions + rng.integers(last - positions[-1]) if rng.random() < 0.5 else positions


class RecallAnswers(Objective):
    """Rows `[row, 3, length]`: ids, positions, and 1 where an answer is. A step's batch is cut into shorter rows."""

    def prepare(self, compile_model: bool) -> None:
        self.made = {split: recall.recall(self.tokenizer, split) for split in ("train", "heldout")}
        self.count = self.recipe.batch
        look_back(self.model)
        plain = AtPositions(self.model)
        self.forward = torch.compile(plain) if compile_model else plain

    def length(self, step: int) -> int:
        """Tokens of a row at a step."""
        for length, share in self.recipe.lengths:
            if step < share * self.recipe.steps:
                return length
        return self.recipe.length

    def rows(self, epoch: int) -> np.ndarray:
        """The rows of step `epoch`."""
        rng = np.random.default_rng((self.recipe.seed, epoch))
        length, recipe = self.length(epoch), self.recipe
        made = [self.row(length, rng) for _ in range(recipe.batch * recipe.length // length)]
        return np.stack(made).astype(np.uint16).reshape(recipe.batch, -1, 3, length)

    def row(self, length: int, rng: np.random.Generator) -> np.ndarray:
        """One row of a random task with from a few to as many pairs as fit, all of them asked for."""
        made, task = self.made["train"], recall.TASKS[rng.integers(len(recall.TASKS))]
        most = min(made.most(task, length, 0) // 2, made.most(task, 10**9, 0))
        pairs = int(np.exp(rng.uniform(0, np.log(most + 1)))) if rng.random() < 0.5 else most
        ids, question, _, begins = made.row(task, length, pairs, pairs, None, rng)
        return np.stack([ids, skipping(begins, self.recipe.shape.positions, rng), question >= 0])

    def loss(self, batch: np.ndarray, step: int, generator: torch.Generator) -> tuple[Tensor, float]:
        """The mean over answers, those of a row with n weighing 1 / sqrt(n)."""
        rows = torch.from_numpy(batch.astype(np.int64)).flatten(0, 1)
        ids, positions, answer = rows.unbind(1)
        answer = answer[:, 1:].bool()
        hidden = self.forward(ids[:, :-1], positions[:, :-1])
        losses = F.cross_entropy(self.model.lm_head(hidden[answer]).float(), ids[:, 1:][answer], reduction="none")
        weight = (answer / answer.sum(-1, keepdim=True).sqrt())[answer]
        total = (losses * weight).sum() / weight.sum()
        return total, float(losses.detach().mean())

    @torch.inference_mode()
    def evaluate(self, rows: int = 4) -> dict[str, float]:
        """Nats per token of held-out answers at the length of training, and by task the share of questions answered."""
        losses: list[Tensor] = []
        read = AtPositions(self.model)

        def predict(ids: Tensor, positions: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                hidden = read(ids[:, :-1], torch.arange(ids.shape[1] - 1)[None])[:, positions]
                logits = self.model.lm_head(hidden).float()
            losses.append(F.cross_entropy(logits.transpose(1, 2), ids[:, positions + 1]))
            return logits.argmax(-1)

        made, length = self.made["heldout"], self.recipe.length
        found = recall.accuracies(predict, made, lengths=[length], rows=rows)
        answered = {f"answered_{one['task']}": one["accuracy"] for one in found}
        return {"heldout": float(torch.stack(losses).mean())} | answered
