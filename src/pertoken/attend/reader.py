"""What every mechanism of this folder shares: one attention function and one mask function, under a private name that
is set on one model's configuration only, and the sight of what the mask allows."""

from __future__ import annotations

import inspect
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from pertoken.attend.sight import Causal
from pertoken.core.attach import Attachment
from pertoken.core.budget import Budget
from pertoken.core.errors import BadRequest
from pertoken.core.policy import View
from pertoken.models.adapter import Adapter, adapter_for
from pertoken.models.attention import attention_configs
from pertoken.models.growing import GrowingLayer
from pertoken.models.kind import kind_of

_numbers = itertools.count()
Layer = TypeVar("Layer", bound=DynamicLayer)


def check_keys(name: str, budget: Budget, **least: tuple[int, int]) -> None:
    """Raise `BadRequest` for a budget that is not of keys, or for a setting below its least; least: value and least."""
    if wrong := set(budget.units()) - {"tokens", "fraction"}:
        raise BadRequest(
            f"{name} chooses keys: budget {wrong.pop()}={budget} means nothing to it; give Budget(tokens=...) or "
            "Budget(fraction=...)"
        )
    for setting, (value, low) in least.items():
        if value < low:
            raise BadRequest(f"{setting}={value} is too small; give {low} or more tokens")


def readable(name: str, model: Any) -> Adapter:
    """The adapter of a model with causal full attention in some layer; else raises `BadRequest`."""
    if kind_of(model) != "causal":
        raise BadRequest(
            f"{name} chooses among the keys before a token, and {type(model).__name__} reads in both directions; "
            "attach it to a causal language model"
        )
    adapter = adapter_for(model)
    if all(adapter.window(layer) is not None for layer in range(adapter.depth)):
        raise BadRequest(
            f"every layer of {type(model).__name__} reads a sliding window of {adapter.window(0)} tokens, and such "
            "layers are left as they are; attach a policy that chooses keys to a model with full attention"
        )
    return adapter


class Reader(ABC):
    """One policy's attention function on one model, and the mask function beside it. usual: the name of the attention
    that the model had; layers: those with full attention."""

    def __init__(self, adapter: Adapter, attachment: Attachment):
        self.adapter, self.attachment = adapter, attachment
        self.usual = adapter.config._attn_implementation
        self.name = f"pertoken_{type(self).__name__.lower()}_{next(_numbers)}"
        self.layers = {i for i in range(adapter.depth) if adapter.window(i) is None}
        self.running = False
        self.arguments = inspect.signature(adapter.base.forward)

    @abstractmethod
    def begin(self, view: View) -> None:
        """A forward begins."""

    @abstractmethod
    def attention(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **given: Any
    ) -> tuple[Tensor, Any]:
        """As every attention function of transformers: output `[batch, query, heads, dim]` and no weights."""

    def put_on(self) -> None:
        """On the model, until the attachment ends."""
        from transformers.masking_utils import AttentionMaskInterface
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        attachment = self.attachment
        attachment.set_item(ALL_ATTENTION_FUNCTIONS, self.name, self.attention)
        attachment.set_item(AttentionMaskInterface._global_mapping, self.name, self.mask)
        for config in attention_configs(self.adapter):
            attachment.set_attribute(config, "_attn_implementation_internal", self.name)
        attachment.on_forward(self.begin)
        attachment.announce(self.adapter.base, self.adapter.depth)
        attachment.wrap(self.adapter.base, self.run)

    def run(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around the model's forward: masks asked for outside of it (by generate, for a static cache) are its own."""
        self.running = True
        try:
            return forward(*args, **kwargs)
        finally:
            self.running = False

    def with_cache(self, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], Any]:
        """The arguments of the model's forward by name, and the cache among them, made here where the model would make
        one; None where it would not."""
        if args:
            kwargs = {**self.arguments.bind_partial(*args).arguments, **kwargs}
        base, cache, use = self.adapter.base, kwargs.get("past_key_values"), kwargs.get("use_cache")
        checkpointed = getattr(base, "gradient_checkpointing", False) and base.training
        if cache is None and not checkpointed and (self.adapter.config.use_cache if use is None else use):
            cache = kwargs["past_key_values"] = DynamicCache(config=self.adapter.config)
        return kwargs, cache

    def put_in(
        self, cache: Any, kind: type[Layer], made: Callable[[DynamicLayer], Layer], name: str, does: str
    ) -> list[Layer]:
        """The full-attention layers of a cache, of this kind; plain ones are replaced by what is `made` of them. Raises
        `BadRequest` for other caches, in which the policy `name` cannot do what it `does`."""
        if not isinstance(cache, DynamicCache) or cache.offloading:
            given = "a cache that offloads its layers" if isinstance(cache, DynamicCache) else type(cache).__name__
            raise BadRequest(
                f"{name} {does} a DynamicCache, got {given}; give past_key_values="
                "DynamicCache(config=model.config), or none"
            )
        while len(cache.layers) < self.adapter.depth and cache.layer_class_to_replicate is not None:
            cache.layers.append(cache.layer_class_to_replicate())
        found = []
        for index in sorted(self.layers):
            layer = cache.layers[index]
            if type(layer) is DynamicLayer or (type(layer) is GrowingLayer and layer.home is None):
                layer = cache.layers[index] = made(layer)
            elif not isinstance(layer, kind):
                raise BadRequest(
                    f"{name} {does} full-attention layers, and layer {index} of this cache is a "
                    f"{type(layer).__name__}; give past_key_values=DynamicCache(config=model.config), or none"
                )
            found.append(layer)
        return found

    def mask(self, **given: Any) -> Any:
        """In place of the model's mask function: a `Sight` where queries see what is before them, else its mask."""
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function, prepare_padding_mask

        plain = lambda: ALL_MASK_ATTENTION_FUNCTIONS[self.usual](**given)  # noqa: E731
        here = self.attachment.enabled and self.running
        if not here or given["mask_function"] is not causal_mask_function or given["kv_offset"]:
            return plain()
        keys, queries, first = given["kv_length"], given["q_length"], int(given["q_offset"])
        valid = prepare_padding_mask(given["attention_mask"], keys, 0)
        if valid is None:
            valid = torch.ones(given["batch_size"], keys, dtype=torch.bool, device=given["device"])
        return Causal(valid[:, :keys].bool(), first, queries, plain)

    def scoring(self, query: Tensor, given: dict[str, Any]) -> tuple[float, float | None]:
        """Scale of the scores, and the bound of their size where the model's own attention has one."""
        scale = given.get("scaling")
        cap = given.get("softcap") if self.usual == "eager" else None
        return query.shape[-1] ** -0.5 if scale is None else scale, cap
