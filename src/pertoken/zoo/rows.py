"""Rows of text and of prompts with answers: what the diffusion model, its twin and the insertion model learn from."""

from __future__ import annotations

import numpy as np
from tokenizers import Tokenizer

from pertoken.zoo import corpus
from pertoken.zoo.functions import functions
from pertoken.zoo.recipe import Recipe
from pertoken.zoo.unit_tests import unit_tests


class Rows:
    """Rows `[row, 1 + length]`: how many leading tokens are given, and the tokens, the first of them the end of text.

    They are windows of the corpus, functions with their bodies and functions with unit tests, in the recipe's shares.
    Answers are filled up with the end of text; their prompt is given in every other row. heldout: the held-out stream.
    """

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer):
        self.recipe, self.length, self.seed, self.tokenizer = recipe, recipe.length, recipe.seed, tokenizer
        texts = {split: list(corpus.split_texts(split).values()) for split in ("train", "heldout")}
        self.stream = corpus.token_stream(tokenizer, texts["train"])
        self.heldout = corpus.token_stream(tokenizer, texts["heldout"])
        self.end = tokenizer.token_to_id(corpus.END_OF_TEXT)
        self.answers = self.encoded(functions(texts["train"]))
        self.windows = (len(self.stream) - 2 * self.length) // self.length
        self.count = int(self.windows / (1 - recipe.answers))

    def encoded(self, pairs: list[tuple[str, str]]) -> np.ndarray:
        """Rows of prompts with their answers, those that fit."""
        rows = []
        prompts = self.tokenizer.encode_batch([prompt for prompt, _ in pairs], add_special_tokens=False)
        answers = self.tokenizer.encode_batch([answer for _, answer in pairs], add_special_tokens=False)
        for prompt, answer in zip(prompts, answers, strict=True):
            ids = [self.end, *prompt.ids, *answer.ids]
            if len(ids) < self.length:
                rows.append([1 + len(prompt.ids), *ids, *[self.end] * (self.length - len(ids))])
        return np.array(rows, dtype=np.uint16).reshape(-1, 1 + self.length)

    def epoch(self, epoch: int) -> np.ndarray:
        """The rows of an epoch, at least `count`, in an order fixed by the recipe's seed."""
        rng = np.random.default_rng((self.seed, epoch, 1))
        text = corpus.windows(self.stream, self.length - 1, epoch, self.seed)[: self.windows]
        text = np.concatenate([np.ones((len(text), 1), np.uint16), text], 1)
        wanted = max(self.count - len(text), 1)
        tests = self.encoded(unit_tests(int(self.recipe.tests * wanted), seed=self.seed + epoch))
        left = wanted - len(tests)
        chosen = rng.permutation(np.arange(left) % max(len(self.answers), 1))
        answers = np.concatenate([self.answers[chosen] if len(self.answers) else self.answers, tests])
        answers[rng.random(len(answers)) < 0.5, 0] = 1
        return rng.permutation(np.concatenate([text, answers]))
