"""Where rows may end: canvas rules that go with any commit and refresh rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from pertoken.core.card import Paper, method
from pertoken.core.errors import BadRequest
from pertoken.denoise.canvas import Canvas
from pertoken.denoise.rules import CanvasRule

if TYPE_CHECKING:
    from pertoken.denoise.settings import Settings


@method(
    question="denoise",
    shape="decoder",
    exactness="approximate",
    paper=Paper("Learning to Parallel: Accelerating Diffusion LLMs via Learnable Parallel Decoding", "2509.25188"),
    name="end_of_text",
    writes={"canvas"},
    needs={"diffusion"},
    baseline=True,
)
@dataclass(frozen=True)
class EndOfText(CanvasRule):
    """Learn2PD's end-of-text prediction (EoTP): cut a row behind its end of text, so that padding costs nothing.

    Source: arXiv 2509.25188. when: "decided", the paper's rule, cuts behind the first end of text that was committed;
    "predicted", the released code's, also behind the most confident end of text predicted anywhere on the canvas, which
    is sooner and riskier. Where several tokens end a text, each is as good as another; a place predicts an end if its
    guess is one, whatever the chances of all of them add up to.
    """

    when: Literal["decided", "predicted"] = "decided"

    def __post_init__(self) -> None:
        if self.when not in ("decided", "predicted"):
            raise BadRequest(f"when={self.when!r} is unknown; choose 'decided' or 'predicted'")

    @property
    def reads_all(self) -> bool:  # type: ignore[override]
        return self.when == "predicted"

    def trim(self, canvas: Canvas, eos: Tensor, found: Tensor, guesses: tuple[Tensor, Tensor] | None) -> Tensor:
        ended = decided(canvas, eos)
        cut = first(ended) + 1
        if guesses is not None:
            tokens, confidence = guesses
            open_ = torch.isin(tokens, eos) & canvas.masked
            best = confidence.masked_fill(~open_, -1.0).argmax(-1)
            now = (found & ended).any(-1)
            cut = torch.where(now | ~open_.any(-1), cut, best + 1)
        return cut.clamp(max=canvas.width)


@method(
    question="denoise",
    shape="decoder",
    exactness="approximate",
    paper=Paper(
        "DiffTester: Accelerating Unit Test Generation for Diffusion LLMs via Repetitive Pattern", "2509.24975"
    ),
    name="padding_fill",
    writes={"canvas"},
    needs={"diffusion"},
    baseline=True,
)
@dataclass(frozen=True)
class PaddingFill(CanvasRule):
    """DiffTester's padding fill: what is undecided behind a row's first decided end of text is decided as padding.

    Source: arXiv 2509.24975. Unlike `EndOfText` it leaves the positions in place: the padding is read and computed in
    every forward, as a model knows it that was trained on padded rows, and tokens decided earlier behind the end stay.
    The outputs up to the end are those of `EndOfText` where the model takes no notice of padding. pad: the padding
    token, which ends a text too (None: the request's).
    """

    pad: int | None = None
    keeps = True

    def fitted(self, settings: Settings) -> PaddingFill:
        return self if self.pad is not None else PaddingFill(settings.pad)

    def trim(self, canvas: Canvas, eos: Tensor, found: Tensor, guesses: tuple[Tensor, Tensor] | None) -> Tensor:
        ends = eos if self.pad is None else torch.cat([eos, eos.new_tensor([self.pad])])
        return (first(decided(canvas, ends)) + 1).clamp(max=canvas.width)


def decided(canvas: Canvas, tokens: Tensor) -> Tensor:
    """bool `[row, column]`: positions of the canvas that were decided as one of these tokens."""
    return torch.isin(canvas.ids, tokens) & canvas.valid & ~canvas.masked & (canvas.columns >= canvas.start)


def first(mask: Tensor) -> Tensor:
    """`[row]` column of the first True, the width where there is none."""
    return torch.where(mask.any(-1), mask.int().argmax(-1), mask.shape[-1])
