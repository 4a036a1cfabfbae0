"""Ragged vision tokens: the mechanism of this folder. Tokens are merged, dropped or finalised between or within layers.

While a policy is attached to a model with an image encoder, it sees the tokens of each layer at which it `acts` and
answers with an `Assign`: the next token that each one goes into, or -1 if it leaves. That one form says all:
- tokens with a group of their own stay; the order of groups is the order of the next tokens;
- tokens that share a group are merged into their mean, weighted by how many original tokens each stands for. Attention
  then counts a token as often as that: the logarithm of its size is added to its scores, as an additive mask under the
  model's own attention, which is the same as attending to so many copies;
- a token that leaves is neither query nor key any more.

Where a policy acts `within` a layer, that is between attention and the feed-forward block, as ToMe does; `after` it, at
its end. What the encoder returns (`returns`):
- "grid": all original tokens, each with the state of the token it went into, or that with which it left. Every head
  then works as it is, and pools over merged tokens by their size;
- "kept": the tokens that are left. A head that pools sees nothing of those that were dropped.

A forward in which nothing is decided is the model's own, bit by bit.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from pertoken.core.attach import Attachment
from pertoken.core.budget import Budget
from pertoken.core.decision import Assign
from pertoken.core.errors import BadRequest
from pertoken.core.policy import Policy, View
from pertoken.models.attention import attention_configs, own_attention
from pertoken.models.llava import Llava, sees_and_writes
from pertoken.models.vision import VisionAdapter, vision_adapter_for
from pertoken.reduce.language import FORMS, ReducedImages, Seeing
from pertoken.reduce.tokens import Tokens

SITE, NAME = "reduce.tokens", "pertoken_reducing"
TOKENS, PATCHES = "tokens", "patches"
PLACES = ("within", "after")
MASKED = ("sdpa", "eager", "flex_attention")

_numbers = itertools.count()


@dataclass(frozen=True)
class TokenView(View):
    """What a policy sees of the tokens at a layer. valid `[image, token]`: which are there.

    index: the layer; patches: how many patches each image had at first; hidden `[image, token, width]`; queries, keys:
    of the layer's attention, `[1 or image, heads, token, dim]` as the layer made them.
    """

    index: int = 0
    patches: int = 0
    tokens: Any = None
    states: Any = None
    queries: Any = None
    keys: Any = None
    scale: float = 1.0

    @property
    def prefix(self) -> int:
        return self.tokens.prefix

    @property
    def sizes(self) -> Tensor:
        """`[image, token]` float32."""
        return self.tokens.padded_sizes

    @property
    def hidden(self) -> Tensor:
        return self.tokens.padded(self.states.reshape(self.tokens.total, -1))

    def _spread(self, x: Tensor) -> Tensor:
        """What a layer made, as `[image, heads, token, dim]`."""
        return x if self.tokens.uniform else x[0].transpose(0, 1)[self.tokens.index].transpose(1, 2)

    @cached_property
    def metric(self) -> Tensor:
        """`[image, token, dim]` float32: keys, as a mean over heads, of length 1."""
        mean = self.keys.transpose(1, 2).float().mean(2)  # as they lie in memory
        flat = torch.nn.functional.normalize(mean, dim=-1).flatten(0, 1)
        return self.tokens.padded(flat)

    @cached_property
    def received(self) -> Tensor:
        """`[image, token]` float32: attention that each token gets from the class token, or as a mean over all tokens
        where there is none; a mean over heads."""
        queries, keys = self._spread(self.queries).float(), self._spread(self.keys).float()
        sizes = self.sizes
        if self.prefix:
            queries, weight = queries[:, :, :1], sizes.new_ones(len(sizes), 1)
        else:
            weight = sizes / sizes.sum(-1, keepdim=True)
        scores = queries @ keys.transpose(-1, -2) * self.scale + sizes.log()[:, None, None]
        return (scores.softmax(-1).mean(1) * weight[..., None]).sum(1)


@dataclass(frozen=True)
class Reduction(Policy):
    """Base of the policies that reduce the tokens of an image encoder. See the module.

    unmerge: in a language model that sees, how tokens stand at the places of their members: "fast" or "exact", the same
    values by another way of computing, or None for not at all (see `language`).
    """

    budget: Budget = Budget(fraction=0.5)
    unmerge: str | None = field(default="fast", kw_only=True)
    reads: ClassVar[frozenset[str]] = frozenset({"keys"})
    writes: ClassVar[frozenset[str]] = frozenset({"image tokens"})
    place: ClassVar[str] = "within"
    returns: ClassVar[str] = "grid"
    small: ClassVar[dict[str, Any]] = {}

    def __post_init__(self) -> None:
        if wrong := set(self.budget.units()) - {"tokens", "fraction"}:
            raise BadRequest(
                f"{type(self).__name__} reduces tokens: budget {self.budget} means nothing to it (unit {wrong.pop()}); "
                "give Budget(tokens=...) or Budget(fraction=...)"
            )
        if self.unmerge is not None and self.unmerge not in FORMS:
            raise BadRequest(f"unmerge={self.unmerge!r} is unknown; choose one of {', '.join(FORMS)}, or None")

    @abstractmethod
    def acts(self, index: int, tokens: Tokens, patches: int, layers: int) -> bool:
        """Whether it may change something at layer `index` of `layers`; an image began with `patches`."""

    @abstractmethod
    def decide(self, view: View) -> Assign: ...

    def fitted(self, adapter: VisionAdapter, model: Any) -> Reduction:
        """The policy with what it needs for this model; raises `BadRequest` where it was made for another."""
        return self

    def install(self, model: Any, attachment: Attachment) -> None:
        adapter = vision_adapter_for(model)
        if self.budget.is_full and not attachment.taped:
            return
        attachment.policy = policy = self.fitted(adapter, model)
        reducing = policy.mechanism(adapter, model, attachment)
        reducing.install()
        if sees_and_writes(model):
            llava = Llava(model)
            Seeing(llava, ReducedImages(llava, reducing), attachment, policy.unmerge).install()

    def mechanism(self, adapter: VisionAdapter, model: Any, attachment: Attachment) -> Reducing:
        """What carries its decisions out."""
        return Reducing(adapter, self, attachment, read_layers(model, adapter))


class Reducing:
    """One policy's decisions on one image encoder. layers: how many of its layers reduce; the tokens after the last of
    them are in the attachment's state under `TOKENS`. grades: what else a policy is told at the end of each layer."""

    def __init__(
        self,
        adapter: VisionAdapter,
        policy: Reduction,
        attachment: Attachment,
        layers: int | None = None,
        grades: Callable[[int, Tokens, Tensor], dict[str, Tensor]] | None = None,
    ):
        self.adapter, self.policy, self.attachment, self.grades = adapter, policy, attachment, grades
        self.layers = adapter.depth if layers is None else layers
        self.ended: tuple[Tokens, Tensor] | None = None
        self.usual = adapter.config._attn_implementation or "eager"
        self.name = f"{NAME}_{next(_numbers)}"
        self.tokens: Tokens | None = None
        self.patches = 0
        self.made: tuple[Tensor, Tensor, float] | None = None
        if self.usual.startswith(NAME):
            raise BadRequest(
                "a policy that is attached to a larger model already reduces the tokens of this encoder; end that first"
            )
        if self.usual not in MASKED:
            raise BadRequest(
                f"attention {self.usual!r} takes no mask that is added to scores, which merged tokens need; load the "
                f"model with attn_implementation='sdpa' (or one of {', '.join(MASKED)})"
            )

    def install(self) -> None:
        from transformers.masking_utils import AttentionMaskInterface
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        attachment, adapter = self.attachment, self.adapter
        attachment.set_item(ALL_ATTENTION_FUNCTIONS, self.name, self.attention)
        masks = AttentionMaskInterface._global_mapping
        if self.usual in masks:
            attachment.set_item(masks, self.name, masks[self.usual])
        for config in attention_configs(adapter):  # type: ignore[arg-type]
            attachment.set_attribute(config, "_attn_implementation_internal", self.name)
        for index, layer in enumerate(adapter.layers):
            attachment.wrap(layer, self.around(index))

    def around(self, index: int) -> Callable[..., Any]:
        """In place of a layer's forward."""

        def run(forward: Callable[..., Any], hidden: Tensor, mask: Any = None, *args: Any, **kwargs: Any) -> Tensor:
            if index == 0:
                self.begin(hidden)
            refuse_mask(kwargs.get("attention_mask", mask), type(self.policy).__name__)
            assert self.tokens is not None
            acts = index < self.layers and (
                self.attachment.taped or self.policy.acts(index, self.tokens, self.patches, self.layers)
            )
            self.made = None
            if acts and self.policy.place == "within":
                hidden = self.adapter.attend(index, hidden)
                hidden = self.adapter.feed(index, self.reduce(index, hidden))
            else:
                hidden = forward(hidden, None, *args, **{k: v for k, v in kwargs.items() if k != "attention_mask"})
                signals = self.grades(index, self.tokens, hidden) if self.grades is not None else {}
                if acts:
                    hidden = self.reduce(index, hidden, signals)
            return self.layer_done(index, hidden)

        return run

    def begin(self, hidden: Tensor) -> None:
        """A forward begins with these hidden states."""
        if self.adapter.base.training and getattr(self.adapter.layers[0], "gradient_checkpointing", False):
            raise BadRequest(
                f"{type(self.policy).__name__} reduces tokens as layers run, and gradient checkpointing runs them "
                "twice; call model.gradient_checkpointing_disable()"
            )
        self.tokens = Tokens.of(hidden, self.adapter.prefix)
        self.patches = self.attachment.state[PATCHES] = hidden.shape[1] - self.adapter.prefix

    def reduce(self, index: int, hidden: Tensor, signals: dict[str, Tensor] | None = None) -> Tensor:
        """Hidden states after the policy's decision at this layer."""
        tokens = self.tokens
        assert tokens is not None
        queries, keys, scale = self.made or (None, None, 1.0)
        view = TokenView(
            valid=tokens.valid,
            layers=self.layers,
            signals=signals or {},
            index=index,
            patches=self.patches,
            tokens=tokens,
            states=hidden,
            queries=queries,
            keys=keys,
            scale=scale,
        )
        decision = self.attachment.decide(f"{SITE}.{index}", view)
        assert isinstance(decision, Assign)
        if nothing(decision):
            return hidden
        hidden, self.tokens = tokens.reduced(hidden, decision, self.policy.returns == "grid")
        return hidden

    def layer_done(self, index: int, hidden: Tensor) -> Tensor:
        """What a layer returns: after the last one, what the encoder goes on with."""
        tokens = self.tokens
        assert tokens is not None
        if index == self.layers - 1:
            self.attachment.state[TOKENS] = tokens
            self.ended = (tokens, hidden)
        if index < self.adapter.depth - 1 or (tokens.uniform and tokens.longest == tokens.place.shape[1]):
            return hidden
        return tokens.grid(hidden) if self.policy.returns == "grid" else tokens.kept(hidden)

    def read(self) -> tuple[Tokens, Tensor]:
        """Tokens and hidden states after the last layer that reduces, of the last forward; once."""
        assert self.ended is not None
        ended, self.ended = self.ended, None
        return ended

    def attention(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **given: Any
    ) -> tuple[Tensor, Any]:
        """As every attention function of transformers: output `[batch, query, heads, dim]`, and weights or None."""
        own = own_attention(module, self.usual)
        tokens = self.tokens
        if not self.attachment.enabled or tokens is None:
            return own(module, query, key, value, mask, **given)
        scale = given.get("scaling")
        self.made = (query, key, query.shape[-1] ** -0.5 if scale is None else scale)
        if tokens.uniform:
            return own(module, query, key, value, tokens.masks(query.dtype)[0], **given)
        return tokens.attended(lambda q, k, v, m: own(module, q, k, v, m, **given)[0], query, key, value), None


def read_layers(model: Any, adapter: VisionAdapter) -> int:
    """How many of the encoder's layers are read by what comes after it."""
    layer = getattr(getattr(model, "config", None), "vision_feature_layer", None)
    if layer is None:
        return adapter.depth
    if not isinstance(layer, int):
        raise BadRequest(
            f"{type(model).__name__} reads {len(layer)} layers of its encoder at once, in which tokens are merged "
            "differently; use a model with one vision_feature_layer"
        )
    return layer if layer >= 0 else adapter.depth + 1 + layer


def nothing(decision: Assign) -> bool:
    """Whether every token stays what and where it is."""
    here = torch.arange(decision.group.shape[1], device=decision.group.device)
    return bool(((decision.group == here) | ~decision.valid).all())


def refuse_mask(mask: Any, name: str) -> None:
    """Raise `BadRequest` if some token of an image is masked."""
    if mask is None:
        return
    if bool(mask.all()) if mask.dtype == torch.bool else bool((mask == 0).all()):
        return
    raise BadRequest(f"{name} reads whole images and got an attention mask; leave it out, or crop the images")


def stay(view: TokenView, keep: Tensor) -> Assign:
    """Tokens `[image, token]` bool stay in order, the others leave; the prefix always stays."""
    keep = keep & view.valid
    keep[:, : view.prefix] = view.valid[:, : view.prefix]
    return Assign(view.valid, torch.where(keep, keep.cumsum(-1) - 1, -1))
