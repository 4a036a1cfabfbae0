"""Settings of a method: which one is its dial, how people write them, and the file that `pertoken tune` writes for
`pertoken run --config`."""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pertoken.core.budget import Budget
from pertoken.core.card import Card, Dial
from pertoken.models.kind import kind_needed

FORMAT = "pertoken-config-1"
SHARES = (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8)  # of a budget
CANVAS = ("steps", "block")  # settings of the loop that rules of a canvas run in


@dataclass(frozen=True)
class Config:
    """A method and its settings for a model; draft: None for the default; about: how they were found."""

    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    model: str | None = None
    draft: str | None = None
    about: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> Path:
        """Write JSON; the directory is made if it is missing."""
        path, told = Path(path), asdict(self) | {"settings": plain(self.settings)}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"format": FORMAT} | told, indent=1) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> Config:
        """Read what `save` wrote; raises `ValueError` for anything else."""
        try:
            kept = json.loads(Path(path).read_text(encoding="utf-8"))
            if kept.pop("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT}")
            found = cls(**kept)
            if not isinstance(found.method, str) or not isinstance(found.settings, dict):
                raise ValueError("it names no method with settings")
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} is no configuration that `pertoken tune` wrote: {error}") from error
        return Config(found.method, restored(found.settings), found.model, found.draft, found.about)


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings in types that JSON has: a budget becomes {"budget": {unit: value}}."""
    return {
        name: {"budget": {unit: getattr(value, unit) for unit in value.units()}} if isinstance(value, Budget) else value
        for name, value in settings.items()
    }


def restored(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What `plain` made plain."""
    budget = lambda value: isinstance(value, dict) and set(value) == {"budget"}  # noqa: E731
    return {name: Budget(**value["budget"]) if budget(value) else value for name, value in settings.items()}


def fields_of(one: Card) -> list[str]:
    """Names of a method's settings."""
    own = [name for name in inspect.signature(one.build).parameters if not name.startswith("_")]
    return [*own, *(CANVAS if one.question == "denoise" and "steps" not in own else ())]


def dial_of(one: Card) -> Dial:
    """What is turned to tune a method; raises `ValueError` for a method without a dial."""
    if one.shape not in ("policy", "decoder"):
        raise ValueError(f"{one.name} is a {one.shape}; only policies and decoders can be tuned")
    if kind_needed(one.needs) in ("image", "video"):
        raise ValueError(f"{one.name} works on images, and tune compares texts; see `pertoken run --input photo.png`")
    if one.exactness == "lossless":
        raise ValueError(
            f"{one.name} is lossless: its output is the model's own at every setting, so there is no quality to trade. "
            "Compare its speed with `pertoken run`"
        )
    if one.dial is not None:
        return one.dial
    if one.shape == "policy" and "budget" in fields_of(one):
        return Dial("budget", tuple(Budget(fraction=share) for share in SHARES))
    raise ValueError(
        f"{one.name} has no dial: none of its settings ({', '.join(fields_of(one)) or 'none'}) trades quality for "
        "computation. `pertoken methods --json` lists the dials"
    )


def setting(one: Card, text: str) -> tuple[str, Any]:
    """A setting written as NAME=VALUE; raises `ValueError` for a name that the method has not."""
    name, sign, value = text.partition("=")
    known = fields_of(one)
    if not sign:
        raise ValueError(f"setting {text!r} has no value; write NAME=VALUE, such as {known[0] if known else 'x'}=1")
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(known) or 'none'}"
        raise ValueError(f"{one.name} has no setting {name!r}; {hint}")
    return name, value_of(name, value)


def value_of(name: str, text: str) -> Any:
    """A value as JSON says it, else as text. A budget is a share such as 0.5, a number with its unit such as tokens=64,
    or full."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    if name != "budget":
        return value
    if text == "full":
        return Budget.full()
    unit, sign, count = text.partition("=")
    try:
        return Budget(**{unit: json.loads(count)}) if sign else Budget(fraction=float(text))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"budget {text!r} is none: {error}. Give a share such as 0.5, tokens=64, layers=6, or full"
        ) from error
