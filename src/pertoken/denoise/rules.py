"""The plug-in decisions of the denoising loop, and what they are shown.

A *commit rule* says which undecided positions of each row's present block become final; a *refresh rule* says which
positions' keys and values are computed in the next forward; a *canvas rule* may end rows early; a *constraint* says
what the text may be. All are frozen and look at each row by itself, so that a row does not depend on its batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from pertoken.core.errors import BadRequest
from pertoken.denoise.canvas import Canvas

if TYPE_CHECKING:
    from pertoken.denoise.settings import Settings
    from pertoken.denoise.watch import Watch


@dataclass
class Guess:
    """What the model says about every undecided place of each row's block; and about the decided ones, for a rule that
    `reads_decided`. Otherwise these have their token, no confidence and scores of zero.

    scores `[row, place, vocabulary]` float32 logits after the request's processors (temperature, top-k, top-p); tokens
    `[row, place]`: their argmax or a sample; confidence `[row, place]` float64: the probability of that token before
    the processors; masked `[row, place]`: undecided, and computed in this forward; quota `[row]`: how many places the
    pace commits at this step.
    """

    scores: Tensor
    tokens: Tensor
    confidence: Tensor
    masked: Tensor
    quota: Tensor

    @property
    def ranked(self) -> Tensor:
        """Confidence with decided places at minus infinity."""
        return self.confidence.masked_fill(~self.masked, -torch.inf)

    @cached_property
    def sharpened(self) -> Tensor:
        """`[row, place]` float64: the probability of each token after the processors."""
        scores = self.scores.double()
        return (scores.gather(-1, self.tokens[..., None])[..., 0] - scores.logsumexp(-1)).exp()

    @cached_property
    def entropy(self) -> Tensor:
        """`[row, place]` float64 nats."""
        return torch.special.entr(self.scores.double().softmax(-1)).sum(-1)


def top(ranked: Tensor, count: Tensor) -> Tensor:
    """bool `[row, place]`: the `count[row]` highest finite places of `ranked`; the first of equal ones wins."""
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(ranked.shape[-1], device=order.device).expand_as(order)
    )
    return (rank < count[:, None]) & (ranked > -torch.inf)


class Rule(ABC):
    """Base of all four. A rule is also a decoder: called, it runs the loop with itself and defaults for the others."""

    slot: str
    beside: ClassVar[Mapping[str, Any]] = {}  # what the loop gets when the rule itself is called

    def __call__(self, model: Any, input_ids: Tensor, **kwargs: Any) -> Any:
        """For `model.generate(..., custom_generate=rule)`."""
        from pertoken.denoise.loop import Denoise

        rules: dict[str, Any] = {**self.beside, self.slot: self}
        return Denoise(**rules)(model, input_ids, **kwargs)

    def fitted(self, settings: Settings) -> Any:
        """This rule made ready for what a call asks; raises `BadRequest` if it cannot be."""
        return self


class CommitRule(Rule):
    """Which undecided places of the block become final. The loop commits the most confident one where none is."""

    slot = "commit"
    reads_decided = False  # whether `choose` looks at guesses for decided places, which cost as much as the others

    @abstractmethod
    def choose(self, guess: Guess, canvas: Canvas) -> Tensor:
        """bool `[row, place]`; decided places are ignored."""

    def upcoming(self, canvas: Canvas, quota: Tensor) -> Tensor | None:
        """bool `[row, column]`: what this rule will commit at this step, if it knows before the forward; quota `[row]`
        as in `Guess`."""
        return None


@dataclass(frozen=True)
class Ranked(CommitRule):
    """Commits the places of the highest rank, as many as the pace says.

    alg_temp: 0, or Dream's temperature: the places are then drawn without replacement from softmax(rank / alg_temp),
    by Gumbel noise in float64 (the top n of rank / alg_temp + noise have that law).
    """

    alg_temp: float = 0.0

    def __post_init__(self) -> None:
        if not self.alg_temp >= 0:
            raise BadRequest(f"alg_temp={self.alg_temp} is not a temperature; give 0 (the highest rank) or more")

    @abstractmethod
    def rank(self, guess: Guess) -> Tensor:
        """float64 `[row, place]`, higher is surer; values at decided places are ignored."""

    def choose(self, guess: Guess, canvas: Canvas) -> Tensor:
        rank = self.rank(guess).masked_fill(~guess.masked, -torch.inf)
        if self.alg_temp:
            rank = rank / self.alg_temp - torch.empty_like(rank).exponential_().log_()
        return top(rank, guess.quota)


class RefreshRule(Rule):
    """Which positions are computed in the next forward.

    full: settings of the rule, or of the loop, under which it keeps nothing: it then is no cache, bit for bit.
    """

    slot = "refresh"
    full: ClassVar[Mapping[str, Any]]

    @property
    def sliding(self) -> int | None:
        """How many undecided positions the loop's block is to have, sliding along; None for blocks as the loop has
        them."""
        return None

    def watch(self) -> Watch | None:
        """For a rule that decides in mid-forward: what looks on during this call."""
        return None

    @abstractmethod
    def plan(self, canvas: Canvas, upcoming: Tensor | None) -> Tensor:
        """bool `[row, column]` over all positions; invalid ones are ignored. The outputs that predict the planned
        tokens are computed along."""


class CanvasRule(Rule):
    """Where rows may end before the canvas does."""

    slot = "canvas"
    reads_all = False  # whether `trim` needs guesses for the undecided positions of all blocks
    keeps = False  # whether what lies behind a row's end stays in place as padding, undecided positions decided

    @abstractmethod
    def trim(self, canvas: Canvas, eos: Tensor, found: Tensor, guesses: tuple[Tensor, Tensor] | None) -> Tensor:
        """`[row]` columns before which each row ends from now on (`canvas.width` for no change).

        eos `[token]`: the tokens that end a text, any of them; found `[row, column]`: positions committed at this step;
        guesses: tokens and confidences `[row, column]` at all undecided positions, if `reads_all`.
        """


class Constraint(Rule):
    """What the filled canvas must be: after every commit it must still be possible to complete it."""

    slot = "constraint"

    @abstractmethod
    def limit(self, scores: Tensor, canvas: Canvas, places: Tensor) -> Tensor:
        """Scores `[row, place, vocabulary]` with minus infinity for every token that, alone put at column `places[row,
        place]`, leaves no completion. An undecided place with no token left is an error of the request."""

    @abstractmethod
    def admit(self, chosen: Tensor, guess: Guess, canvas: Canvas) -> Tensor:
        """bool `[row, place]`: a subset of `chosen` that may be committed together, never empty for a row that has
        chosen anything: each alone is possible by `limit`."""
