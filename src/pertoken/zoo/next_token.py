"""Predict the next token, with LayerSkip's early exits and layer dropout, a teacher, and a stage against loops."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from pertoken.zoo import corpus
from pertoken.zoo.objective import Objective
from pertoken.zoo.unlikelihood import greedy_continuations, in_repeats, unlikelihood


def layer_drop_rates(layers: int, last: float) -> list[float]:
    """LayerSkip's schedule: layer `l` is dropped at rate `last * (2 ** (l / (layers - 1)) - 1)`."""
    return [last * (2 ** (i / max(layers - 1, 1)) - 1) for i in range(layers)]


def rotating_exits(step: int, layers: int) -> list[int]:
    """The two early exits trained at this step: one of the shallow third in turn, one of the deeper ones in turn.

    LayerSkip rotates over all exits alike; a self-speculating model drafts from its shallow third, so that gets half.
    """
    shallow = max((layers - 1) // 3, 1)
    return [step % shallow, shallow + step % (layers - 1 - shallow)] if layers > 2 else [0]


class LayerSkipForward(nn.Module):
    """Logits of the last layer and of some early exits, under per-sample layer dropout.

    ids `[batch, token]`, keep `[layer, batch]` (1 keeps the layer for that sample) -> hidden states `[exit, batch,
    token, width]` after the shared final norm, the last layer last. Built on the model's own modules.
    """

    def __init__(self, model: LlamaForCausalLM):
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, keep: torch.Tensor, exits: torch.Tensor) -> torch.Tensor:
        inner = self.model.model
        hidden = inner.embed_tokens(ids)
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        rotary = inner.rotary_emb(hidden, positions)
        states = []
        for layer, kept in zip(inner.layers, keep, strict=True):
            out = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=rotary)
            hidden = hidden + kept[:, None, None] * (out - hidden)
            states.append(hidden)
        chosen = torch.stack(states[:-1]).index_select(0, exits) if len(exits) else hidden.new_zeros(0, *hidden.shape)
        return inner.norm(torch.cat([chosen, hidden[None]]))


class NextToken(Objective):
    """Rows are windows of the corpus `[row, length + 1]`."""

    def prepare(self, compile_model: bool) -> None:
        self.stream = corpus.token_stream(self.tokenizer, list(corpus.split_texts("train").values()))
        self.heldout = corpus.token_stream(self.tokenizer, list(corpus.split_texts("heldout").values()))
        self.count = (len(self.stream) - 2 * self.recipe.length) // self.recipe.length
        plain = LayerSkipForward(self.model)
        self.forward = torch.compile(plain) if compile_model else plain

    def rows(self, epoch: int) -> np.ndarray:
        return corpus.windows(self.stream, self.recipe.length, epoch, self.recipe.seed)

    def loss(self, batch: np.ndarray, step: int, generator: torch.Generator) -> tuple[torch.Tensor, float]:
        """The plain loss is the final layer's."""
        recipe, layers = self.recipe, self.recipe.shape.layers
        tokens = torch.from_numpy(batch.astype(np.int64))
        ids, labels = tokens[:, :-1], tokens[:, 1:].flatten()
        rates = torch.tensor(layer_drop_rates(layers, recipe.layer_dropout))
        keep = (torch.rand(layers, len(ids), generator=generator) >= rates[:, None]).float()
        exits = torch.tensor(rotating_exits(step, layers) if recipe.exit_scale else [], dtype=torch.long)
        hidden = self.forward(ids, keep, exits)
        losses = [F.cross_entropy(self.model.lm_head(state).flatten(0, 1).float(), labels) for state in hidden[:-1]]
        logits = self.model.lm_head(hidden[-1]).flatten(0, 1).float()
        final = F.cross_entropy(logits, labels)
        total = final
        if self.teacher is not None:
            with torch.no_grad():
                target = self.teacher(ids, use_cache=False).logits.flatten(0, 1).float()
            kl = F.kl_div(logits.log_softmax(-1), target.log_softmax(-1), reduction="batchmean", log_target=True)
            total = recipe.distil * kl + (1 - recipe.distil) * final
        if losses:
            total = total + recipe.exit_scale * torch.stack(losses).mean()
        if step >= recipe.steps - recipe.unlikelihood_steps:
            total = total + recipe.unlikelihood_scale * unlikelihood(self.model, tokens[:, :192].reshape(-1, 96))
        return total, float(final.detach())

    @torch.inference_mode()
    def evaluate(self, batches: int = 24) -> dict[str, float]:
        """Held-out loss in nats per token of the last layer and of a shallow exit, over the same windows each time."""
        recipe, layers = self.recipe, self.recipe.shape.layers
        order = corpus.windows(self.heldout, recipe.length, 0, 1)[: batches * 4]
        keep = torch.ones(layers, 4)
        exits = torch.tensor([i for i in (0, 1, 2) if i < layers - 1])
        plain, sums = LayerSkipForward(self.model), torch.zeros(len(exits) + 1)
        count = 0
        for start in range(0, len(order) - 3, 4):
            tokens = torch.from_numpy(order[start : start + 4].astype(np.int64))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                hidden = plain(tokens[:, :-1], keep, exits)
                for i, state in enumerate(hidden):
                    logits = self.model.lm_head(state).flatten(0, 1).float()
                    sums[i] += F.cross_entropy(logits, tokens[:, 1:].flatten())
            count += 1
        means = (sums / count).tolist()
        prefixes = torch.from_numpy(order[:32, :96].astype(np.int64))
        repeated = in_repeats(greedy_continuations(self.model, prefixes, 96)).float().mean()
        return {
            "heldout": means[-1],
            "in_repeats": float(repeated),
            **{f"exit_{i + 1}": m for i, m in zip(exits.tolist(), means, strict=False)},
        }
