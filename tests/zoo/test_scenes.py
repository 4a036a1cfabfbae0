"""Scenes: fixed by their seed, what they say of themselves, and runs that go on from where they were stopped."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from pertoken.core.errors import BadRequest
from pertoken.zoo.scenes import COLOURS, MOST, SHAPES, batch, clip, questions, scene
from pertoken.zoo.scenes_models import SCENE_RECIPES, SceneRun, made, quality


def test_a_seed_is_a_scene():
    for seed in range(5):
        one, again = scene(seed), scene(seed)
        assert np.array_equal(one.pixels, again.pixels) and one.things == again.things
    assert not np.array_equal(scene(1).pixels, scene(2).pixels)


def test_labels_are_what_is_to_be_seen():
    for seed in range(40):
        one = scene(seed)
        assert 1 <= len(one.things) <= MOST
        seen = one.labels_of_things()
        for number, thing in enumerate(one.things):
            own = seen == number
            assert own.sum() >= 0.5 * thing.covers(48).sum()
            assert (one.labels[own] == 1 + SHAPES.index(thing.shape)).all()
            colour = one.pixels[own].astype(float).mean(0)
            nearest = min(COLOURS, key=lambda name: np.abs(np.array(COLOURS[name]) - colour).sum())
            assert nearest == thing.colour
        assert (one.labels[seen < 0] == 0).all()


def test_answers_can_be_read_off_the_things():
    for seed in range(30):
        one = scene(seed)
        for question, answer in questions(one):
            words = question.split()
            if words[0] == "how":
                assert int(answer) == sum(t.shape == words[2][:-1] for t in one.things)
            elif words[1] == "colour":
                assert [t.colour for t in one.things if t.shape == words[4]] == [answer]
            elif words[0] == "what":
                assert [t.shape for t in one.things if t.colour == words[2]] == [answer]
            else:
                (thing,) = [t for t in one.things if t.shape == words[3]]
                sign = {"left": -1, "right": 1, "top": -1, "bottom": 1}[answer]
                assert ((thing.x if answer in ("left", "right") else thing.y) - 24) * sign > 0


def test_clips_say_as_much_as_there_is_to_see():
    for count in range(1, 5):
        frames, said = clip(7, frames=4, count=count)
        assert len(frames) == 4 and said.count(".") == len(frames[0].things)
    assert clip(3, count=0)[1] == "nothing ."


def test_bad_settings_are_refused():
    with pytest.raises(BadRequest, match="size="):
        scene(0, size=8)
    with pytest.raises(BadRequest, match="count="):
        scene(0, count=MOST + 1)
    with pytest.raises(BadRequest, match="frames="):
        clip(0, frames=0)


@pytest.mark.parametrize("name", SCENE_RECIPES)
def test_a_stopped_run_goes_on_as_if_it_had_not(name, tmp_path):
    recipe = dataclasses.replace(SCENE_RECIPES[name], steps=4, batch=3, save_every=2, width=16, warmup=2)
    if recipe.start is not None:
        start = dataclasses.replace(SCENE_RECIPES[recipe.start], width=16)
        made(start).save_pretrained(tmp_path / recipe.start / "model")
    whole = SceneRun(name, tmp_path / "whole", recipe)
    whole.train(status=lambda text: None)
    first = SceneRun(name, tmp_path / "parts", recipe)
    first.train(until=2, status=lambda text: None)
    second = SceneRun(name, tmp_path / "parts", recipe)
    assert second.resume() and second.step == 2
    second.train(status=lambda text: None)
    for one, other in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match="another recipe"):
        SceneRun(name, tmp_path / "parts", dataclasses.replace(recipe, lr=1.0)).resume()
    assert 0 <= quality(second.model, recipe, 6) <= 1


def test_batches_are_what_models_take():
    pixels, labels, classes = batch(5, 3)
    assert pixels.shape == (3, 3, 48, 48) and labels.shape == (3, 48, 48) and classes.shape == (3,)
    assert pixels.abs().max() < 5 and int(classes.max()) < len(SHAPES) * len(COLOURS)
