"""One adapter per family of vision transformers: canonical names of an image encoder's parts, and a layer in two
halves.

The counterpart of `adapter.py` for encoders of image patches: ViT, DeiT, DINOv2 (with registers too), CLIP and SigLIP.
All of them add their positions before the first layer and attend in full, so that a layer runs on any subset of its
tokens.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor, nn

from pertoken.models.adapter import Sites, UnknownFamily


class VisionAdapter(Sites):
    """Canonical sites of one image encoder. hidden `[batch, token, width]`, the prefix (class token, registers)
    first."""

    @property
    def base(self) -> Any:
        """The encoder."""
        return self.model

    @abstractmethod
    def attend(self, index: int, hidden: Tensor) -> Tensor:
        """The first half of layer `index`: hidden states after attention and its residual."""

    @abstractmethod
    def feed(self, index: int, hidden: Tensor) -> Tensor:
        """The second half: hidden states after the feed-forward block and its residual."""

    @property
    def prefix(self) -> int:
        """Tokens before the patches."""
        return 1


class ViT(VisionAdapter):
    model_types = ("vit",)

    @property
    def layers(self) -> nn.ModuleList:
        return self.base.layers

    def attention(self, index: int) -> Any:
        return self.layers[index].attention

    def attend(self, index: int, hidden: Tensor) -> Tensor:
        layer: Any = self.layers[index]
        return layer.dropout(layer.attention(layer.layernorm_before(hidden))[0]) + hidden

    def feed(self, index: int, hidden: Tensor) -> Tensor:
        layer: Any = self.layers[index]
        return layer.dropout(layer.mlp(layer.layernorm_after(hidden))) + hidden


class DeiT(ViT):
    """DeiT: a distillation token beside the class token."""

    model_types = ("deit",)

    @property
    def prefix(self) -> int:
        return 2


class Dinov2(VisionAdapter):
    model_types = ("dinov2", "dinov2_with_registers")

    @property
    def layers(self) -> nn.ModuleList:
        return self.base.encoder.layer

    def attention(self, index: int) -> Any:
        return self.layers[index].attention

    def attend(self, index: int, hidden: Tensor) -> Tensor:
        layer: Any = self.layers[index]
        out = layer.layer_scale1(layer.attention(layer.norm1(hidden))[0])
        return layer.drop_path(out) + hidden

    def feed(self, index: int, hidden: Tensor) -> Tensor:
        layer: Any = self.layers[index]
        return layer.drop_path(layer.layer_scale2(layer.mlp(layer.norm2(hidden)))) + hidden

    @property
    def prefix(self) -> int:
        return 1 + getattr(self.config, "num_register_tokens", 0)


class CLIP(VisionAdapter):
    model_types = ("clip_vision_model",)

    @property
    def layers(self) -> nn.ModuleList:
        return self.base.encoder.layers

    def attention(self, index: int) -> Any:
        return self.layers[index].self_attn

    def attend(self, index: int, hidden: Tensor) -> Tensor:
        layer: Any = self.layers[index]
        return hidden + layer.self_attn(hidden_states=layer.layer_norm1(hidden), attention_mask=None)[0]

    def feed(self, index: int, hidden: Tensor) -> Tensor:
        layer: Any = self.layers[index]
        return hidden + layer.mlp(layer.layer_norm2(hidden))


class SigLIP(CLIP):
    """SigLIP: CLIP's layers and no class token."""

    model_types = ("siglip_vision_model",)

    @property
    def prefix(self) -> int:
        return 0


_ADAPTERS: dict[str, type[VisionAdapter]] = {
    kind: cls for cls in (ViT, DeiT, Dinov2, CLIP, SigLIP) for kind in cls.model_types
}


def vision_families() -> tuple[str, ...]:
    """Names (transformers' `model_type`) of every family of image encoders with an adapter."""
    return tuple(sorted(_ADAPTERS))


def vision_adapter_for(model: Any) -> VisionAdapter:
    """The adapter of this image encoder, or of the one inside this model (a classifier, a segmenter, a LLaVA).

    Raises `UnknownFamily` naming the families that have one.
    """
    for module in model.modules():
        kind = getattr(getattr(module, "config", None), "model_type", None)
        if kind in _ADAPTERS and hasattr(module, "embeddings"):
            return _ADAPTERS[kind](module)
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    raise UnknownFamily(
        f"model family {kind!r} ({type(model).__name__}) holds no image encoder with an adapter; families with one: "
        f"{', '.join(vision_families())}. Give a model of one of these, or add an adapter in pertoken/models/vision.py"
    )
