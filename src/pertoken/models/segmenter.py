"""A plain ViT that labels every pixel: an image encoder and heads on the tokens of some of its layers.

The last head makes the prediction; those before it are auxiliary heads, as plain-ViT segmenters train them anyway.
- linear: SETR's: norm, then class logits of each token by itself; scores are their softmax.
- atm: SegViT's (arXiv 2210.05844): learned class queries attend to the tokens in 3 layers; the scores of the last
  attention before its softmax, a mean over heads, are the mask logits `[token, class]`, and a query's output says
  whether its class is in the image. Scores are presence times sigmoid of the mask logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from pertoken.core.errors import BadRequest
from pertoken.models.vision import vision_adapter_for

HEADS = ("atm", "linear")
IGNORED = 255  # label of pixels that no loss and no figure counts


class SegmenterConfig(PretrainedConfig):
    """backbone_config: of an image encoder with an adapter; ends: layers, from 0, after which there is a head, the last
    of them the encoder's last; head: "atm" or "linear"; head_width, head_heads: of an atm head."""

    model_type = "pertoken_segmenter"
    sub_configs: ClassVar[Any] = {"backbone_config": AutoConfig}  # type: ignore[assignment]

    def __init__(
        self,
        backbone_config: Any = None,
        ends: Any = (5, 7, 11),
        classes: int = 150,
        head: str = "atm",
        head_width: int = 384,
        head_heads: int = 6,
        **kwargs: Any,
    ):
        if isinstance(backbone_config, dict):
            given = dict(backbone_config)
            backbone_config = AutoConfig.for_model(given.pop("model_type"), **given)
        self.backbone_config = backbone_config
        self.ends, self.classes = list(ends), classes
        self.head, self.head_width, self.head_heads = head, head_width, head_heads
        if head not in HEADS:
            raise BadRequest(f"head={head!r} is unknown; choose {' or '.join(HEADS)}")
        super().__init__(**kwargs)


@dataclass
class Graded:
    """What a head says of tokens. logits `[image, token, class]`; presence `[image, class]`, the probability that a
    class is in the image, or None; presence_logits `[image, class, 2]`: present and absent; frozen: scores decided
    earlier."""

    logits: Tensor
    presence_logits: Tensor | None = None
    frozen: Tensor | None = None

    @property
    def scores(self) -> Tensor:
        """`[image, token, class]` in [0, 1]."""
        if self.frozen is not None:
            return self.frozen
        if self.presence_logits is None:
            return self.logits.softmax(-1)
        return self.presence_logits.softmax(-1)[:, None, :, 0] * self.logits.sigmoid()


class LinearHead(nn.Module):
    def __init__(self, width: int, classes: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.classify = nn.Linear(width, classes)

    def forward(self, hidden: Tensor, valid: Tensor) -> Graded:
        """hidden `[image, token, width]`; valid `[image, token]` bool."""
        return Graded(self.classify(self.norm(hidden)))


class Crossing(nn.Module):
    """Class queries attend to tokens: attention, residual, norm, feed-forward block, residual, norm."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(0.1)

    def forward(self, queries: Tensor, tokens: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Queries `[image, class, width]` after it, and the scores `[image, class, token]`, a mean over heads."""
        q, k, v = (
            x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for x in (self.query(queries), self.key(tokens), self.value(tokens))
        )
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        law = self.dropout(scores.masked_fill(~valid[:, None, None], -torch.inf).softmax(-1))
        queries = self.norm(queries + self.out((law @ v).transpose(1, 2).flatten(2)))
        return self.after(queries + self.feed(queries)), scores.mean(1)


class AtmHead(nn.Module):
    """Attention to masks; see the module. Every image needs one token or more."""

    def __init__(self, width: int, classes: int, own: int, heads: int, layers: int = 3):
        super().__init__()
        self.project, self.norm = nn.Linear(width, own), nn.LayerNorm(own)
        self.queries = nn.Embedding(classes, own)
        self.layers = nn.ModuleList([Crossing(own, heads) for _ in range(layers)])
        self.present = nn.Linear(own, 2)

    def forward(self, hidden: Tensor, valid: Tensor) -> Graded:
        """hidden `[image, token, width]`; valid `[image, token]` bool."""
        tokens = self.norm(self.project(hidden))
        every = torch.arange(self.queries.num_embeddings, device=hidden.device)
        queries, scores = self.queries(every).expand(len(hidden), -1, -1), hidden.new_empty(0)
        for layer in self.layers:
            queries, scores = layer(queries, tokens, valid)
        return Graded(scores.transpose(1, 2), self.present(queries))


@dataclass
class SegmenterOutput(ModelOutput):
    """loss: of all heads, if labels were given; logits `[image, class, height, width]`: scores of every pixel."""

    loss: Tensor | None = None
    logits: Tensor | None = None


class PlainSegmenter(PreTrainedModel):
    """See the module. `model(pixel_values).logits.argmax(1)` is the label of every pixel."""

    config: SegmenterConfig
    config_class = SegmenterConfig
    main_input_name = "pixel_values"
    _supports_sdpa = True

    def __init__(self, config: SegmenterConfig):
        super().__init__(config)
        backbone = config.backbone_config
        self.encoder = AutoModel.from_config(backbone)
        depth = vision_adapter_for(self.encoder).depth
        if not config.ends or sorted(set(config.ends)) != list(config.ends) or config.ends[-1] != depth - 1:
            raise BadRequest(
                f"ends={list(config.ends)} must ascend and end with the encoder's last layer, {depth - 1}; give the "
                "layers after which there is a head"
            )
        width, classes = backbone.hidden_size, config.classes
        if config.head == "atm":
            made = [AtmHead(width, classes, config.head_width, config.head_heads) for _ in config.ends]
        else:
            made = [LinearHead(width, classes) for _ in config.ends]
        self.heads = nn.ModuleList(made)
        self.post_init()

    def graded(self, pixel_values: Tensor, every: bool = False) -> list[Graded]:
        """What the heads say of all patches: the last one, or `every` one in order."""
        ends = self.config.ends if every else self.config.ends[-1:]
        states = self.encoder(pixel_values, output_hidden_states=[end + 1 for end in ends]).hidden_states
        prefix = vision_adapter_for(self.encoder).prefix
        found = []
        for end, head in zip(ends, self.heads[-len(ends) :], strict=True):
            hidden = states[end + 1][:, prefix:]
            found.append(head(hidden, hidden.new_ones(hidden.shape[:2], dtype=torch.bool)))
        return found

    def spread(self, values: Tensor, pixel_values: Tensor) -> Tensor:
        """`[image, token, class]` as `[image, class, height, width]` of the pixels."""
        size = self.config.backbone_config.patch_size
        height, width = (length // size for length in pixel_values.shape[-2:])
        grid = values.transpose(1, 2).unflatten(-1, (height, width))
        return F.interpolate(grid, pixel_values.shape[-2:], mode="bilinear", align_corners=False)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any) -> SegmenterOutput:
        """labels `[image, height, width]` int64, `IGNORED` where a pixel does not count."""
        grades = self.graded(pixel_values, every=labels is not None)
        loss = None
        if labels is not None:
            losses = [segmentation_loss(one, self.spread(one.logits, pixel_values), labels) for one in grades]
            loss = torch.stack(losses).sum()
        return SegmenterOutput(loss=loss, logits=self.spread(grades[-1].scores, pixel_values))


def segmentation_loss(graded: Graded, pixels: Tensor, labels: Tensor) -> Tensor:
    """Loss of one head. pixels: its logits `[image, class, height, width]` at the labels' size.

    Without presence: cross-entropy per pixel. With it, SegViT's: cross-entropy of presence (weight 1 where the class is
    in the image, 0.1 where it is not), 20 times the focal loss (alpha 0.25, gamma 2) and once the dice loss of the
    masks of the classes that are there. Masks are matched by class.
    """
    if graded.presence_logits is None:
        return F.cross_entropy(pixels.float(), labels, ignore_index=IGNORED)
    classes = pixels.shape[1]
    counted = labels != IGNORED
    masks = F.one_hot(torch.where(counted, labels, 0), classes).movedim(-1, 1).float() * counted[:, None]
    there = masks.flatten(2).sum(-1) > 0
    target = (~there).long()  # class 0 is "present"
    weight = pixels.new_tensor([1.0, 0.1], dtype=torch.float32)
    presence = F.cross_entropy(graded.presence_logits.float().flatten(0, 1), target.flatten(), weight)
    logits, masks = pixels.float()[there], masks[there]
    real = counted[:, None].expand(-1, classes, -1, -1)[there].float()
    chance = logits.sigmoid()
    own = F.binary_cross_entropy_with_logits(logits, masks, reduction="none")
    right = chance * masks + (1 - chance) * (1 - masks)
    alpha = 0.25 * masks + 0.75 * (1 - masks)
    number = max(len(masks), 1)
    focal = (alpha * (1 - right) ** 2 * own * real).flatten(1).sum(-1) / real.flatten(1).sum(-1).clamp(min=1)
    overlap = 2 * (chance * masks * real).flatten(1).sum(-1)
    both = (chance * real).flatten(1).sum(-1) + masks.flatten(1).sum(-1)
    dice = 1 - (overlap + 1) / (both + 1)
    return presence + 20 * focal.sum() / number + dice.sum() / number


def mean_iou(predicted: Tensor, labels: Tensor, classes: int) -> float:
    """Mean over the classes that occur of intersection over union, in [0, 1], over all pixels that count."""
    counted = labels != IGNORED
    pairs = labels[counted] * classes + predicted[counted]
    table = torch.bincount(pairs, minlength=classes * classes).view(classes, classes).double()
    union = table.sum(0) + table.sum(1) - table.diagonal()
    return float((table.diagonal()[union > 0] / union[union > 0]).mean())
