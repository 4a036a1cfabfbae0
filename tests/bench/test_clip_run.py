"""`pertoken run` on clips: what is read, what is refused, and the figures and strips that come of it."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from pertoken.bench.clip_run import is_watcher, watch
from pertoken.bench.picture_run import look
from pertoken.cli import app
from pertoken.core.errors import BadRequest
from pertoken.models.images import read_clip
from pertoken.view.strip import strip
from pertoken.zoo import words
from pertoken.zoo.scenes import clip
from pertoken.zoo.scenes_models import SCENE_RECIPES, made


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A host and parts that were not trained."""
    path = tmp_path_factory.mktemp("host")
    recipe = dataclasses.replace(SCENE_RECIPES["clips-langdc"], width=16, text_width=16)
    torch.manual_seed(1)
    made(recipe).eval().save_pretrained(path)
    words.save(path)
    return path


def frames_of(seed=4):
    return [Image.fromarray(frame.pixels) for frame in clip(seed).frames]


@pytest.fixture
def animation(tmp_path):
    first, *rest = frames_of()
    first.save(tmp_path / "clip.gif", save_all=True, append_images=rest, duration=100)
    return tmp_path / "clip.gif"


def test_methods_stand_beside_all_tokens(directory, animation):
    found = watch(["langdc", "fixed_pooling", "random_places"], str(directory), animation, "what is red ?")
    full, langdc, pooled, lot = found.sides
    assert full.tokens == 128 and pooled.tokens == 64 and lot.tokens == 64 and found.frames == 8
    assert 32 + 2 <= langdc.tokens <= 64 and len(langdc.said) == 2
    assert langdc.tokens == 32 + sum(max(len(text.split()), 1) for text in langdc.said)
    assert pooled.flops < full.flops and [name for name, *_ in found.drawn] == [
        "langdc",
        "fixed_pooling",
        "random_places",
    ]
    json.dumps(found.to_json())


def test_a_folder_of_frames_is_a_clip(directory, tmp_path):
    for number, frame in enumerate(frames_of()[:3]):
        frame.save(tmp_path / f"{number}.png")
    assert len(read_clip(tmp_path, 8)) == 3 and len(read_clip(tmp_path, 2)) == 2
    found = watch(["langdc"], str(directory), tmp_path)
    assert found.sides[0].tokens == 48 and found.question == "how many things ?"


def test_the_command_draws_a_strip(directory, animation, tmp_path):
    page = tmp_path / "clip.html"
    given = ["run", "langdc", "--model", str(directory), "--input", str(animation), "--html", str(page), "--json"]
    result = CliRunner().invoke(app, [*given, "--prompt", "<video> what is red ?"])
    assert result.exit_code == 0, result.output
    assert "data:image/png;base64" in page.read_text() and '"answer"' in result.output
    again = CliRunner().invoke(app, given[:6])
    assert again.exit_code == 0 and "how many things ?" in again.output


def test_an_animation_before_an_encoder_is_a_strip(animation):
    found = look(["tome"], "zoo:scenes-segmenter", animation)
    assert len(found.sides[1].tokens) == 8 and len(found.drawn) == 1
    assert found.drawn[0][2].width > 4 * found.drawn[0][2].height / 2


def test_bad_input_is_refused_in_a_sentence(directory, animation, tmp_path):
    assert is_watcher(str(directory)) and not is_watcher("zoo:scenes-segmenter")
    with pytest.raises(BadRequest, match="does not know 'elephant'"):
        watch(["langdc"], str(directory), animation, "what is elephant ?")
    with pytest.raises(BadRequest, match="choose from"):
        watch(["tome"], str(directory), animation)
    with pytest.raises(BadRequest, match="no picture at"):
        watch(["langdc"], str(directory), tmp_path / "none.gif")
    (tmp_path / "broken.gif").write_bytes(b"GIF89a")
    with pytest.raises(BadRequest, match="cannot be read"):
        watch(["langdc"], str(directory), tmp_path / "broken.gif")
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for number in range(2):
        Image.new("RGB", (20 + number, 20)).save(mixed / f"{number}.png")
    with pytest.raises(BadRequest, match="several sizes"):
        watch(["langdc"], str(directory), mixed)
    Image.new("RGB", (6, 6)).save(tmp_path / "tiny.png")
    with pytest.raises(BadRequest, match="two patches"):
        watch(["langdc"], str(directory), tmp_path / "tiny.png")
    (directory / "langdc").rename(directory / "away")
    try:
        with pytest.raises(BadRequest, match="there are none"):
            watch(["langdc"], str(directory), animation)
    finally:
        (directory / "away").rename(directory / "langdc")
    result = CliRunner().invoke(
        app, ["run", "tome", "--model", "zoo:scenes-segmenter", "--input", str(animation), "--prompt", "x"]
    )
    assert result.exit_code == 2 and "question about a clip" in result.output


def test_a_strip_has_a_column_for_each_frame():
    pictures = [Image.new("RGB", (40, 30), (200, 0, 0)) for _ in range(4)]
    made = np.asarray(strip([pictures, pictures], [(0, 2, "red disc left ."), (2, 2, "nothing .")]))
    assert made.shape[1] == 6 + 4 * 46 and made.shape[0] > 2 * 36
    red = (made == (200, 0, 0)).all(-1)
    assert red.sum() == 8 * 40 * 30
    below = made[6 + 2 * 36 :]
    assert (below.max(-1) < 60).any()
