"""Tokens that are sure of their label leave the encoder with it: the mechanism of early exits per token in a segmenter.

At the end of each stage of a `PlainSegmenter` its head grades the tokens that are still there. What it says of a token
is written on a canvas of all patches, and later heads overwrite it for the tokens that reach them. Tokens that a policy
finalises are neither queries nor keys from then on and are graded no more.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from pertoken.core.attach import Attachment
from pertoken.core.budget import Budget
from pertoken.core.decision import Assign
from pertoken.core.errors import BadRequest
from pertoken.core.policy import View
from pertoken.models.segmenter import Graded, PlainSegmenter
from pertoken.models.vision import VisionAdapter
from pertoken.reduce.reduction import Reducing, Reduction, TokenView, stay
from pertoken.reduce.tokens import Tokens

SCORES = "scores"
FREEZES = ("mask", "score")


@dataclass(frozen=True)
class Finalising(Reduction):
    """Base. budget: patches of each image, in tokens or as a share, that reach the last head at least; freeze: what of
    a finalised token is final, its "mask" logits, so that the presence of classes as the last head sees it still acts
    on them, or its "score"."""

    budget: Budget = Budget(fraction=0.0)
    freeze: str = "mask"
    ends: tuple[int, ...] = field(default=(), kw_only=True, repr=False)
    place: ClassVar[str] = "after"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.freeze not in FREEZES:
            raise BadRequest(f"freeze={self.freeze!r} is unknown; choose {' or '.join(map(repr, FREEZES))}")

    @abstractmethod
    def finalised(self, view: TokenView, most: Tensor) -> Tensor:
        """`[image, token]` bool: which tokens leave, at most `most` `[image]` of each image. `view.signals` has the
        `SCORES` `[image, token, class]` of the stage's head, 0 for tokens that are no patches."""

    def acts(self, index: int, tokens: Tokens, patches: int, layers: int) -> bool:
        return index in self.ends[:-1]

    def decide(self, view: View) -> Assign:
        assert isinstance(view, TokenView)
        if SCORES not in view.signals or view.index not in self.ends[:-1]:
            return stay(view, view.valid)
        now = view.valid.sum(-1) - view.prefix
        most = (now - max(self.budget.count(view.patches), 1)).clamp(min=0)
        patch = view.valid.clone()
        patch[:, : view.prefix] = False
        return stay(view, ~(self.finalised(view, most) & patch))

    def mechanism(self, adapter: VisionAdapter, model: Any, attachment: Attachment) -> Reducing:
        if not isinstance(model, PlainSegmenter):
            raise BadRequest(
                f"{type(self).__name__} finalises tokens by the heads of a PlainSegmenter, got {type(model).__name__}; "
                "put one around the encoder (pertoken.models.segmenter)"
            )
        grading = Grading(model, attachment, self.freeze)
        grading.install()
        return Reducing(adapter, self, attachment, grades=grading.grade)

    def fitted(self, adapter: VisionAdapter, model: Any) -> Finalising:
        return replace(self, ends=tuple(getattr(model.config, "ends", ())))


class Grading:
    """The heads of one segmenter, run on the tokens that are there at the end of each stage."""

    def __init__(self, model: PlainSegmenter, attachment: Attachment, freeze: str):
        self.model, self.attachment, self.freeze = model, attachment, freeze
        self.ends: list[int] = list(model.config.ends)
        self.found: list[Graded] = []

    def install(self) -> None:
        own, attachment = self.model.graded, self.attachment

        def graded(pixel_values: Tensor, every: bool = False) -> list[Graded]:
            if not attachment.enabled:
                return own(pixel_values, every)
            self.found = []
            self.model.encoder(pixel_values)
            found, self.found = self.found, []
            return found if every else found[-1:]

        attachment.set_attribute(self.model, "graded", graded)

    def grade(self, index: int, tokens: Tokens, hidden: Tensor) -> dict[str, Tensor]:
        """What a policy is told at the end of layer `index`: nothing within a stage."""
        if index not in self.ends:
            return {}
        prefix = tokens.prefix
        states = tokens.padded(hidden.reshape(tokens.total, -1))[:, prefix:]
        valid = tokens.valid[:, prefix:]
        graded = self.model.heads[self.ends.index(index)](states, valid)
        scores = graded.scores
        place = tokens.place[:, prefix:] - prefix
        logits, frozen = graded.logits, scores
        if self.found:
            before = self.found[-1]
            logits = written(before.logits, graded.logits, place)
            frozen = written(before.scores, scores, place)
        self.found.append(Graded(logits, graded.presence_logits, frozen if self.freeze == "score" else None))
        return {SCORES: torch.nn.functional.pad(scores.detach(), (0, 0, prefix, 0))}


def written(canvas: Tensor, values: Tensor, place: Tensor) -> Tensor:
    """`canvas` `[image, patch, class]` with `values` `[image, token, class]` where a patch's token `place` is there."""
    found = values.gather(1, place.clamp(min=0)[..., None].expand(-1, -1, values.shape[-1]))
    return torch.where((place >= 0)[..., None], found, canvas)
