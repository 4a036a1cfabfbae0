"""A zoo model with low-rank weights for second passes, and the decider of which tokens get one (arXiv 2511.08577).

The reference is the model as it was: a token is hard if the reference's greedy next token is wrong. First the whole
model and the low-rank weights learn next-token cross-entropy with the hard tokens running again, each token scored on
what it says in the end; gradients run through both passes. Then all that is kept as it is, and the decider learns, by
binary cross-entropy weighed with the ratio of easy to hard tokens, which ones are hard; tokens that are not asked (a
prompt's) count as easy in a loss of their own, so that it leaves them alone.

Controls learn from the same rows for as many steps: a model of which every token is given two passes, and one that has
a single pass as ever. `backbone=0` leaves the model's own weights alone and trains what is beside them.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pertoken.core.attach import attach
from pertoken.core.errors import BadRequest
from pertoken.core.policy import View
from pertoken.depth.deciders import SHARES, AsGiven, Decider, NeuralDecider
from pertoken.depth.lora import Lora
from pertoken.depth.passes import BOTH, PassView
from pertoken.depth.think_at_hard import ThinkAtHard
from pertoken.models.signature import signature
from pertoken.zoo.train import save_pretrained
from pertoken.zoo.tuning import Task, Tuning

HARD, ALWAYS, ONCE = "hard", "always", "once"
GROUPS = (HARD, ALWAYS, ONCE)
MEASURED = 24  # batches on which shares are measured


@dataclass(frozen=True)
class Thinking(Tuning):
    """backbone: learning rate of the model's own weights, as a share of that of the low-rank ones; rank, alpha,
    dropout: of the low-rank weights; inner, looks: width of the decider and how many layers it looks at; again: which
    tokens run again while the weights are trained: the "hard" ones, "always" all, or for a control of one pass none
    ("once"); sees: whose keys a second pass reads, see `PassPolicy`."""

    model: str = "reasoning"
    text: str = "reasoning"
    steps: int = 300
    first: int = 150
    second: float = 0.6
    batch: int = 16
    length: int = 128
    lr: float = 2e-3
    weight_decay: float = 0.01
    backbone: float = 0.2
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.1
    inner: int = 32
    looks: int = 5
    again: str = HARD
    sees: str = BOTH

    def task(self, model: Any, tokenizer: Any) -> Task:
        return ThinkingTask(self, model, tokenizer)


@dataclass
class Looking(Decider):
    """Lets nobody run again, and keeps what it was shown."""

    layers: tuple[int, ...]
    seen: list[PassView] = field(default_factory=list)

    def chances(self, view: PassView) -> Tensor:
        assert view.logits is not None
        self.seen.append(view)
        return torch.zeros(len(view.logits))


class ThinkingTask(Task):
    """Both stages. Batches are ids `[batch, token]`, or `[batch, 2, token]` with 1 where the second marks an answer."""

    def __init__(self, recipe: Thinking, model: Any, tokenizer: Any):
        if recipe.again not in GROUPS:
            raise BadRequest(f"again={recipe.again!r} is unknown; choose one of {', '.join(GROUPS)}")
        if recipe.again == ONCE and not recipe.backbone:
            raise BadRequest("with one pass only the model itself can learn; give backbone above 0")
        self.recipe, self.model, self.tokenizer = recipe, model, tokenizer
        self.reference = copy.deepcopy(model)
        model.requires_grad_(recipe.backbone > 0)
        self.lora = Lora.for_model(model, recipe.rank, recipe.alpha, recipe.dropout)
        self.decider = NeuralDecider.for_model(model, recipe.inner, recipe.looks)
        self.module = nn.ModuleList([self.lora, self.decider, model])
        self.slower, self.pace = model, recipe.backbone
        self.last: list[Tensor] = []

    def loss(self, ids: Tensor, step: int) -> Tensor:
        tokens, truth = asked(ids)
        if step < self.recipe.first:
            return self.weights_loss(tokens, truth)
        self.last = [*self.last, ids][-MEASURED:]
        return self.decider_loss(tokens, truth)

    @torch.no_grad()
    def hard(self, tokens: Tensor, truth: Tensor) -> Tensor:
        """Tokens `[batch, token]` that the reference gets wrong; truth -1 where nothing is asked."""
        return (self.reference(tokens, use_cache=False).logits.argmax(-1) != truth) & (truth >= 0)

    def weights_loss(self, tokens: Tensor, truth: Tensor) -> Tensor:
        """Cross-entropy of what is said in the end; tokens and truth `[batch, token]`, truth -1 where nothing is
        asked."""
        if self.recipe.again == ONCE:
            logits = self.model(tokens, use_cache=False).logits
        else:
            again = self.hard(tokens, truth) if self.recipe.again == HARD else torch.ones_like(truth)
            self.lora.about |= {"model": signature(self.model)}  # which moves with every step
            policy = ThinkAtHard(decider=AsGiven(1 + again.long()), lora=self.lora, sees=self.recipe.sees)
            with attach(self.model, policy, training=True):
                logits = self.model(tokens, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), truth.flatten(), ignore_index=-1)

    def judged(self, tokens: Tensor, truth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Per token `[n]`: the decider's log-odds, whether it is hard, and whether it is asked."""
        looking = Looking(self.decider.layers)
        with torch.no_grad(), attach(self.model, ThinkAtHard(decider=looking), training=True):
            self.model(tokens, use_cache=False)
        view: View = looking.seen[0]
        assert isinstance(view, PassView) and view.logits is not None
        odds = self.decider([view.states[at] for at in self.decider.layers], view.logits)
        return odds, self.hard(tokens, truth).flatten(), truth.flatten() >= 0

    def decider_loss(self, tokens: Tensor, truth: Tensor) -> Tensor:
        odds, hard, counted = self.judged(tokens, truth)
        ratio = (counted & ~hard).sum() / hard.sum().clamp(min=1)
        found = F.binary_cross_entropy_with_logits(odds[counted], hard[counted].float(), pos_weight=ratio)
        if bool(counted.all()):
            return found
        return found + F.binary_cross_entropy_with_logits(odds[~counted], torch.zeros_like(odds[~counted]))

    @torch.no_grad()
    def shares(self) -> list[float]:
        """Chances above which each thousandth of the tokens asked of the last batches lies."""
        self.decider.eval()
        found = []
        for ids in self.last:
            odds, _, counted = self.judged(*asked(ids))
            found.append(odds[counted].sigmoid())
        places = torch.linspace(1, 0, SHARES + 1, dtype=torch.double)
        return torch.cat(found).double().quantile(places).tolist()

    def save(self, directory: Path, about: dict[str, Any]) -> None:
        """The model in Hugging Face format, with what was learnt beside it: the decider of a model that needs one."""
        here = {"model": signature(self.model), "recipe": about}
        self.model.config.recipe = about
        save_pretrained(self.model, self.tokenizer.backend_tokenizer, directory, torch.bfloat16)
        if self.recipe.again != ONCE:
            self.lora.about |= here
            self.lora.save(directory)
        if self.last:
            self.decider.about |= here | {"shares": [round(one, 6) for one in self.shares()]}
            self.decider.save(directory)


def asked(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens `[batch, token]` and what follows each, -1 where that is not asked; ids as batches have them."""
    if ids.ndim == 2:
        return ids[:, :-1], ids[:, 1:]
    tokens, answer = ids.unbind(1)
    return tokens[:, :-1], torch.where(answer[:, 1:].bool(), tokens[:, 1:], -1)
