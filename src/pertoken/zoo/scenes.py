"""Scenes made by program: coloured shapes on a ground, what every pixel is, questions with answers, and clips.

A scene is fixed by its seed. Grounds are plain, shaded or noisy; shapes are discs, squares and triangles in six
colours, of several sizes, which may hide one another but are all to be seen. Simple scenes and busy ones are equally
frequent, so that images differ in how much there is to see.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

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
WAYS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "nowhere": (0, 0)}
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


def place_of(thing: Thing, size: int) -> str | None:
    """The side of the picture that a thing is nearest to, or None where it is near the middle."""
    away = {"left": size / 2 - thing.x, "right": thing.x - size / 2}
    away |= {"top": size / 2 - thing.y, "bottom": thing.y - size / 2}
    nearest = max(away, key=lambda place: away[place])
    return nearest if away[nearest] > size / 8 else None


def questions(one: Scene) -> list[tuple[str, str]]:
    """Questions about a scene that have one answer: of counts, colours, shapes and positions."""
    size, found = len(one.labels), [("how many things ?", str(len(one.things)))]
    for shape in SHAPES:
        own = [t for t in one.things if t.shape == shape]
        found.append((f"how many {shape}s ?", str(len(own))))
        if len(own) == 1:
            found.append((f"what colour is the {shape} ?", own[0].colour))
            if (place := place_of(own[0], size)) is not None:
                found.append((f"where is the {shape} ?", place))
    for colour in COLOURS:
        own = [t for t in one.things if t.colour == colour]
        if len(own) == 1:
            found.append((f"what is {colour} ?", own[0].shape))
            if (place := place_of(own[0], size)) is not None:
                found.append((f"where is {colour} ?", place))
    return found


def ordered(things: tuple[Thing, ...]) -> list[int]:
    """Numbers of things in the order in which descriptions name them: by colour, then from left to right."""
    names = list(COLOURS)
    return sorted(range(len(things)), key=lambda i: (names.index(things[i].colour), things[i].x))


def description(one: Scene) -> str:
    """Colour, shape and place of every thing, without a word that says nothing."""
    clauses = []
    for number in ordered(one.things):
        thing = one.things[number]
        place = place_of(thing, len(one.labels))
        clauses.append(f"{thing.colour} {thing.shape} {place} ." if place else f"{thing.colour} {thing.shape} .")
    return " ".join(clauses) or "nothing ."


@dataclass(frozen=True)
class Clip:
    """frames: scenes of the same things, those that move a little further in each; ways: for each segment of frames,
    where each thing goes; each thing has a colour of its own."""

    frames: tuple[Scene, ...]
    ways: tuple[tuple[str, ...], ...]

    @property
    def things(self) -> tuple[Thing, ...]:
        """As they stand in the first frame."""
        return self.frames[0].things

    def events(self, segment: int) -> int:
        """How much there is to tell of a segment: its things, and those of them that move."""
        return len(self.things) + sum(way != "nowhere" for way in self.ways[segment])

    def description(self, segment: int) -> str:
        """Colour and shape of every thing and where it goes, if it does, without a word that says nothing."""
        clauses = []
        for number in ordered(self.things):
            thing, way = self.things[number], self.ways[segment][number]
            clauses.append(
                f"{thing.colour} {thing.shape} ." if way == "nowhere" else f"{thing.colour} {thing.shape} {way} ."
            )
        return " ".join(clauses) or "nothing ."


def clip(seed: int, frames: int = 8, size: int = 48, count: int | None = None, segments: int = 2) -> Clip:
    """The clip of this seed. count: how many things, up to `MOST`; drawn from 1 to `MOST` if not given. In each of
    `segments` runs of frames a thing goes one way, or nowhere, and never out of the picture."""
    if segments < 1 or frames < segments or frames % segments:
        raise BadRequest(
            f"frames={frames} cannot be cut into segments={segments} of equal length; give a multiple of it, at least 1"
        )
    if count is not None and not 0 <= count <= MOST:
        raise BadRequest(f"count={count} is outside 0 to {MOST}; give how many things the clip shows")
    rng = np.random.default_rng((seed, size, frames, segments))
    wanted = int(rng.integers(1, MOST + 1)) if count is None else count
    back, each, step = ground(rng, size), frames // segments, 0.06 * size
    colours = rng.permutation(list(COLOURS))
    things = tuple(
        replace(thing, colour=str(colour)) for thing, colour in zip(placed(rng, size, wanted), colours, strict=False)
    )
    made, ways = [], []
    for segment in range(segments):
        far = step * (each if segment < segments - 1 else each - 1)
        chosen = tuple(_way(rng, thing, far, size) for thing in things)
        ways.append(chosen)
        for _ in range(each):
            made.append(drawn(back, things, rng))
            things = tuple(
                replace(t, x=t.x + step * WAYS[w][0], y=t.y + step * WAYS[w][1])
                for t, w in zip(things, chosen, strict=True)
            )
    return Clip(tuple(made), tuple(ways))


def _way(rng: np.random.Generator, thing: Thing, far: float, size: int) -> str:
    """A way on which a thing stays in the picture for so many pixels."""
    low, high = 0.6 * thing.radius, size - 0.6 * thing.radius
    ends = {way: (thing.x + far * dx, thing.y + far * dy) for way, (dx, dy) in WAYS.items()}
    return str(rng.choice([way for way, (x, y) in ends.items() if low <= x <= high and low <= y <= high]))


def clip_questions(one: Clip) -> list[tuple[str, str]]:
    """Questions about a clip that have one answer: of counts, colours, shapes and what moves where, first and then."""
    found = [("how many things ?", str(len(one.things)))]
    for shape in SHAPES:
        own = [t for t in one.things if t.shape == shape]
        found.append((f"how many {shape}s ?", str(len(own))))
        if len(own) == 1:
            found.append((f"what colour is the {shape} ?", own[0].colour))
    for number, thing in enumerate(one.things):
        found.append((f"what is {thing.colour} ?", thing.shape))
        for when, segment in (("first", 0), ("then", len(one.ways) - 1)):
            found.append((f"where does {thing.colour} go {when} ?", one.ways[segment][number]))
    return found


def kind_of_question(question: str) -> str:
    """ "count", "colour", "shape", "place" or "way"."""
    words = question.split()
    if words[0] == "how":
        return "count"
    if words[0] == "where":
        return "place" if words[1] == "is" else "way"
    return "colour" if words[1] == "colour" else "shape"


def balanced(pairs: list[tuple[str, str]], count: int, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Up to `count` of some questions with their answers, of all kinds in turn."""
    kinds: dict[str, list[tuple[str, str]]] = {}
    for number in rng.permutation(len(pairs)):
        kinds.setdefault(kind_of_question(pairs[number][0]), []).append(pairs[number])
    queues, found = [kinds[kind] for kind in rng.permutation(sorted(kinds))], []
    while len(found) < count and queues:
        queues = [queue for queue in queues if queue]
        found += [queue.pop() for queue in queues[: count - len(found)]]
    return found


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
