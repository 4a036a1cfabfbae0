"""Language models that see (LLaVA) or watch clips (LLaVA-NeXT-Video): canonical names of their parts.

An image encoder, one of whose layers is read; a projector; and a language model, which gets a vector per patch, or per
few patches of a frame, in the places of `token` in its text.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from pertoken.core.errors import BadRequest
from pertoken.models.vision import VisionAdapter, vision_adapter_for

IMAGE, VIDEO = "image", "video"


def sees_and_writes(model: Any) -> bool:
    """Whether a model is one of these."""
    return getattr(getattr(model, "config", None), "model_type", None) == "llava" and hasattr(model, "lm_head")


def watches_and_writes(model: Any) -> bool:
    """Whether a model is one that clips are shown to."""
    return getattr(getattr(model, "config", None), "model_type", None) == "llava_next_video" and hasattr(
        model, "lm_head"
    )


class Text:
    """The language model inside, as far as whoever changes its attention needs to know it."""

    def __init__(self, base: Any):
        self._base = weakref.ref(base)
        self.config: Any = base.config
        if not (hasattr(base, "rotary_emb") and hasattr(base.layers[0], "self_attn")):
            raise BadRequest(
                f"{type(base).__name__} has no rotary positions, at which image tokens could be put again; use a LLaVA "
                "with a language model of the Llama, Mistral or Qwen kind"
            )

    @property
    def base(self) -> Any:
        base = self._base()
        if base is None:
            raise ReferenceError("the model of this adapter is gone; make an adapter for a model that is still in use")
        return base

    @property
    def attentions(self) -> list[Any]:
        """The attention module of every layer."""
        return [layer.self_attn for layer in self.base.layers]

    def angles(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines `[row, position, dim]`."""
        return self.base.rotary_emb(hidden, positions)


class Llava:
    """The parts of one LLaVA, as far as they have to do with what is `shown`: "image" or "video"."""

    def __init__(self, model: Any, shown: str = IMAGE):
        self.shown = shown
        self._inner = weakref.ref(model.model)
        self.config: Any = model.config
        self.vision: VisionAdapter = vision_adapter_for(model.model.vision_tower)
        self.text = Text(model.model.language_model)

    @property
    def inner(self) -> Any:
        """The model without its head."""
        inner = self._inner()
        if inner is None:
            raise ReferenceError("the model of this adapter is gone; make an adapter for a model that is still in use")
        return inner

    @property
    def token(self) -> int:
        """What stands in the text where something is shown."""
        return self.config.image_token_id if self.shown == IMAGE else self.config.video_token_id

    @property
    def skipped(self) -> int:
        """Tokens of the encoder, from the first one on, that the language model is not shown."""
        return 1 if self.config.vision_feature_select_strategy == "default" else 0

    def frames(self, clips: Tensor) -> Tensor:
        """`[clip, frame, patch, width]`: states of the layer that is read, of clips `[clip, frame, channel, height,
        width]`."""
        layer = self.config.vision_feature_layer
        if not isinstance(layer, int):
            raise BadRequest(
                f"{len(layer)} layers of the encoder are read at once; use a model with one vision_feature_layer"
            )
        states = self.vision.base(clips.flatten(0, 1), output_hidden_states=True).hidden_states[layer]
        return states[:, self.skipped :].unflatten(0, clips.shape[:2])

    def pooled(self, states: Tensor) -> Tensor:
        """`[clip, place, width]` out of `frames`: those that the model's own pooling shows to its language model."""
        return self.inner.vision_resampler(states.flatten(0, 1)).unflatten(0, states.shape[:2]).flatten(1, 2)

    def projected(self, hidden: Tensor) -> Tensor:
        """What the language model gets for hidden states `[..., token, width]` of the encoder."""
        return self.inner.multi_modal_projector(hidden)

    def spots(self, ids: Tensor | None, embeds: Tensor | None) -> Tensor:
        """`[row, token]` bool: where a text has what is shown."""
        if ids is not None:
            return ids == self.token
        assert embeds is not None
        own = self.inner.get_input_embeddings()(torch.tensor(self.token, device=embeds.device))
        return (embeds == own).all(-1)
