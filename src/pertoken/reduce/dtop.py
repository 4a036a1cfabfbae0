"""DToP: patches that an auxiliary head is sure of are finalised there and leave the encoder.

Source: "Dynamic Token Pruning in Plain Vision Transformers for Semantic Segmentation" (arXiv 2308.01045, ICCV 2023). At
the end of a stage, with scores P[n, c] of token n and class c (`models.segmenter`), v_n = max_c P[n, c] and y_n =
argmax_c P[n, c]: tokens with v_n > p0 are easy. Of each class, the k easy tokens with the largest v_n stay as context;
the other easy ones leave with what the head said of them. No gradient flows through the choice.

threshold: p0, the paper's 0.95 (its code has 0.9 for ViT-B; about 0.98 for linear heads), 1 and more for never; keep:
k; budget: a floor, the patches of each image that reach the last head whatever the threshold says.

Training (`zoo.scenes_models`): the segmenter with all its heads and nothing finalised, then a shorter fine-tuning with
DToP attached. Applying it without the latter costs more accuracy, training from scratch with it more still.

Differs from the paper's code: images of a batch together; k is a setting; several stages of any encoder with an
adapter.

It loses where no patch is easy: then the auxiliary heads are paid for and save nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pertoken.core.card import Paper, method
from pertoken.core.errors import BadRequest
from pertoken.models.segmenter import PlainSegmenter
from pertoken.reduce.finalising import SCORES, Finalising
from pertoken.reduce.reduction import TokenView


@method(
    question="reduce",
    shape="policy",
    exactness="approximate",
    paper=Paper("Dynamic Token Pruning in Plain Vision Transformers for Semantic Segmentation", "2308.01045"),
    reads={"scores"},
    writes={"image tokens"},
    needs={"image", "heads"},
    baselines=("full", "random_finalising"),
)
@dataclass(frozen=True)
class DToP(Finalising):
    """Finalise the patches that a head is sure of, but a few of each class as context."""

    threshold: float = 0.95
    keep: int = 5
    small: ClassVar[dict[str, Any]] = {"threshold": 0.0, "keep": 0}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold < 0:
            raise BadRequest(f"threshold={self.threshold} is negative; give a score in [0, 1], 1 to finalise nothing")
        if self.keep < 0:
            raise BadRequest(f"keep={self.keep} is negative; give the tokens of each class that stay, 0 for none")

    def finalised(self, view: TokenView, most: Tensor) -> Tensor:
        value, label = view.signals[SCORES].max(-1)
        easy = view.valid & (value > self.threshold if self.threshold < 1 else torch.zeros_like(view.valid))
        easy[:, : view.prefix] = False
        order = torch.where(easy, value, -1.0).sort(dim=-1, descending=True, stable=True).indices
        sorted_label, sorted_easy = label.gather(1, order), easy.gather(1, order)
        classes = view.signals[SCORES].shape[-1]
        of_class = torch.nn.functional.one_hot(sorted_label, classes) * sorted_easy[..., None]
        rank = of_class.cumsum(1).gather(-1, sorted_label[..., None])[..., 0]  # from 1, within its class
        leave = sorted_easy & (rank > self.keep)
        leave &= leave.cumsum(-1) <= most[:, None]
        return torch.zeros_like(easy).scatter(1, order, leave)


@torch.no_grad()
def threshold_for(model: PlainSegmenter, images: Iterable[Tensor], share: float) -> float:
    """The threshold at which about `share` of the patches are easy for the first head of `model`, from batches of
    images `[image, channel, height, width]`: a quantile of their largest scores."""
    if not 0 < share < 1:
        raise BadRequest(f"share={share} is outside (0, 1); give the share of patches to finalise at the first stage")
    seen = [model.graded(batch, every=True)[0].scores.amax(-1).flatten().double() for batch in images]
    if not seen:
        raise BadRequest("threshold_for needs batches of images, at least one")
    return float(torch.cat(seen).sort(descending=True).values[int(share * sum(map(len, seen)))])
