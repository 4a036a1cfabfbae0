"""The threshold of AdaDec for a zoo model: `decode.adadec.learn_threshold` on windows of the training files.

It is kept in the model's own directory, where `AdaDec()` looks for it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pertoken.decode.adadec import FILE, learn_threshold
from pertoken.models.load import load
from pertoken.zoo import WEIGHTS, corpus


@dataclass(frozen=True)
class Pausing:
    """model: of the zoo; steps: windows learnt from, each of `length` tokens, of which the first `given` are not."""

    model: str = "code-target"
    steps: int = 128
    length: int = 256
    given: int = 32
    files: int = 120
    seed: int = 20261128

    @property
    def kept(self) -> Path:
        """Where the threshold lies that comes with the package."""
        return WEIGHTS / self.model / FILE


PAUSES = {"code-pause": Pausing()}


def learn(directory: Path, recipe: Pausing, status: Callable[[str], None] = print) -> Path:
    """Learn the recipe's threshold, in fp32, into a file of `directory`."""
    model, tokenizer = load(f"zoo:{recipe.model}", "fp32")
    texts = list(corpus.split_texts("train").values())
    random.Random(recipe.seed).shuffle(texts)
    stream = corpus.token_stream(tokenizer.backend_tokenizer, texts[: recipe.files])
    rows = corpus.windows(stream, recipe.length - 1, 0, recipe.seed)[: recipe.steps].astype(np.int64)
    status(f"reading {rows.size} tokens")
    found = learn_threshold(model, rows.tolist(), given=recipe.given, seed=recipe.seed)
    status(f"pausing from {found.entropy:.3f} nats, at {100 * found.pauses:.1f} % of the tokens")
    directory.mkdir(parents=True, exist_ok=True)
    found.save(directory)
    return directory / FILE
