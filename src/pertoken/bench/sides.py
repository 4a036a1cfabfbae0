"""The contenders of a comparison: what a name means, which model it goes with, and what it is measured by."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pertoken.core.card import Card, card, cards
from pertoken.models.kind import KINDS, kind_needed

ARTICLE = {"causal": "a", "diffusion": "a", "insertion": "an", "image": "an"}
PLAIN, DENSE = "generate", "dense"
GRAMMAR = "xgrammar"
REFERENCES = {"causal": (PLAIN, "full"), "diffusion": (DENSE, DENSE), "insertion": ("ilm", "ilm")}
LABELS = {PLAIN: "transformers generate", DENSE: "one per step, no cache"}


@dataclass
class Side:
    """One contender while it runs: its decoder and attached policies (none of either for transformers' own loop).

    whole: its rows are whole texts, into which tokens were put anywhere, not what was added at the end. engine: of the
    grammar that its texts are kept in.
    """

    name: str
    label: str
    decoder: Any = None
    policies: tuple[Any, ...] = ()
    whole: bool = False
    engine: Any = None
    rows: list[list[int]] = field(default_factory=list)
    tokens: int = 0
    steps: int = 0
    peak_bytes: int = 0


@dataclass(frozen=True)
class Given:
    """What methods may need or take: a draft model; the tokenizer; a filter's path; the language of what is written;
    block and steps of a canvas, None for their own; constraint: what a canvas must be."""

    draft: Any = None
    tokenizer: Any = None
    filter: str | None = None
    language: str | None = None
    block: int | None = None
    steps: int | None = None
    constraint: Any = None

    @property
    def canvas(self) -> dict[str, Any]:
        """Settings of a canvas, as far as they were given."""
        return {name: value for name in ("block", "steps", "constraint") if (value := getattr(self, name)) is not None}

    def places(self, length: int) -> int:
        """Positions per block on a canvas of this length."""
        from pertoken.denoise.loop import Denoise

        return min(self.block or Denoise.block or length, length)


def reference(kind: str) -> str:
    """The side that outputs are compared with: transformers' own loop; for a canvas one commit per step without a
    cache."""
    return REFERENCES[kind][0]


def default_baseline(kind: str) -> str:
    """The side that speed is relative to, if none is named."""
    return REFERENCES[kind][1]


def parts_of(name: str) -> list[Card]:
    """The cards of "NAME" or "NAME+NAME"; raises `ValueError` for unknown names and for sums without a meaning."""
    found = [card(part) for part in name.split("+")]
    for one in found:
        if one.shape not in ("decoder", "policy"):
            raise ValueError(f"{one.name} is an {one.shape}; only decoders and policies generate text")
    decoders = [one for one in found if one.shape == "decoder"]
    if len(decoders) == 2 and GRAMMAR in [one.name for one in decoders]:  # under a grammar all do what it does
        found = [one for one in found if one.name != GRAMMAR]
        decoders = [one for one in decoders if one.name != GRAMMAR]
    names = [one.name for one in decoders]
    if len({kind_needed(one.needs) for one in decoders}) > 1:
        raise ValueError(f"{' and '.join(names)} need models of different kinds and cannot be combined")
    if len(decoders) > 1:
        if all(one.question == "denoise" for one in decoders):
            from pertoken.denoise import slots

            slots(names)
        else:
            raise ValueError(
                f"{' and '.join(names)} both choose the next token and cannot be combined; "
                f"give them as separate names ({' '.join(names)}) to see them side by side"
            )
    return found


def check_kind(name: str, kind: str, model_name: str) -> None:
    """Raises `ValueError` if `name` does not run on models of this kind."""
    if name in (PLAIN, DENSE):
        if name != reference(kind):
            raise ValueError(f"{name} is no side for {model_name}, a {kind} model; its own is {reference(kind)}")
        return
    parts = parts_of(name)
    if images := [one.name for one in parts if kind_needed(one.needs) == "image"]:
        raise ValueError(f"{images[0]} works on images and writes no text; give it a picture with --input photo.png")
    needed = next((kind_needed(one.needs) for one in parts if one.shape == "decoder"), "causal")
    if needed == kind:
        return
    policies = [one.name for one in parts if one.shape == "policy"]
    if len(policies) == len(parts):
        name = f"{name} alone is run as lossless({name}), which"
    fitting = [one.name for one in cards().values() if one.shape == "decoder" and kind_needed(one.needs) == kind]
    raise ValueError(
        f"{name} {KINDS[needed]} and needs {ARTICLE[needed]} {needed} model; {model_name} is {ARTICLE[kind]} {kind} "
        f"model, which {KINDS[kind]}. "
        f"Methods for it: {', '.join(fitting)}"
    )


def make_side(name: str, kind: str, given: Given) -> Side:
    """The contender of this name, whose parts were checked."""
    if name == PLAIN:
        return Side(name, LABELS[name])
    if name == DENSE:
        dense = Given(block=given.block, constraint=given.constraint)
        return Side(name, LABELS[name], make_decoder("schedule+recompute", kind, dense))
    parts = parts_of(name)
    policies = [one for one in parts if one.shape == "policy"]
    if len(policies) == len(parts) == 1:
        policy = policies[0].build()
        if policy.saves == "memory":  # what is evicted is gone for a verifier too
            return Side(name, f"{name} under generate", policies=(policy,))
        return Side(name, f"lossless {name}", make_decoder(name, kind, given))
    decoders = "+".join(one.name for one in parts if one.shape == "decoder")
    decoder = make_decoder(decoders, kind, given) if decoders else None
    return Side(name, name, decoder, tuple(one.build() for one in policies), whole=kind == "insertion")


def make_decoder(name: str, kind: str, given: Given) -> Any:
    """What goes to `custom_generate`."""
    if kind == "causal":
        from pertoken.decode import make

        return make(name, draft=given.draft)
    from pertoken.denoise import make

    canvas = given.canvas if kind == "diffusion" else {}
    return make(name, filter=given.filter, tokenizer=given.tokenizer, language=given.language, **canvas)


def default_draft(model_name: str, names: list[str]) -> str | None:
    """For a zoo model and methods that need a draft: the zoo model distilled from it."""
    target = model_name.removeprefix("zoo:")
    if target == model_name or not needed("draft", names):
        return None
    from pertoken.zoo.recipe import RECIPES

    return next((f"zoo:{name}" for name, recipe in RECIPES.items() if recipe.teacher == target), None)


def default_filter(model_name: str, names: list[str], block: int) -> str | None:
    """For a zoo model and methods that need a filter: the one shipped for it and this size of blocks."""
    own = model_name.removeprefix("zoo:")
    if own == model_name or not needed("filter", names):
        return None
    from pertoken.zoo import WEIGHTS
    from pertoken.zoo.recipe import FILTERS

    kept = (WEIGHTS / name / f"filter-{block}.safetensors" for name, one in FILTERS.items() if one.model == own)
    return next((str(path) for path in kept if path.is_file()), None)


def needed(what: str, names: list[str]) -> bool:
    """Whether any of the named methods needs this."""
    return any(what in one.needs for name in names if name not in (PLAIN, DENSE) for one in parts_of(name))
