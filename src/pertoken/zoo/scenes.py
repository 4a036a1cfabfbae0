"""Scenes made by program: coloured shapes on a ground, what every pixel is, questions with answers, and clips.

A scene is fixed by its seed. Grounds are plain, shaded or noisy; shapes are discs, squares and triangles in six
colours, of several sizes, which may hide one another but are all to be seen. Simple scenes and busy ones are equally
frequent, so that images differ in how much there is to see.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pertoken.core.errors import BadRequest

SHAPES = ("disc", "square", "triangle")
COLOURS = {
    "red": (214, 60, 54),
    "green": (60, 160, 75),
    "blue": (55, 100, 200),
    "yellow": (235, 200, 60),
    "purple": (150, 80, 180),
    "white": (238, 238, 238),
}
MOST = 6  # things in a scene
PLACES = ("left", "right", "top", "bottom")
MEAN, SPREAD = 110.0, 60.0  # of pixels, for models


@dataclass(frozen=True)
class Thing:
    """shape, colour: names; x, y: centre; radius: in pixels."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float

    def covers(self, size: int) -> np.ndarray:
        """`[size, size]` bool: its pixels."""
        row, column = np.mgrid[:size, :size] + 0.5
        dx, dy, r = column - self.x, row - self.y, self.radius
        if self.shape == "disc":
            return dx**2 + dy**2 <= r**2
        if self.shape == "square":
            return np.maximum(abs(dx), abs(dy)) <= 0.85 * r
        return (dy <= 0.8 * r) & (dy >= 2 * abs(dx) - r)


@dataclass(frozen=True)
class Scene:
    """pixels `[size, size, 3]` uint8; labels `[size, size]` uint8: 0 for the ground, 1 + the number of the shape;
    things: the front one last."""

    pixels: np.ndarray
    labels: np.ndarray
    things: tuple[Thing, ...]

    @property
    def largest(self) -> int:
        """The class of a classifier: shape and colour of the thing with the most pixels to be seen."""
        seen = self.labels_of_things()
        counts = [int((seen == i).sum()) for i in range(len(self.things))]
        thing = self.things[int(np.argmax(counts))]
        return SHAPES.index(thing.shape) * len(COLOURS) + list(COLOURS).index(thing.colour)

    def labels_of_things(self) -> np.ndarray:
        """`[size, size]` int: the number of the thing at each pixel, -1 for the ground."""
        seen = np.full(self.labels.shape, -1)
        for number, thing in enumerate(self.things):
            seen[thing.covers(len(seen))] = number
        return seen


def ground(rng: np.random.Generator, size: int) -> np.ndarray:
    """`[size, size, 3]` float: plain, shaded, or noisy."""
    base = rng.uniform(30, 110, 3)
    made = np.broadcast_to(base, (size, size, 3)).copy()
    kind = rng.integers(3)
    if kind == 1:
        made += np.linspace(-30, 30, size)[:, None, None] * rng.choice([-1, 1])
    elif kind == 2:
        coarse = rng.uniform(-35, 35, (size // 4, size // 4, 1))
        made += coarse.repeat(4, 0).repeat(4, 1)[:size, :size] + rng.normal(0, 6, (size, size, 1))
    return made


def placed(rng: np.random.Generator, size: int, count: int) -> tuple[Thing, ...]:
    """Things of which each shows at least half of itself."""
    things: list[Thing] = []
    for _ in range(50):
        if len(things) == count:
            break
        radius = rng.uniform(0.1, 0.24) * size * (1.15 if count < 3 else 0.9)
        x, y = rng.uniform(radius, size - radius, 2)
        shape, colour = rng.choice(SHAPES), rng.choice(list(COLOURS))
        one = Thing(str(shape), str(colour), float(x), float(y), float(radius))
        if all(np.hypot(one.x - t.x, one.y - t.y) > 0.8 * (one.radius + t.radius) for t in things):
            things.append(one)
    return tuple(things)


def drawn(back: np.ndarray, things: tuple[Thing, ...], rng: np.random.Generator) -> Scene:
    """The scene of these things before this ground."""
    pixels, labels = back.copy(), np.zeros(back.shape[:2], np.uint8)
    for thing in things:
        mask = thing.covers(len(back))
        pixels[mask] = np.array(COLOURS[thing.colour]) * rng.uniform(0.85, 1.05)
        labels[mask] = 1 + SHAPES.index(thing.shape)
    pixels = pixels + rng.normal(0, 3, pixels.shape)
    return Scene(pixels.clip(0, 255).astype(np.uint8), labels, things)


def scene(seed: int, size: int = 48, count: int | None = None) -> Scene:
    """The scene of this seed. count: how many things, up to `MOST`; drawn from 1 to `MOST` if not given."""
    if size < 16:
        raise BadRequest(f"size={size} is too small for shapes to be told apart; give 16 pixels or more")
    if count is not None and not 0 <= count <= MOST:
        raise BadRequest(f"count={count} is outside 0 to {MOST}; give how many things the scene shows")
    rng = np.random.default_rng((seed, size))
    wanted = int(rng.integers(1, MOST + 1)) if count is None else count
    back = ground(rng, size)
    return drawn(back, placed(rng, size, wanted), rng)


def questions(one: Scene) -> list[tuple[str, str]]:
    """Questions about a scene that have one answer: of counts, colours and positions."""
    size, found = len(one.labels), []
    for shape in SHAPES:
        own = [t for t in one.things if t.shape == shape]
        found.append((f"how many {shape}s ?", str(len(own))))
        if len(own) == 1:
            (thing,) = own
            found.append((f"what colour is the {shape} ?", thing.colour))
            away = {"left": size / 2 - thing.x, "right": thing.x - size / 2}
            away |= {"top": size / 2 - thing.y, "bottom": thing.y - size / 2}
            if max(away.values()) > size / 8:
                found.append((f"where is the {shape} ?", max(away, key=lambda place: away[place])))
    for colour in COLOURS:
        own = [t for t in one.things if t.colour == colour]
        if len(own) == 1:
            found.append((f"what is {colour} ?", own[0].shape))
    return found


def clip(seed: int, frames: int = 8, size: int = 32, count: int | None = None) -> tuple[list[Scene], str]:
    """A clip of moving things, and what happens in it: a clause for each thing, so that busy clips have long
    captions."""
    if frames < 1:
        raise BadRequest(f"frames={frames} is too few; a clip has at least 1")
    rng = np.random.default_rng((seed, size, frames))
    wanted = int(rng.integers(1, MOST + 1)) if count is None else count
    back, things = ground(rng, size), placed(rng, size, wanted)
    ways = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "": (0, 0)}
    moves = [str(rng.choice(list(ways))) for _ in things]
    speed, made = 0.3 * size / max(frames - 1, 1), []
    for frame in range(frames):
        moved = tuple(
            Thing(t.shape, t.colour, t.x + frame * speed * ways[m][0], t.y + frame * speed * ways[m][1], t.radius)
            for t, m in zip(things, moves, strict=True)
        )
        made.append(drawn(back, moved, rng))
    said = [f"a {t.colour} {t.shape} " + (f"moves {m}" if m else "rests") for t, m in zip(things, moves, strict=True)]
    return made, " . ".join(said) + " ." if said else "nothing ."


def as_input(scenes: list[Scene]) -> Tensor:
    """`[image, 3, size, size]` float32, as the zoo's models take them."""
    return normalised(np.stack([one.pixels for one in scenes]))


def normalised(pixels: np.ndarray) -> Tensor:
    """`[image, height, width, 3]` uint8 as `[image, 3, height, width]` float32."""
    return ((torch.from_numpy(pixels).float() - MEAN) / SPREAD).movedim(-1, 1).contiguous()


def batch(first: int, count: int, size: int = 48) -> tuple[Tensor, Tensor, Tensor]:
    """Scenes of seeds from `first` on: inputs, labels of pixels `[image, size, size]` and classes `[image]`, int64."""
    made = [scene(seed, size) for seed in range(first, first + count)]
    labels = torch.from_numpy(np.stack([one.labels for one in made])).long()
    return as_input(made), labels, torch.tensor([one.largest for one in made])
