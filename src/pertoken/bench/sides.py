"""The contenders of a comparison: what a name means, which model it goes with, and what it is measured by."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pertoken.core.card import Card, card, cards
from pertoken.models.kind import DRAFTS, KINDS, draft_kind, kind_needed

ARTICLE = {"causal": "a", "diffusion": "a", "insertion": "an", "image": "an", "video": "a"}
PLAIN, DENSE = "generate", "dense"
GRAMMAR = "xgrammar"
REFERENCES = {"causal": (PLAIN, "full"), "diffusion": (DENSE, DENSE), "insertion": ("ilm", "ilm")}
LABELS = {PLAIN: "transformers generate", DENSE: "one per step, no cache"}


@dataclass
class Side:
    """One contender while it runs: its decoder and attached policies (none of either for transformers' own loop).

    alone: the policy that drafts, where the side is one policy made lossless. whole: its rows are whole texts, into
    which tokens were put anywhere, not what was added at the end. engine: of the grammar that its texts are kept in.
    """

    name: str
    label: str
    decoder: Any = None
    policies: tuple[Any, ...] = ()
    alone: Any = None
    whole: bool = False
    engine: Any = None
    rows: list[list[int]] = field(default_factory=list)
    tokens: int = 0
    steps: int = 0
    peak_bytes: int = 0


@dataclass(frozen=True)
class Given:
    """What methods may need or take: draft models by kind; the tokenizer; a filter's path; what was trained beside the
    model, by the setting that takes it; the language of what is written; block and steps of a canvas, None for their
    own; constraint: what a canvas must be."""

    drafts: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Any = None
    filter: str | None = None
    beside: Mapping[str, str] = field(default_factory=dict)
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


def check_kind(name: str, kind: str, model_name: str, attached: bool = False) -> None:
    """Raises `ValueError` if `name` does not run on models of this kind; attached: a policy alone is attached, and not
    made lossless."""
    if name in (PLAIN, DENSE):
        if name != reference(kind):
            raise ValueError(f"{name} is no side for {model_name}, a {kind} model; its own is {reference(kind)}")
        return
    parts = parts_of(name)
    if images := [one.name for one in parts if kind_needed(one.needs) in ("image", "video")]:
        raise ValueError(f"{images[0]} works on images and writes no text; give it a picture with --input photo.png")
    needed = next((kind_needed(one.needs) for one in parts if one.shape == "decoder"), "causal")
    if needed == kind:
        return
    policies = [one.name for one in parts if one.shape == "policy"]
    if len(policies) == len(parts):
        if attached and kind == "diffusion":
            return
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
        policy = make_policy(policies[0], given)
        if policy.saves != "operations":  # what is evicted is gone for a verifier too; more passes are no cheap draft
            return Side(name, f"{name} under generate", policies=(policy,))
        return Side(name, f"lossless {name}", make_decoder(name, kind, given), alone=policy)
    decoders = "+".join(one.name for one in parts if one.shape == "decoder")
    decoder = make_decoder(decoders, kind, given) if decoders else None
    return Side(name, name, decoder, tuple(make_policy(one, given) for one in policies), whole=kind == "insertion")


def set_side(name: str, settings: Mapping[str, Any], kind: str, given: Given) -> Side:
    """The method of this name with these settings: a decoder, or a policy that is attached and not verified."""
    label = f"{name} {', '.join(f'{key}={told(value)}' for key, value in settings.items())}".strip()
    (one,) = parts_of(name)
    if one.shape == "decoder":
        return Side(label, label, make_decoder(name, kind, given, **settings), whole=kind == "insertion")
    decoder = None if kind == "causal" else make_side(DENSE, kind, given).decoder
    return Side(label, label, decoder, (make_policy(one, given, **settings),))


def told(value: Any) -> str:
    """A setting in words."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def make_policy(one: Card, given: Given, **settings: Any) -> Any:
    """A policy with the parts that there are for the model."""
    takes = inspect.signature(one.build).parameters
    parts = {name: place for name, place in given.beside.items() if name in takes}
    return one.build(**(parts | settings))


def make_decoder(name: str, kind: str, given: Given, **settings: Any) -> Any:
    """What goes to `custom_generate`; a policy's name means that it drafts for its own model."""
    if kind == "causal":
        from pertoken.decode import make
        from pertoken.decode.lossless import lossless

        one = card(name)
        if one.shape == "policy":
            return lossless(make_policy(one, given), **settings)
        return make(name, draft=given.drafts.get(draft_kind(one.needs) or ""), **settings)
    from pertoken.denoise import make

    offered = {"filter": given.filter, "tokenizer": given.tokenizer, "language": given.language}
    return make(name, **(offered | (given.canvas if kind == "diffusion" else {}) | settings))


def default_drafts(model_name: str, names: list[str]) -> dict[str, str]:
    """For a zoo model and methods that need drafts, by kind: the model distilled from it, and the diffusion model that
    began as the same one."""
    from pertoken.zoo.recipe import RECIPES

    target = model_name.removeprefix("zoo:")
    if target == model_name or target not in RECIPES:
        return {}

    def begun(name: str) -> str:
        while RECIPES[name].start in RECIPES:
            name = str(RECIPES[name].start)
        return name

    started = {one.start for one in RECIPES.values()}
    found = {"causal": [name for name, one in RECIPES.items() if one.teacher == target]}
    masked = [name for name, one in RECIPES.items() if one.objective == "masked" and name not in started]
    found["diffusion"] = [name for name in masked if begun(name) == begun(target)]
    wanted = {kind for need, kind in DRAFTS.items() if needed(need, names)}
    return {kind: f"zoo:{these[0]}" for kind, these in found.items() if kind in wanted and these}


def default_beside(model_name: str, names: list[str]) -> dict[str, str]:
    """For settings of policies: what lies in the model's own directory, and for a zoo model what is shipped that was
    trained beside it, the plainest first."""
    from pertoken.depth import deciders, lora
    from pertoken.models.load import resolve
    from pertoken.zoo import WEIGHTS
    from pertoken.zoo.duo import Routing
    from pertoken.zoo.stopping import Stopping
    from pertoken.zoo.tunings import TUNINGS

    parts = [one for name in names if name not in (PLAIN, DENSE) for one in parts_of(name) if one.shape == "policy"]
    takes = {setting for one in parts for setting in inspect.signature(one.build).parameters}
    place = Path(resolve(model_name))
    within = {"decider": deciders.FILE, "lora": lora.FILE}
    found = {one: str(place) for one, file in within.items() if one in takes and (place / file).is_file()}
    own = model_name.removeprefix("zoo:")
    if own == model_name:
        return found
    for setting, kind in (("controller", Stopping), ("modules", Routing)):
        mine = [name for name, one in TUNINGS.items() if isinstance(one, kind) and one.model == own]
        there = [f"zoo:{name}" for name in mine if (WEIGHTS / name / "config.json").is_file()]
        if setting in takes and there:
            found[setting] = there[0]
    return found


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
