"""One adapter per architecture family: canonical names for the parts of a decoder, and how to run one layer.

Everything that knows how a family spells its modules is here. To add a family: subclass `Adapter`, name its
`model_types`, and override what differs from Llama; the contract tests then run over it.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class UnknownFamily(ValueError):
    """The model's architecture has no adapter."""


class Sites(ABC):
    """What the adapters of language models and of image encoders share. It holds its model weakly."""

    model_types: ClassVar[tuple[str, ...]] = ()

    def __init__(self, model: nn.Module):
        self._model = weakref.ref(model)
        self.config: Any = model.config

    @property
    def model(self) -> Any:
        """The model, which whoever runs it keeps alive: what is cached about a model must not."""
        model = self._model()
        if model is None:
            raise ReferenceError("the model of this adapter is gone; make an adapter for a model that is still in use")
        return model

    @property
    @abstractmethod
    def layers(self) -> nn.ModuleList: ...

    @abstractmethod
    def attention(self, index: int) -> Any:
        """The attention module of layer `index`."""

    @property
    def depth(self) -> int:
        return len(self.layers)

    @property
    def heads(self) -> int:
        return self.config.num_attention_heads

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


class Adapter(Sites):
    """Canonical sites of one language model. Tensors: ids and positions `[batch, token]`, hidden `[batch, token,
    width]`."""

    @property
    @abstractmethod
    def base(self) -> nn.Module:
        """The module without the head, whose forward runs the layers."""

    @property
    def entry(self) -> nn.Module | None:
        """The module whose output goes into the first layer, where the base model reads a shape off it."""
        return None

    @abstractmethod
    def embed(self, ids: Tensor, positions: Tensor) -> Tensor: ...

    @abstractmethod
    def rotary(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines for these positions, None for a family with learned positions."""

    @abstractmethod
    def run_layer(
        self, index: int, hidden: Tensor, mask: Tensor | None, positions: Tensor, rotary: Any, cache: Any
    ) -> Tensor:
        """Hidden states after layer `index`; mask `[batch, 1, query, key]`."""

    @property
    @abstractmethod
    def final_norm(self) -> nn.Module: ...

    def norm(self, hidden: Tensor) -> Tensor:
        """The final norm."""
        return self.final_norm(hidden)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits `[..., vocabulary]` of normed hidden states."""
        return self.model.lm_head(hidden)

    def feed_forward(self, index: int) -> nn.Module:
        """The feed-forward block of layer `index`, which acts on every token by itself."""
        return self.layers[index].get_submodule("mlp")

    def window(self, index: int) -> int | None:
        """How many positions back layer `index` may look, itself included; None for all."""
        kinds = getattr(self.config, "layer_types", None)
        if kinds is not None and kinds[index] != "sliding_attention":
            return None
        return getattr(self.config, "sliding_window", None)

    @property
    def kv_heads(self) -> int:
        return getattr(self.config, "num_key_value_heads", None) or self.config.num_attention_heads

    @property
    def head_dim(self) -> int:
        return getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads

    @property
    def positions(self) -> int:
        """Longest context the model was made for, in tokens."""
        return self.config.max_position_embeddings

    @property
    def vocabulary(self) -> int:
        return self.config.vocab_size


class LlamaLike(Adapter):
    """Llama and every family that spells its modules and calls its layers as Llama does."""

    model_types = ("llama", "mistral", "qwen2", "qwen3", "gemma", "smollm3", "olmo2", "phi3")

    @property
    def layers(self) -> nn.ModuleList:
        return self.model.model.layers

    @property
    def base(self) -> nn.Module:
        return self.model.model

    def attention(self, index: int) -> Any:
        return self.layers[index].self_attn

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        return self.model.model.embed_tokens(ids)

    def rotary(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self.model.model.rotary_emb(hidden, positions)

    def run_layer(self, index, hidden, mask, positions, rotary, cache):
        return self.layers[index](
            hidden, attention_mask=mask, position_ids=positions, past_key_values=cache, position_embeddings=rotary
        )

    @property
    def final_norm(self) -> nn.Module:
        return self.model.model.norm


class Gemma2(LlamaLike):
    """Gemma 2: sliding and full layers in turn, and a soft cap on the logits."""

    model_types = ("gemma2",)

    def head(self, hidden: Tensor) -> Tensor:
        logits, cap = self.model.lm_head(hidden), self.config.final_logit_softcapping
        return logits if cap is None else torch.tanh(logits / cap) * cap


class GPT2(Adapter):
    """GPT-2: learned positions, its own names."""

    model_types = ("gpt2",)

    @property
    def layers(self) -> nn.ModuleList:
        return self.model.transformer.h

    @property
    def base(self) -> nn.Module:
        return self.model.transformer

    @property
    def entry(self) -> nn.Module:
        return self.model.transformer.drop

    def attention(self, index: int) -> Any:
        return self.layers[index].attn

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        inner = self.model.transformer
        return inner.drop(inner.wte(ids) + inner.wpe(positions))

    def rotary(self, hidden: Tensor, positions: Tensor) -> None:
        return None

    def run_layer(self, index, hidden, mask, positions, rotary, cache):
        return self.layers[index](hidden, past_key_values=cache, attention_mask=mask, position_ids=positions)

    @property
    def final_norm(self) -> nn.Module:
        return self.model.transformer.ln_f


_ADAPTERS: dict[str, type[Adapter]] = {kind: cls for cls in (LlamaLike, Gemma2, GPT2) for kind in cls.model_types}


def families() -> tuple[str, ...]:
    """Names (transformers' `model_type`) of every family with an adapter."""
    return tuple(sorted(_ADAPTERS))


def adapter_for(model: Any) -> Adapter:
    """The adapter of this model; raises `UnknownFamily` naming the families that have one."""
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if kind not in _ADAPTERS or not hasattr(model, "lm_head"):
        raise UnknownFamily(
            f"model family {kind!r} ({type(model).__name__}) has no adapter; families with one: {', '.join(families())}"
            ". Load it as a causal language model of one of these, or add an adapter in pertoken/models/adapter.py"
        )
    return _ADAPTERS[kind](model)
