"""How is the next token chosen, how far is guessed ahead, what may it be?"""

from __future__ import annotations

from typing import Any

from pertoken.core.card import card


def make(name: str, *, draft: Any = None, **options: Any) -> Any:
    """Any registered decoder by name, or `lossless(policy)` for the name of a policy; options are its fields.

    draft: the draft model of a method that needs one, causal or a masked-diffusion model as its card says; others
    ignore it. Raises `ValueError` for an unknown name, a method that does not decode, or a missing draft.
    """
    from pertoken.decode.lossless import lossless
    from pertoken.methods import load_methods
    from pertoken.models.kind import draft_kind

    load_methods()
    found = card(name)
    if found.shape == "policy":
        return lossless(found.build(), **options)
    if found.shape != "decoder":
        raise ValueError(f"{name} is of shape {found.shape!r}; only decoders and policies generate text")
    if "policy" in found.needs:
        return found.build(options.pop("policy", None) or card("skip_layers").build(), **options)
    wanted = draft_kind(found.needs)
    if wanted is None:
        return found.build(**options)
    if draft is None:
        raise ValueError(
            f"{name} needs a {wanted} draft model: give one with the target's tokenizer (--draft on the command line)"
        )
    return found.build(draft, **options)
