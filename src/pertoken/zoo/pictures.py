"""Pictures with classes to learn from: scenes made by program, scikit-learn's digits, or a user's own folder.

A folder holds a folder of pictures for each class, named as the class. Pictures are turned upright, grey ones made RGB,
what is transparent put on white, and all brought to the size that a model takes. Of each class every fifth picture, in
order of names, is never trained on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from pertoken.core.errors import BadRequest
from pertoken.models.images import SUFFIXES, pictures_in, read_picture
from pertoken.zoo.scene_recipe import HELD
from pertoken.zoo.scenes import COLOURS, SHAPES, batch, normalised

DIGITS, EVERY, LEAST = "digits", 5, 8  # LEAST: pixels of a picture's shorter side


class Pictures(ABC):
    """Where batches come from. name: tells one from another; classes: their names."""

    name: str
    classes: tuple[str, ...]

    @abstractmethod
    def batch(self, first: int, count: int, size: int) -> tuple[Tensor, Tensor]:
        """`count` pictures `[image, 3, size, size]` from number `first` on and their classes `[image]`; from number
        `HELD` on, those that are never trained on."""

    @abstractmethod
    def held(self, most: int) -> int:
        """How many pictures to judge by, at most `most`."""


class Scenes(Pictures):
    """The class of a scene is shape and colour of its largest thing."""

    name: ClassVar[str] = "scenes"
    classes: ClassVar[tuple[str, ...]] = tuple(f"{colour} {shape}" for shape in SHAPES for colour in COLOURS)

    def batch(self, first: int, count: int, size: int) -> tuple[Tensor, Tensor]:
        pixels, _, classes = batch(first, count, size)
        return pixels, classes

    def held(self, most: int) -> int:
        return most


@dataclass(frozen=True)
class Stored(Pictures):
    """Pictures in memory. pixels `[picture, size, size, 3]` uint8; labels `[picture]`, ascending."""

    name: str
    classes: tuple[str, ...]
    pixels: np.ndarray
    labels: np.ndarray

    def __post_init__(self) -> None:
        counts = np.bincount(self.labels, minlength=len(self.classes))
        if len(self.classes) < 2 or counts.min() < 2:
            few = [f"{name} ({count})" for name, count in zip(self.classes, counts, strict=True) if count < 2]
            lacking = f", too few pictures of {', '.join(few)}" if few else ""
            raise BadRequest(
                f"{self.name} has {len(self.classes)} class(es){lacking}; give two classes or more with two pictures "
                "or more each, one to learn from and one to judge by"
            )

    @property
    def apart(self) -> np.ndarray:
        """`[picture]` bool: those that are never trained on."""
        place = np.concatenate([np.arange(count) for count in np.bincount(self.labels) if count])
        return place % EVERY == 1

    def batch(self, first: int, count: int, size: int) -> tuple[Tensor, Tensor]:
        if self.pixels.shape[1] != size:
            raise BadRequest(
                f"{self.name} was read at {self.pixels.shape[1]} pixels and is asked for at {size}; read it again"
            )
        own = np.flatnonzero(self.apart if first >= HELD else ~self.apart)
        if first >= HELD:
            chosen = own[np.arange(first - HELD, first - HELD + count) % len(own)]
        else:
            rounds = range(first // len(own), (first + count - 1) // len(own) + 1)
            order = np.concatenate([np.random.default_rng(turn).permutation(own) for turn in rounds])
            chosen = order[first % len(own) :][:count]
        return normalised(self.pixels[chosen]), torch.from_numpy(self.labels[chosen].astype(np.int64))

    def held(self, most: int) -> int:
        return min(most, int(self.apart.sum()))


def folder(path: Path, size: int) -> Stored:
    """The pictures of a folder with a folder for each class; raises `BadRequest` where there are none, and for a file
    that cannot be read or is tiny, by its name."""
    if not path.is_dir():
        raise BadRequest(f"{path} is no folder; give one that holds a folder of pictures for each class, or {DIGITS!r}")
    classes = sorted(one.name for one in path.iterdir() if one.is_dir() and not one.name.startswith("."))
    if not classes:
        raise BadRequest(
            f"{path} holds no folders; put the pictures of each class into a folder named as the class, as files "
            f"ending in {', '.join(SUFFIXES)}"
        )
    pixels, labels = [], []
    for number, name in enumerate(classes):
        for file in pictures_in(path / name):
            pixels.append(resized(read_picture(file), size, str(file)))
            labels.append(number)
    return Stored(str(path.resolve()), tuple(classes), np.stack(pixels), np.array(labels))


def digits(size: int) -> Stored:
    """scikit-learn's 1,797 hand-written digits, which come with it."""
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-not-found]
    except ImportError as error:
        raise BadRequest("the digits come with scikit-learn; pip install scikit-learn, or give a folder") from error
    given = load_digits()
    order = np.argsort(given.target, kind="stable")
    grey = (given.images[order] * (255 / 16)).round().astype(np.uint8)
    pixels = [resized(one[..., None].repeat(3, -1), size, "a digit") for one in grey]
    return Stored(DIGITS, tuple(map(str, range(10))), np.stack(pixels), given.target[order])


def resized(pixels: np.ndarray, size: int, what: str) -> np.ndarray:
    """`[size, size, 3]` uint8."""
    from PIL import Image

    if min(pixels.shape[:2]) < LEAST:
        raise BadRequest(
            f"{what} has {pixels.shape[1]} x {pixels.shape[0]} pixels; give a picture of {LEAST} x {LEAST} or more"
        )
    return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC))


def pictures(given: str | None, size: int) -> Pictures:
    """What `zoo train --images` names: scenes if nothing is given, "digits", or a folder."""
    if given is None:
        return Scenes()
    return digits(size) if given == DIGITS and not Path(given).is_dir() else folder(Path(given), size)
