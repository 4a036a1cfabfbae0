"""When is a position committed, when refreshed?"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from pertoken.core.card import Card, card
from pertoken.core.errors import BadRequest

COMMIT, REFRESH = "denoise.commit", "denoise.refresh"  # the sites of a trace of the loop
INSERT = "denoise.insert"  # the site of a trace of insertions


def slots(names: Sequence[str]) -> dict[str, Card]:
    """The cards of rules that go together, by slot; raises `BadRequest` for two rules of the same slot."""
    found: dict[str, Card] = {}
    for name in names:
        one: Any = card(name)
        if not is_rule(one):
            raise BadRequest(f"{name} is no rule of the denoising loop: it runs by itself, not as part of a sum")
        slot = one.build.slot
        if slot in found:
            raise BadRequest(
                f"{found[slot].name} and {name} both decide {slot} and cannot be combined; give one of them, or both "
                "as separate names to see them side by side"
            )
        found[slot] = one
    return found


def make(name: str, *, filter: Any = None, tokenizer: Any = None, language: str | None = None, **options: Any) -> Any:
    """The decoder of "RULE" or "RULE+RULE" by registered names; slots that are not named are as the rules want them.

    filter, tokenizer, language: for rules that take them; others ignore it. options: fields of `Denoise`, and fields of
    the rules that `Denoise` does not have. A method of this folder that is no rule is built as it is. Raises
    `BadRequest` for two rules of one slot, for what a rule needs and was not given, and for an option nobody has.
    """
    from pertoken.denoise.loop import Denoise
    from pertoken.methods import load_methods

    load_methods()
    names, offered = name.split("+"), {"filter": filter, "tokenizer": tokenizer, "language": language}
    given = {key: value for key, value in offered.items() if value is not None}
    if len(names) == 1 and not is_rule(card(name)):
        return _build(card(name), given | options)
    loop = {key: value for key, value in options.items() if key in _takes(Denoise)}
    rules, chosen = {key: value for key, value in options.items() if key not in loop}, slots(names)
    taken = {key for one in chosen.values() for key in _takes(one.build)}
    if unknown := rules.keys() - taken:
        known = sorted((taken | _takes(Denoise)) - set(chosen))
        raise BadRequest(f"{min(unknown)} is no setting of {name}; there are {', '.join(known)}")
    built = {slot: _build(one, given | rules) for slot, one in chosen.items()}
    beside = {key: value for rule in built.values() for key, value in rule.beside.items()}
    return Denoise(**(beside | built | loop))


def is_rule(one: Card) -> bool:
    """Whether a card is that of a rule of the loop, which goes together with others."""
    from pertoken.denoise.rules import Rule

    return isinstance(one.build, type) and issubclass(one.build, Rule)


def _takes(build: Any) -> set[str]:
    return set(inspect.signature(build).parameters)


def _build(one: Card, given: dict[str, Any]) -> Any:
    takes = _takes(one.build)
    if missing := sorted(one.needs & takes - given.keys()):
        raise BadRequest(f"{one.name} needs a {missing[0]}: give {missing[0]}=... (--{missing[0]} on the command line)")
    return one.build(**{key: value for key, value in given.items() if key in takes})
