"""Pictures to learn from: a user's folder, digits, scikit-image's photographs; what cannot be read is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from pertoken.core.errors import BadRequest
from pertoken.models.grid import GridClassifier
from pertoken.models.images import ImageModel, read_picture
from pertoken.zoo.pictures import Scenes, digits, folder, pictures
from pertoken.zoo.scene_recipe import HELD
from pertoken.zoo.scenes import MEAN, SPREAD, batch
from pertoken.zoo.scenes_models import SCENE_RECIPES, SceneRun, quality

SMALL = {"steps": 3, "batch": 4, "width": 16, "warmup": 1, "layers": 2, "ends": (0, 1)}


def filled(path: Path, classes=("dark", "light"), count=6) -> Path:
    """A folder of plain pictures of several kinds and sizes, the classes of which differ in brightness."""
    for number, name in enumerate(classes):
        (path / name).mkdir(parents=True)
        for i in range(count):
            grey = np.full((20 + i, 30, 3), 40 + 150 * number + i, np.uint8)
            image = Image.fromarray(grey)
            if i == 1:
                image = image.convert("L")
            elif i == 2:
                image.putalpha(255)
            image.save(path / name / f"{i}.{'png' if i < 3 else 'jpg'}")
    return path


def test_a_folder_is_read_with_its_classes_and_pictures_kept_apart(tmp_path):
    own = folder(filled(tmp_path / "photos"), 16)
    assert own.classes == ("dark", "light") and own.pixels.shape == (12, 16, 16, 3)
    assert own.apart.sum() == 2 and own.held(100) == 2 and own.held(1) == 1
    seen = set()
    for first in range(0, 20, 4):
        pixels, labels = own.batch(first, 4, 16)
        assert pixels.shape == (4, 3, 16, 16) and labels.shape == (4,)
        levels = (pixels.mean((1, 2, 3)) * SPREAD + MEAN).round().int().tolist()
        assert all((level > 100) == bool(label) for level, label in zip(levels, labels.tolist(), strict=True))
        seen |= set(levels)
    held, labels = own.batch(HELD, 2, 16)
    levels = set((held.mean((1, 2, 3)) * SPREAD + MEAN).round().int().tolist())
    assert len(seen) == 10 and not seen & levels and labels.tolist() == [0, 1]
    assert torch.equal(own.batch(5, 4, 16)[0], own.batch(5, 4, 16)[0])
    with pytest.raises(BadRequest, match="read at 16 pixels and is asked for at 48"):
        own.batch(0, 4, 48)


def test_scenes_are_pictures_too():
    pixels, labels = Scenes().batch(3, 2, 48)
    expected, _, classes = batch(3, 2, 48)
    assert torch.equal(pixels, expected) and torch.equal(labels, classes)
    assert len(Scenes.classes) == 18 and Scenes.classes[7] == "green square"


def test_what_cannot_be_used_is_refused(tmp_path):
    with pytest.raises(BadRequest, match="is no folder"):
        folder(tmp_path / "nothing", 16)
    with pytest.raises(BadRequest, match="holds no folders"):
        folder(tmp_path, 16)
    (tmp_path / "one" / "cats").mkdir(parents=True)
    with pytest.raises(BadRequest, match=r"no picture at .*cats"):
        folder(tmp_path / "one", 16)
    filled(tmp_path / "alone", ("cats",))
    with pytest.raises(BadRequest, match=r"has 1 class\(es\); give two classes"):
        folder(tmp_path / "alone", 16)
    filled(tmp_path / "few", count=1)
    with pytest.raises(BadRequest, match=r"too few pictures of dark \(1\), light \(1\)"):
        folder(tmp_path / "few", 16)
    own = filled(tmp_path / "broken")
    (own / "dark" / "9.png").write_bytes(b"not a picture")
    with pytest.raises(BadRequest, match=r"9\.png cannot be read as a picture"):
        folder(own, 16)
    Image.fromarray(np.zeros((5, 40, 3), np.uint8)).save(own / "dark" / "9.png")
    with pytest.raises(BadRequest, match=r"9\.png has 40 x 5 pixels"):
        folder(own, 16)
    recipe = SCENE_RECIPES["scenes-segmenter"]
    with pytest.raises(BadRequest, match="takes no other pictures; train one of scenes-classifier, scenes-pvt"):
        SceneRun("scenes-segmenter", tmp_path, recipe, folder(filled(tmp_path / "fine"), 48))


@pytest.mark.parametrize("name", ["scenes-classifier", "scenes-pvt", "scenes-grid", "scenes-grid-random"])
def test_classifiers_learn_from_a_folder(name, tmp_path):
    own = folder(filled(tmp_path / "photos"), 48)
    start = SCENE_RECIPES[name].start
    if start is not None:
        other = dataclasses.replace(SCENE_RECIPES[start], start=None, **SMALL)
        SceneRun(start, tmp_path / "runs" / start, other).export()  # of scenes: with other classes
    recipe = dataclasses.replace(SCENE_RECIPES[name], **SMALL)
    run = SceneRun(name, tmp_path / "runs" / name, recipe, own)
    run.train(status=lambda text: None)
    path = run.export()
    told = json.loads((path / "training.json").read_text())
    assert told["steps"] == 3 and 0 <= told["held_out"] <= 1
    assert ("held_out_routed" in told) == (recipe.routes is not None)
    loaded = type(run.model).from_pretrained(path)
    assert loaded.config.id2label == {0: "dark", 1: "light"} and next(loaded.parameters()).dtype == torch.bfloat16
    assert 0 <= quality(run.model, recipe, pictures=own) <= 1
    with pytest.raises(ValueError, match="other pictures"):
        SceneRun(name, tmp_path / "runs" / name, recipe).resume()


def test_a_folder_is_learnt_from_on_the_command_line(tmp_path, monkeypatch):
    from pertoken.cli import app

    monkeypatch.setitem(
        SCENE_RECIPES, "scenes-classifier", dataclasses.replace(SCENE_RECIPES["scenes-classifier"], **SMALL)
    )
    given = ["zoo", "train", "scenes-classifier", "--out", str(tmp_path / "runs"), "--images"]
    result = CliRunner().invoke(app, [*given, str(filled(tmp_path / "photos"))])
    assert result.exit_code == 0, result.output
    own = ImageModel(str(tmp_path / "runs" / "scenes-classifier" / "model"))
    shown = own.sized(read_picture(tmp_path / "photos" / "light" / "0.png"))
    with torch.inference_mode():
        assert own.model(own.inputs([shown])).logits.shape == (1, 2)
    for bad in ([*given, str(tmp_path / "nowhere")], ["zoo", "train", "code-draft", *given[3:], "digits"]):
        assert CliRunner().invoke(app, bad).exit_code != 0


def test_digits_of_scikit_learn():
    pytest.importorskip("sklearn")
    own = digits(24)
    assert own.pixels.shape == (1797, 24, 24, 3) and len(own.classes) == 10 and 300 < own.held(10**6) < 400
    assert np.array_equal(own.pixels, pictures("digits", 24).pixels)


def test_digits_without_scikit_learn_are_refused(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(BadRequest, match="pip install scikit-learn"):
        pictures("digits", 24)


def test_photographs_of_scikit_image(tmp_path):
    """Its bundled photographs, cut into pieces: a class for each."""
    data = pytest.importorskip("skimage.data")
    bundled = [p for p in sorted(Path(data.__file__).parent.glob("*.*")) if p.suffix in (".png", ".jpg", ".jpeg")]
    kept = [p for p in bundled if min(read_picture(p).shape[:2]) >= 96][:3]
    if len(kept) < 2:
        pytest.skip("this scikit-image brings no photographs along")
    for path in kept:
        whole, place = read_picture(path), tmp_path / path.stem
        place.mkdir()
        for i in range(6):
            top, left = i % 2 * (whole.shape[0] // 2), i // 2 * (whole.shape[1] // 3)
            piece = whole[top : top + whole.shape[0] // 2, left : left + whole.shape[1] // 3]
            Image.fromarray(piece).save(place / f"{i}.png")
    own = folder(tmp_path, 48)
    recipe = dataclasses.replace(SCENE_RECIPES["scenes-pvt"], **SMALL)
    run = SceneRun("scenes-pvt", tmp_path / "runs", recipe, own)
    run.train(status=lambda text: None)
    assert isinstance(run.model, GridClassifier) and run.model.config.num_labels == len(kept)
