"""Fill in masked tokens: LLaDA's masked-diffusion loss (arXiv 2502.09992), on text and on prompts with answers.

Per row t ~ U(0, 1) and p = (1 - eps) t + eps; every token that is not given is masked with probability p, and the loss
is the sum over masked tokens of CE / p, divided by the number of tokens that could have been masked. Answers are padded
with the end of text up to the length of the row, and that padding is trained on. The output at i - 1 predicts token i
(Dream's alignment), which lets a run start from the weights of a next-token model.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from pertoken.zoo import corpus
from pertoken.zoo.functions import functions
from pertoken.zoo.objective import Objective
from pertoken.zoo.unit_tests import unit_tests

MASK = "<|mask|>"
EPS = 1e-3
LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)  # shares of masked tokens at which held-out text is judged


class Bidirectional(nn.Module):
    """Normed hidden states `[batch, token, width]` of ids `[batch, token]`; every token reads every other."""

    def __init__(self, model: LlamaForCausalLM):
        super().__init__()
        self.model = model
        model.config.is_causal = False
        for layer in model.model.layers:
            layer.self_attn.is_causal = False

    def forward(self, ids: Tensor) -> Tensor:
        inner = self.model.model
        hidden = inner.embed_tokens(ids)
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        rotary = inner.rotary_emb(hidden, positions)
        for layer in inner.layers:
            hidden = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=rotary)
        return inner.norm(hidden)


class MaskedTokens(Objective):
    """Rows `[row, 1 + length]`: how many leading tokens are given, and the tokens.

    Half of the rows are windows of the corpus, the others functions and, one in six, functions with unit tests; of
    these the prompt is given in every other row.
    """

    def prepare(self, compile_model: bool) -> None:
        texts = {split: corpus.split_texts(split) for split in ("train", "heldout")}
        self.stream = corpus.token_stream(self.tokenizer, list(texts["train"].values()))
        self.heldout = corpus.token_stream(self.tokenizer, list(texts["heldout"].values()))
        self.end = self.tokenizer.token_to_id(corpus.END_OF_TEXT)
        self.mask = self.tokenizer.token_to_id(MASK)
        self.answers = self.encoded(functions(list(texts["train"].values())))
        self.windows = (len(self.stream) - 2 * self.recipe.length) // self.recipe.length
        self.count = 2 * self.windows
        self.model.config.mask_token_id, self.model.config.prediction_shift = self.mask, 1
        plain = Bidirectional(self.model)
        self.forward = torch.compile(plain) if compile_model else plain

    def encoded(self, pairs: list[tuple[str, str]]) -> np.ndarray:
        """Rows of prompts with their answers, those that fit."""
        length, rows = self.recipe.length, []
        prompts = self.tokenizer.encode_batch([prompt for prompt, _ in pairs])
        answers = self.tokenizer.encode_batch([answer for _, answer in pairs])
        for prompt, answer in zip(prompts, answers, strict=True):
            ids = [self.end, *prompt.ids, *answer.ids]
            if len(ids) < length:
                rows.append([1 + len(prompt.ids), *ids, *[self.end] * (length - len(ids))])
        return np.array(rows, dtype=np.uint16).reshape(-1, 1 + length)

    def rows(self, epoch: int) -> np.ndarray:
        length, rng = self.recipe.length, np.random.default_rng((self.recipe.seed, epoch, 1))
        text = corpus.windows(self.stream, length - 1, epoch, self.recipe.seed)[: self.windows]
        text = np.concatenate([np.ones((len(text), 1), np.uint16), text], 1)
        tests = self.encoded(unit_tests(len(text) // 6, seed=self.recipe.seed + epoch))
        wanted = len(text) - len(tests)
        chosen = rng.permutation(np.arange(wanted) % max(len(self.answers), 1))
        answers = np.concatenate([self.answers[chosen] if len(self.answers) else self.answers, tests])
        answers[rng.random(len(answers)) < 0.5, 0] = 1
        return rng.permutation(np.concatenate([text, answers]))

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
        order = corpus.windows(self.heldout, length - 1, 0, 1)[: 8 * batches]
        found = {}
        for level in LEVELS:
            sums, count = 0.0, 0
            for start in range(0, len(order), 8):
                ids = torch.from_numpy(order[start : start + 8].astype(np.int64))
                masked = torch.rand(ids.shape, generator=generator) < level
                masked[:, 0] = False
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    losses = self.cross_entropies(
                        Bidirectional(self.model)(ids.masked_fill(masked, self.mask)), ids, masked
                    )
                sums, count = sums + float(losses.sum()), count + len(losses)
            found[f"masked_{level}"] = sums / count
        return {"heldout": sum(found.values()) / len(found)} | {k: found[k] for k in ("masked_0.1", "masked_0.5")}
