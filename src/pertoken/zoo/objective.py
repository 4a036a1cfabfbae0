"""What a run learns from and is judged by."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from pertoken.zoo.recipe import Recipe


class Objective(ABC):
    """Rows of training data, the loss of a batch of them, and held-out figures, for one model and recipe."""

    teacher: LlamaForCausalLM | None = None
    count: int  # rows per epoch, at least

    def __init__(self, recipe: Recipe, model: LlamaForCausalLM, tokenizer: Tokenizer, compile_model: bool):
        self.recipe, self.model, self.tokenizer = recipe, model, tokenizer
        self.prepare(compile_model)

    @abstractmethod
    def prepare(self, compile_model: bool) -> None:
        """Read the data and set `count`."""

    @abstractmethod
    def rows(self, epoch: int) -> np.ndarray:
        """The rows of an epoch `[row, entry]` in an order fixed by the recipe's seed."""

    @abstractmethod
    def loss(self, batch: np.ndarray, step: int, generator: torch.Generator) -> tuple[torch.Tensor, float]:
        """Training loss of one batch, and the plain loss in nats per token to be shown."""

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """Held-out figures, "heldout" (nats per token) among them, over the same text each time."""
