"""What kind of model a model is. The only place that says so.

- *causal*: goes on from the left, one token after the other.
- *diffusion*: fills in a canvas in any order; `config.is_causal` is False, or its type is one of `FILLING`.
- *insertion*: puts tokens in at any place; a `config.stop_token_id` besides.
- *image*: encodes images; a family of `models.vision`, alone, under a head, or in front of a language model.
- *video*: such an encoder of frames in front of a language model that watches clips.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pertoken.models.vision import vision_families

KINDS = {
    "causal": "goes on from the left",
    "diffusion": "fills in a canvas",
    "insertion": "inserts at any place",
    "image": "encodes images",
    "video": "watches clips",
}

FILLING = ("diffusion_gemma",)
SEEING = ("clip", "siglip", "llava", "pertoken_segmenter", "pertoken_grid")  # what holds an image encoder
WATCHING = ("llava_next_video",)


def kind_of(model: Any) -> str:
    """A name of `KINDS`, as the model's configuration says."""
    config = model.config
    if getattr(config, "model_type", None) in FILLING:
        return "diffusion"
    if getattr(config, "model_type", None) in WATCHING:
        return "video"
    if getattr(config, "model_type", None) in (*vision_families(), *SEEING):
        return "image"
    if getattr(config, "is_causal", True) is not False:
        return "causal"
    return "diffusion" if getattr(config, "stop_token_id", None) is None else "insertion"


DRAFTS = {"draft": "causal", "diffusion_draft": "diffusion"}  # what a method may need beside the model: of which kind


def draft_kind(needs: Iterable[str]) -> str | None:
    """The kind of draft model that a method with these needs is given, None if none."""
    return next((kind for need, kind in DRAFTS.items() if need in needs), None)


def kind_needed(needs: Iterable[str]) -> str:
    """The kind that a method with these needs (as on its card) runs on: causal unless it names another."""
    return next((kind for kind in KINDS if kind in needs), "causal")
