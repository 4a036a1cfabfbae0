"""Scenes: fixed by their seed, what they say of themselves, and runs that go on from where they were stopped."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from pertoken.core.errors import BadRequest
from pertoken.zoo.scenes import (
    COLOURS,
    MOST,
    SHAPES,
    WAYS,
    balanced,
    batch,
    clip,
    clip_questions,
    description,
    kind_of_question,
    ordered,
    questions,
    scene,
)
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
                assert int(answer) == sum(words[2][:-1] in ("thing", t.shape) for t in one.things)
            elif words[1] == "colour":
                assert [t.colour for t in one.things if t.shape == words[4]] == [answer]
            elif words[0] == "what":
                assert [t.shape for t in one.things if t.colour == words[2]] == [answer]
            else:
                (thing,) = [t for t in one.things if words[-2] in (t.shape, t.colour)]
                sign = {"left": -1, "right": 1, "top": -1, "bottom": 1}[answer]
                assert ((thing.x if answer in ("left", "right") else thing.y) - 24) * sign > 0


def test_descriptions_name_every_thing_once():
    for seed in range(30):
        one = scene(seed)
        clauses = description(one).split(" .")[:-1]
        assert len(clauses) == len(one.things)
        named = [tuple(clause.split()[:2]) for clause in clauses]
        assert sorted(named) == sorted((t.colour, t.shape) for t in one.things)
    assert description(scene(3, count=0)) == "nothing ."


def test_clips_show_what_they_say():
    """Things move as told, never out of the picture, and clips with more to tell have longer descriptions."""
    for seed in range(30):
        one = clip(seed)
        assert len(one.frames) == 8 and len({t.colour for t in one.things}) == len(one.things)
        for segment, ways in enumerate(one.ways):
            first, last = one.frames[4 * segment], one.frames[4 * segment + 3]
            for before, after, way in zip(first.things, last.things, ways, strict=True):
                moved = np.sign(np.round([after.x - before.x, after.y - before.y], 6))
                assert tuple(moved) == WAYS[way]
                assert 0 <= after.x <= 48 and 0 <= after.y <= 48
            words = one.description(segment).split()
            assert len(words) == one.events(segment) + 2 * len(one.things)
            named = [(one.things[i].colour, one.things[i].shape) for i in ordered(one.things)]
            assert [tuple(c.split()[:2]) for c in one.description(segment).split(" .")[:-1]] == named
    assert clip(3, count=0).description(0) == "nothing ."


def test_questions_about_clips_can_be_read_off_the_things():
    for seed in range(20):
        one = clip(seed)
        for question, answer in clip_questions(one):
            words = question.split()
            if kind_of_question(question) == "way":
                (number,) = [i for i, t in enumerate(one.things) if t.colour == words[2]]
                assert one.ways[words[-2] == "then"][number] == answer
            elif kind_of_question(question) == "count":
                assert int(answer) == sum(words[2][:-1] in ("thing", t.shape) for t in one.things)


def test_balanced_questions_are_of_all_kinds():
    for seed in range(20):
        pairs = clip_questions(clip(seed, count=5))
        rng = np.random.default_rng(seed)
        chosen = balanced(pairs, 8, rng)
        assert len(set(chosen)) == 8 and set(chosen) <= set(pairs)
        counts = [sum(kind_of_question(q) == kind for q, _ in chosen) for kind in ("count", "shape", "way")]
        assert min(counts) >= 2
        assert sorted(balanced(pairs, 99, rng)) == sorted(pairs)


def test_bad_settings_are_refused():
    with pytest.raises(BadRequest, match="size="):
        scene(0, size=8)
    with pytest.raises(BadRequest, match="count="):
        scene(0, count=MOST + 1)
    with pytest.raises(BadRequest, match="frames="):
        clip(0, frames=0)
    with pytest.raises(BadRequest, match="segments="):
        clip(0, frames=7, segments=2)


@pytest.mark.parametrize("name", SCENE_RECIPES)
def test_a_stopped_run_goes_on_as_if_it_had_not(name, tmp_path):
    small = {"width": 16, "text_width": 16, "text_layers": 3}
    recipe = dataclasses.replace(SCENE_RECIPES[name], steps=4, batch=3, save_every=2, warmup=2, **small)
    for start in (recipe.start or "").split("+") if recipe.start else ():
        made(dataclasses.replace(SCENE_RECIPES[start], **small)).save_pretrained(tmp_path / start / "model")
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
    found = quality(second.model, recipe, 6)
    assert all(0 <= figure <= 1 for figure in (found.values() if isinstance(found, dict) else [found]))


def test_batches_are_what_models_take():
    pixels, labels, classes = batch(5, 3)
    assert pixels.shape == (3, 3, 48, 48) and labels.shape == (3, 48, 48) and classes.shape == (3,)
    assert pixels.abs().max() < 5 and int(classes.max()) < len(SHAPES) * len(COLOURS)
