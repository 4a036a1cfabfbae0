"""Reduced image tokens in a language model: virtual unmerging (DyMU, arXiv 2504.17040, section 3.2).

A language model that sees was trained on a vector for every patch, each at its own position. With u(n) the token that
stands at position n, of N positions and U tokens:
- norms, projections, feed-forward blocks and residuals are computed for U tokens;
- attention is that of N positions: the queries, keys and values of u(n), turned by the angles of n
  (`ops.unmerged_attention`); the outputs of a token's positions are averaged. That mean is the only approximation: the
  outputs of the first layer's attention, before it, are those of the model with the merged features at all places.

The cache holds U keys and values, which are turned when they are read. Outputs have N positions, as without. Tokens
that were dropped stand nowhere; the others keep their positions. With `unmerge=None` the sequence is closed up: U
tokens at positions 0 to U - 1, as if the image were so small. Clips whose tokens are others than the model's own
(`clips`) come in the same way: they take the first places of the clip, and the rest are dropped.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from pertoken.core.attach import Attachment, swapped
from pertoken.core.errors import BadRequest
from pertoken.models.attention import attention_configs
from pertoken.models.llava import Llava
from pertoken.models.rotary import Rotary
from pertoken.ops.unmerged_attention import exact_attention, unmerged_attention
from pertoken.reduce.compact import Book, compact_layers

FORMS = {"fast": unmerged_attention, "exact": exact_attention}
REPORT = "image tokens"

_numbers = itertools.count()


class Seeing:
    """One policy's reduced images, or clips, in one language model.

    source: in place of the model's own `get_image_features` or `get_video_features`: the encoder's output, features
    `[image, place, width]` of every place, and `place` `[image, place]`, the token that stands there, -1 for none. The
    attachment's state tells under `REPORT`, for each image of the last forward that had some, the tokens that the
    language model got and those it would have had.
    """

    def __init__(self, llava: Llava, source: Callable[..., Any], attachment: Attachment, unmerge: str | None):
        self.llava, self.source, self.attachment, self.unmerge = llava, source, attachment, unmerge
        self.name = f"pertoken_unmerged_{next(_numbers)}"
        self.places: Any = WeakTensorKeyDictionary()  # of each image's features, which generate hands on by themselves
        self.groups: Tensor | None = None
        self.spots: Tensor | None = None
        self.now: tuple[Book, int, Tensor, Tensor] | None = None

    def install(self) -> None:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        attachment, inner, text = self.attachment, self.llava.inner, self.llava.text
        attachment.set_item(ALL_ATTENTION_FUNCTIONS, self.name, self.attention)
        name = f"get_{self.llava.shown}_features"
        own = getattr(inner, name)

        @functools.wraps(own)  # generate reads its signature
        def features(*args: Any, **kwargs: Any) -> Any:
            return self.features(*args, **kwargs) if attachment.enabled else own(*args, **kwargs)

        attachment.set_attribute(inner, name, features)
        attachment.wrap(inner, self.seeing)
        attachment.wrap(text.base, self.running)
        for module in text.attentions:
            attachment.wrap(module, self.unturned)

    def seeing(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around the forward of encoder and language model: notes where the images are."""
        ids, encoded = kwargs.get("input_ids", args[0] if args else None), kwargs.get("mm_encoder_outputs") or {}
        shown = self.llava.shown
        self.groups, self.spots = None, self.llava.spots(ids, kwargs.get("inputs_embeds"))
        if encoded.get(shown) is not None:
            places = [self.places.get(image) for image in encoded[shown].pooler_output]
            if any(place is None for place in places):
                raise BadRequest(
                    f"{shown} features were made without the policy, or cut into chunks after it; make them while it "
                    "is attached, and read the prompt in one piece"
                )
            self.groups = torch.stack(places)
        try:
            return forward(*args, **kwargs)
        finally:
            self.groups = self.spots = None

    def features(self, *args: Any, **kwargs: Any) -> Any:
        """In place of the model's own: features at every place, those of a token at all of its places."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        output, found, place = self.source(*args, **kwargs)
        self.groups = place
        images = list(found)
        for image, own in zip(images, place, strict=True):
            self.places[image] = own
        kept = [len(row[row >= 0].unique()) for row in place]
        self.attachment.state[REPORT] = {"kept": kept, "full": place.shape[1]}
        return BaseModelOutputWithPooling(last_hidden_state=output, pooler_output=images)  # type: ignore[arg-type]

    def leaders(self, valid: Tensor) -> Tensor:
        """`[row, token]` the first place of the token that stands at each place of this forward, -1 for none."""
        rows, count = valid.shape
        leader = torch.arange(count, device=valid.device).expand(rows, -1).clone()
        if self.groups is not None:
            assert self.spots is not None
            images, each = self.groups.shape
            row, place = (x.view(images, each) for x in self.spots.nonzero(as_tuple=True))
            if bool((row != row[:, :1]).any()):
                raise BadRequest(
                    f"the {each} places of one {self.llava.shown} are spread over several rows; put {each} "
                    f"{self.llava.shown} tokens for each {self.llava.shown} into the text that it belongs to"
                )
            slot = torch.where(self.groups >= 0, self.groups, each + self.llava.vision.prefix)
            inside = torch.arange(each, device=slot.device).expand(images, -1)
            first = torch.full((images, int(slot.max()) + 1), each, device=slot.device)
            first = first.scatter_reduce(1, slot, inside, "amin").gather(1, slot)
            leader[row, place] = torch.where(self.groups >= 0, place.gather(1, first), -1)
        return leader.masked_fill(~valid, -1)

    def running(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around the language model's forward: runs it on tokens, and gives back positions."""
        embeds, cache, mask = (kwargs.get(k) for k in ("inputs_embeds", "past_key_values", "attention_mask"))
        layers = [] if cache is None else list(cache.layers)
        before: Book | None = getattr(layers[0], "book", None) if layers else None
        if embeds is None or (self.groups is None and before is None):
            return forward(*args, **kwargs)
        if mask is not None and mask.ndim != 2:
            raise BadRequest("images are merged under an attention mask [row, token] with 0 for padding; give it so")
        count = embeds.shape[1]
        valid = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        if mask is not None:
            valid = mask[:, -count:].bool()
        leader = self.leaders(valid)
        here = torch.arange(count, device=embeds.device)
        if before is None and bool(((leader == here) | ~valid).all()):
            return forward(*args, **kwargs)  # nothing was merged: the model as it is
        use = kwargs.get("use_cache")
        if cache is None and (self.llava.text.config.use_cache if use is None else use):
            from transformers.cache_utils import DynamicCache

            cache = DynamicCache()
        held = [] if cache is None else compact_layers(cache, len(self.llava.text.attentions))
        first = 0 if before is None else before.length
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(first, first + count, device=embeds.device)[None]
        sources, new = packed(leader, positions.expand(len(embeds), -1))
        book = new if before is None else before.then(new)
        inputs = embeds.gather(1, sources[..., None].expand(-1, -1, embeds.shape[-1]))
        given = {k: v for k, v in kwargs.items() if k != "input_ids"} | {
            "inputs_embeds": inputs,
            "past_key_values": cache,
            "attention_mask": None if self.unmerge else book.real.long(),
            "position_ids": (book.real.long().cumsum(-1) - 1).clamp(min=0)[:, -inputs.shape[1] :],
        }
        with ExitStack() as changes:
            for layer in held:
                layer.inside = True
                changes.callback(setattr, layer, "inside", False)
            if self.unmerge:
                self.now = (book, first, *self.llava.text.angles(embeds, book.positions))
                changes.callback(setattr, self, "now", None)
                for config in attention_configs(self.llava.text):  # type: ignore[arg-type]
                    changes.enter_context(swapped(config, "_attn_implementation_internal", self.name))
            output = forward(**given)
        for layer in held:
            layer.book = book
        output.last_hidden_state = spread(output.last_hidden_state, new.columns)
        if output.get("hidden_states") is not None:
            output.hidden_states = tuple(spread(hidden, new.columns) for hidden in output.hidden_states)
        return output

    def unturned(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around an attention module: tokens are turned where they stand, in `attention`."""
        return forward(*args, **kwargs) if self.now is None else Rotary.unturned(forward, *args, **kwargs)

    def attention(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **given: Any
    ) -> tuple[Tensor, None]:
        """As every attention function of transformers."""
        assert self.now is not None and self.unmerge is not None
        book, first, cos, sin = self.now
        scale = given.get("scaling")
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        window = given.get("sliding_window")
        form = FORMS[self.unmerge]
        return form(query, key, value, book.columns, first, cos, sin, scale, window), None


class ReducedImages:
    """Features of images whose tokens an encoder's policy reduced: the source of `Seeing`. reducing: that policy's."""

    def __init__(self, llava: Llava, reducing: Any):
        self.llava, self.reducing = llava, reducing

    def __call__(
        self,
        pixel_values: Tensor,
        vision_feature_layer: Any = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Any, Tensor, Tensor]:
        if image_sizes is not None:
            raise BadRequest("images of several sizes in one batch are not reduced; give them in batches of one size")
        usual(self.llava, vision_feature_layer, vision_feature_select_strategy)
        output = self.llava.vision.base(pixel_values)
        tokens, hidden = self.reducing.read()
        skipped = self.llava.skipped
        place = tokens.place[:, skipped:]
        if tokens.total == tokens.place.numel():
            return output.last_hidden_state, self.llava.projected(hidden[:, skipped:]), place
        flat = self.llava.projected(hidden.reshape(tokens.total, -1))
        found = flat[(tokens.starts[:, None] + place).clamp(min=0)]
        return output.last_hidden_state, found.masked_fill((place < 0)[..., None], 0), place


def usual(llava: Llava, layer: Any, strategy: str | None) -> None:
    """Raise `BadRequest` where a call asks for other features than the model's configuration."""
    config = llava.config
    for given, own in ((layer, config.vision_feature_layer), (strategy, config.vision_feature_select_strategy)):
        if given not in (None, own):
            raise BadRequest(f"the policy was attached for what the config says ({own!r}), got {given!r}")


def packed(leader: Tensor, positions: Tensor) -> tuple[Tensor, Book]:
    """The tokens of a forward, each once, at the right end of `[row, column]`: the place where each first stands, and
    the book of its places. leader `[row, token]`: see `Seeing.leaders`."""
    here = torch.arange(leader.shape[1], device=leader.device)
    first = leader == here
    counts = first.sum(-1, keepdim=True)
    width = int(counts.max())
    order = first.cumsum(-1) - 1 + (width - counts)
    columns = torch.where(leader >= 0, order.gather(1, leader.clamp(min=0)), -1)
    real = torch.arange(width, device=leader.device) >= width - counts
    sources = torch.zeros(len(leader), width + 1, dtype=torch.long, device=leader.device)
    sources.scatter_(1, torch.where(first, order, width), here.expand_as(leader))
    return sources[:, :width], Book(columns, positions, real)


def spread(hidden: Tensor, columns: Tensor) -> Tensor:
    """`[row, position, width]` out of `[row, column, width]`, zeros where nothing stands."""
    found = hidden.gather(1, columns.clamp(min=0)[..., None].expand(-1, -1, hidden.shape[-1]))
    return found.masked_fill((columns < 0)[..., None], 0)
