"""Thresholds of similarity per layer, calibrated so that images keep a wanted number of tokens on average.

Calibration (DyMU, arXiv 2504.17040, section 3.1) needs images and nothing else. The layers are gone through in order.
At layer l all proposals of a batch of B images compete, and the best B r_l are merged, so that images get different
counts; tau_l lies halfway between the score of the last one merged and the first one that is not (the paper takes the
latter, which a rounding error can lift over itself), at least 0. Thresholds are means over the batches, in float64: in
bf16, whose steps near 1 are 1/256, a running mean stops moving after a few hundred batches.

They hold for one encoder at one resolution, which is checked by a hash of its weights. Several targets are calibrated;
a budget between two of them takes thresholds between theirs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pertoken.core.attach import attach
from pertoken.core.budget import Budget
from pertoken.core.decision import Assign
from pertoken.core.errors import BadRequest
from pertoken.core.policy import View
from pertoken.models.signature import signature
from pertoken.models.vision import VisionAdapter, vision_adapter_for
from pertoken.reduce.matching import best, merged, most, proposals
from pertoken.reduce.reduction import PATCHES, Reducing, TokenView, read_layers
from pertoken.reduce.scheduled import Scheduled

FORMAT = "pertoken-thresholds-1"
TARGETS = (0.15, 0.25, 0.35, 0.5, 0.65, 0.8, 0.9)


@dataclass(frozen=True)
class Thresholds:
    """fractions: mean shares of the patches left, ascending; taus: per fraction, the threshold of each layer; patches
    of the images; model: the encoder's signature; images: how many were seen; inflect: see `scheduled`."""

    fractions: tuple[float, ...]
    taus: tuple[tuple[float, ...], ...]
    patches: int
    model: str
    images: int
    inflect: float = 0.0

    @property
    def layers(self) -> int:
        return len(self.taus[0])

    def at(self, fraction: float) -> tuple[float, ...]:
        """The thresholds for a mean share of patches left; 1 and more merges nothing."""
        known = [*zip(self.fractions, self.taus, strict=True), (1.0, (1.0,) * self.layers)]
        if fraction < known[0][0] - 1e-9:
            raise BadRequest(
                f"budget fraction={fraction:.3g} is below the least calibrated one, {known[0][0]:.3g}; give at least "
                f"that, or calibrate(..., fractions=({fraction:.3g}, ...))"
            )
        for (low, here), (high, there) in pairwise(known):
            if fraction <= high:
                t = min(max((fraction - low) / (high - low), 0.0), 1.0)
                return tuple(a + t * (b - a) for a, b in zip(here, there, strict=True))
        return known[-1][1]

    def check(self, adapter: VisionAdapter) -> None:
        """Raise `BadRequest` unless they were calibrated for this encoder."""
        if (own := signature(adapter.base)) != self.model:
            raise BadRequest(
                f"these thresholds were calibrated for an encoder with signature {self.model}, and this one has {own}; "
                "calibrate again with pertoken.reduce.thresholds.calibrate(model, images)"
            )

    def check_size(self, patches: int) -> None:
        """Raise `BadRequest` unless they were calibrated for images of so many patches."""
        if patches != self.patches:
            raise BadRequest(
                f"these thresholds were calibrated on images of {self.patches} patches, and these have {patches}; "
                "resize the images, or calibrate again at their size"
            )

    def save(self, path: str | Path) -> None:
        """As JSON, in which Python's floats keep all their digits."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps({"format": FORMAT, **vars(self)}, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Thresholds:
        """Read what `save` wrote; raises `ValueError` if the file is something else."""
        if not Path(path).is_file():
            raise BadRequest(f"no thresholds at {path}; make them with calibrate(model, images).save(path)")
        try:
            kept = json.loads(Path(path).read_text(encoding="utf-8"))
            if kept.pop("format") != FORMAT:
                raise KeyError("format")
            return cls(**kept | {"fractions": tuple(kept["fractions"]), "taus": tuple(map(tuple, kept["taus"]))})
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise BadRequest(f"{path} holds no thresholds of this library ({error}); calibrate again") from error


@dataclass(frozen=True)
class Calibrating(Scheduled):
    """Merges the best proposals of a whole batch, and notes the score of the best one left."""

    layers: int | None = None
    noted: dict[int, list[float]] = field(default_factory=dict)

    def decide(self, view: View) -> Assign:
        assert isinstance(view, TokenView)
        scores, partner = proposals(view)
        now = sum(view.tokens.counts) - len(view.valid) * view.prefix
        wanted = max(now - len(view.valid) * self.left(view.index, view.patches, view.layers), 0)
        open_ = best(scores, most(view))
        ranked = scores.masked_fill(~open_, -torch.inf).flatten().sort(descending=True, stable=True)
        count = min(wanted, int(open_.sum()))
        accepted = torch.zeros_like(open_).flatten()
        accepted[ranked.indices[:count]] = True
        last, rest = (float(ranked.values[i]) if 0 <= i < len(ranked.values) else 0.0 for i in (count - 1, count))
        self.noted.setdefault(view.index, []).append(max((last + rest) / 2 if count else 1.0, 0.0))
        return merged(view, accepted.view_as(open_), partner)

    def acts(self, index: int, tokens: Any, patches: int, layers: int) -> bool:
        return True

    def mechanism(self, adapter: VisionAdapter, model: Any, attachment: Any) -> Reducing:
        return Reducing(adapter, self, attachment, self.layers)


@torch.no_grad()
def calibrate(
    model: Any,
    images: Iterable[Tensor],
    fractions: Iterable[float] = TARGETS,
    inflect: float = 0.0,
    layers: int | None = None,
) -> Thresholds:
    """Thresholds of the image encoder in `model` for each of `fractions`, mean shares of the patches left.

    images: batches `[image, channel, height, width]` as the encoder takes them, of one size and better of 16 and more
    images; layers: how many of its layers merge (all; a LLaVA's up to the one that it reads). Merges are made evenly
    over the layers, or as `inflect` says.
    """
    adapter = vision_adapter_for(model)
    if layers is None:
        layers = read_layers(model, adapter)
    targets = sorted(set(fractions))
    if not targets or targets[0] <= 0 or targets[-1] >= 1:
        raise BadRequest(f"fractions={targets} must be shares of the patches above 0 and below 1, at least one")
    batches = list(images)
    if not batches or any(batch.ndim != 4 or not len(batch) for batch in batches):
        raise BadRequest(
            "calibrate needs batches of images [image, channel, height, width], at least one of one image or more; got "
            f"{[list(batch.shape) for batch in batches][:3]}"
        )
    taus, patches = [], 0
    for fraction in targets:
        policy = Calibrating(Budget(fraction=fraction), inflect=inflect, layers=layers)
        with attach(adapter.base, policy) as attached:
            for batch in batches:
                adapter.base(batch.to(adapter.device, adapter.dtype))
        patches = attached.state[PATCHES]
        taus.append(tuple(float(torch.tensor(policy.noted[i], dtype=torch.float64).mean()) for i in range(layers)))
    count = sum(map(len, batches))
    return Thresholds(tuple(targets), tuple(taus), patches, signature(adapter.base), count, inflect)
