"""Every registered policy that reduces image tokens, built for an encoder: what its card says that it needs is made."""

from __future__ import annotations

from pertoken.core.card import card, cards
from pertoken.methods import load_methods
from pertoken.models.segmenter import PlainSegmenter
from pertoken.reduce.thresholds import calibrate
from tests.reduce.families import encoder, images, segmenter

load_methods()

REDUCERS = [
    name for name, one in cards().items() if one.shape == "policy" and "image" in one.needs and "grid" not in one.needs
]


def host(name, family):
    """What a policy of this name is attached to: an encoder, or a segmenter around one."""
    return segmenter(family, "linear") if "heads" in card(name).needs else encoder(family)


def built(name, model, **settings):
    """A policy with what it needs for this model."""
    one = card(name)
    if "thresholds" in one.needs:
        settings["thresholds"] = calibrate(model, [images(8, seed=9)], fractions=(0.2, 0.4, 0.7))
    return one.build(**(getattr(one.build, "small", {}) | settings))


def out_of(model, pixels):
    """What a model makes of images, as one tensor."""
    return model(pixels).logits if isinstance(model, PlainSegmenter) else model(pixels).last_hidden_state
