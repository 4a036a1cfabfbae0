"""Clips in a language model that watches: the tokens that stand for a clip are those that a policy makes and keeps.

While a policy is attached, the frames of a clip go through the model's image encoder as ever. Instead of the model's
own pooled tokens, one for each place that the prompt has for the clip, the policy `offers` candidates, which are
vectors of the language model's width, and decides with a `Keep` which of them stay. Those take the first places of the
clip; the other places are dropped, and the sequence is closed up (`language`), so that clips of one batch may have
different numbers of tokens. The full budget is the model itself.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from pertoken.core.attach import Attachment
from pertoken.core.budget import Budget
from pertoken.core.decision import Keep
from pertoken.core.errors import BadRequest
from pertoken.core.policy import Policy, View
from pertoken.models.llava import VIDEO, Llava, watches_and_writes
from pertoken.models.vision import vision_adapter_for
from pertoken.reduce.language import Seeing, usual

SITE = "reduce.clips"


@dataclass(frozen=True)
class Offer:
    """tokens `[clip, candidate, width]`; valid `[clip, candidate]` bool; signals: tensors `[clip, candidate]` that a
    policy decides by; notes: what else the attachment's state should tell of the last clips."""

    tokens: Tensor
    valid: Tensor
    signals: dict[str, Tensor] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, tokens: Tensor) -> Offer:
        """All of them there."""
        return cls(tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device))


@dataclass(frozen=True)
class Clips(Policy):
    """Base. budget: tokens of a clip at most, or their share of the places that the prompt has for it."""

    budget: Budget = Budget(fraction=0.5)
    reads: ClassVar[frozenset[str]] = frozenset()
    writes: ClassVar[frozenset[str]] = frozenset({"video tokens"})

    def __post_init__(self) -> None:
        if wrong := set(self.budget.units()) - {"tokens", "fraction"}:
            raise BadRequest(
                f"{type(self).__name__} compresses clips: budget {self.budget} means nothing to it (unit "
                f"{wrong.pop()}); give Budget(tokens=...) or Budget(fraction=...)"
            )

    @abstractmethod
    def offer(self, llava: Llava, states: Tensor, most: int, whole: bool) -> Offer:
        """Candidates for clips whose frames' states are `[clip, frame, patch, width]`, of which at most `most` of each
        clip will stay; whole: leave none out because it will not be needed."""

    @abstractmethod
    def decide(self, view: View) -> Keep:
        """Which of its candidates stay; under the full budget they are the model's own tokens, without signals."""

    def fitted(self, model: Any) -> Clips:
        """The policy with what it needs for this model; raises `BadRequest` where it was made for another."""
        return self

    def install(self, model: Any, attachment: Attachment) -> None:
        if not watches_and_writes(model):
            kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
            raise BadRequest(
                f"{type(self).__name__} compresses clips that are shown to a language model, and {kind!r} is shown "
                "none; give a LLaVA-NeXT-Video (LlavaNextVideoForConditionalGeneration)"
            )
        if self.budget.is_full and not attachment.taped:
            return
        attachment.policy = policy = self.fitted(model)
        llava = Llava(model, VIDEO)
        Seeing(llava, Watching(llava, policy, attachment), attachment, None).install()


class Watching:
    """One policy's tokens of clips: the source of `Seeing`."""

    def __init__(self, llava: Llava, policy: Clips, attachment: Attachment):
        self.llava, self.policy, self.attachment = llava, policy, attachment

    def __call__(
        self,
        pixel_values_videos: Tensor,
        vision_feature_layer: Any = None,
        vision_feature_select_strategy: str | None = None,
        **kwargs: Any,
    ) -> tuple[Any, Tensor, Tensor]:
        usual(self.llava, vision_feature_layer, vision_feature_select_strategy)
        check_clips(pixel_values_videos, self.llava)
        states = self.llava.frames(pixel_values_videos)
        own = self.llava.pooled(states)
        places = own.shape[1]
        if self.policy.budget.is_full:
            offer = Offer.of(self.llava.projected(own))
        else:
            most = self.policy.budget.count(places)
            offer = self.policy.offer(self.llava, states, most, self.attachment.replaying)
        self.attachment.state.update(offer.notes)
        view = View(valid=offer.valid, layers=0, signals=offer.signals)
        decision = self.attachment.decide(SITE, view)
        assert isinstance(decision, Keep)
        return states, *first_places(offer, decision, places)


def first_places(offer: Offer, decision: Keep, places: int) -> tuple[Tensor, Tensor]:
    """Tokens `[clip, place, width]`, those that stay first and zeros behind them, and `[clip, place]` the place itself,
    -1 where nothing stands."""
    if decision.keep.shape != offer.valid.shape:
        raise BadRequest(
            f"the decision is about {list(decision.keep.shape)} tokens of clips and there are "
            f"{list(offer.valid.shape)} here; replay with the model and the clips that were recorded"
        )
    keep = decision.keep & offer.valid
    counts = keep.sum(-1)
    if int(counts.max()) > places:
        raise BadRequest(
            f"a clip got {int(counts.max())} tokens and the prompt has {places} places for it; give a smaller budget, "
            "or more frames"
        )
    order = torch.where(keep, 0, 1).argsort(dim=-1, stable=True)[:, :places]
    tokens = offer.tokens.gather(1, order[..., None].expand(-1, -1, offer.tokens.shape[-1]))
    tokens = F.pad(tokens, (0, 0, 0, places - tokens.shape[1]))
    here = torch.arange(places, device=keep.device).expand(len(keep), -1)
    stands = here < counts[:, None]
    return tokens.masked_fill(~stands[..., None], 0), torch.where(stands, here, -1)


def check_clips(clips: Tensor, llava: Llava) -> None:
    """Raise `BadRequest` unless they are `[clip, frame, channel, height, width]` of frames that the encoder takes."""
    if clips.ndim != 5:
        raise BadRequest(
            f"clips are [clip, frame, channel, height, width], got {list(clips.shape)}; stack the frames of each clip"
        )
    if not clips.shape[0] or not clips.shape[1]:
        raise BadRequest(f"got {clips.shape[0]} clip(s) of {clips.shape[1]} frames; give at least one of each")
    size = vision_adapter_for(llava.vision.base).config.image_size
    wanted = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
    if tuple(clips.shape[-2:]) != wanted:
        raise BadRequest(
            f"frames of {clips.shape[-1]} x {clips.shape[-2]} pixels do not fit the encoder, which takes {wanted[1]} x "
            f"{wanted[0]}; resize them"
        )


def pooled_to(states: Tensor, rows: int, columns: int) -> Tensor:
    """`[clip, frame * rows * columns, width]`: means over the cells of a grid on each frame, of `[clip, frame, patch,
    width]`, whose patches are a square."""
    side = round(states.shape[2] ** 0.5)
    if side * side != states.shape[2]:
        raise BadRequest(f"frames of {states.shape[2]} patches are no squares; give square frames")
    if not (1 <= rows <= side and 1 <= columns <= side):
        raise BadRequest(f"a grid of {rows} x {columns} does not fit frames of {side} x {side} patches")
    flat = states.flatten(0, 1).transpose(1, 2).unflatten(-1, (side, side))
    cells = F.adaptive_avg_pool2d(flat, (rows, columns)).flatten(2).transpose(1, 2)
    return cells.unflatten(0, states.shape[:2]).flatten(1, 2)
