"""How a model is trained on scenes: one frozen recipe each."""

from __future__ import annotations

from dataclasses import dataclass

HELD = 10**9  # scenes of this seed and above are never trained on
SEGMENTS, CLASSIFIES, ANSWERS = "segmenter", "classifier", "answerer"
ROUTES = "grid"
WATCHES, DESCRIBES = "watcher", "describer"


@dataclass(frozen=True)
class SceneRecipe:
    """task: "segmenter", "classifier", "grid", a classifier whose tokens choose their ways, or "answerer", a LLaVA;
    of clips "describer", the expert of LangDC, and "watcher", a LLaVA-NeXT-Video that can read its states; until: the
    step to stop at, 0 for all the steps; start: the models whose weights a run begins with, by name with "+" between;
    threshold: DToP's while training, 1 for without; ends: layers with a head. Scenes of `size` pixels in patches of
    `patch`. text_layers, text_width: of a language model; questions: of each scene or clip in a batch; clips: how
    many different ones are watched again and again, a multiple of the batch; routes: a grid's router while it is
    trained, "diagonal", "dit", "static" or "random"; mu: its cost, as a share of the diagonal's; penalty: of missing
    it."""

    task: str
    steps: int
    until: int = 0
    start: str | None = None
    threshold: float = 1.0
    keep: int = 5
    layers: int = 6
    width: int = 64
    heads: int = 4
    ends: tuple[int, ...] = (1, 3, 5)
    text_layers: int = 4
    text_width: int = 96
    questions: int = 6
    clips: int = 640
    size: int = 48
    patch: int = 6
    batch: int = 32
    lr: float = 2e-3
    weight_decay: float = 0.05
    warmup: int = 50
    seed: int = 20261124
    save_every: int = 100
    routes: str | None = None
    mu: float = 0.6
    penalty: float = 1.0
