"""`pertoken run` on pictures: what is read, what is refused, and the figures and drawings that come of it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import PvtV2Config, ViTConfig, ViTForImageClassification
from typer.testing import CliRunner

from pertoken.bench.picture_run import look
from pertoken.cli import app
from pertoken.core.errors import BadRequest
from pertoken.models.edges import Gate
from pertoken.models.grid import GridClassifier, GridConfig
from pertoken.models.images import ImageModel, pictures_in, read_picture
from pertoken.reduce.thresholds import calibrate
from pertoken.view.regions import page, regions
from pertoken.zoo.scenes import scene
from tests.reduce.families import COMMON


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(2)
    ViTForImageClassification(ViTConfig(**COMMON, num_labels=5)).save_pretrained(path)
    return path


@pytest.fixture
def folder(tmp_path):
    for seed in (3, 10):
        Image.fromarray(scene(seed).pixels).save(tmp_path / f"{seed}.png")
    (tmp_path / "notes.txt").write_text("not a picture")
    return tmp_path


def test_methods_stand_beside_the_dense_model(directory, folder):
    found = look(["dymu", "tome", "random_pruning"], str(directory), folder)
    assert [one.name for one in found.sides] == ["dense", "dymu", "tome", "random_pruning"]
    dense, dymu, tome, _ = found.sides
    assert dense.agreement == pytest.approx(1, abs=1e-5) and tome.tokens == [32, 32]
    assert dymu.flops < dense.flops and len(set(dymu.tokens)) == 2 and "calibrated on these 2" in found.note
    for side in (dymu, tome):
        for tokens, sizes in zip(side.tokens, side.regions, strict=True):
            assert tokens - len(sizes) + sum(sizes) == 64
    assert len(found.drawn) == 6 and "10.png" in found.drawn[0][1]
    json.dumps(found.to_json())


def test_routing_stands_beside_the_whole_grid(folder, tmp_path):
    torch.manual_seed(0)
    small = PvtV2Config(
        image_size=32,
        num_encoder_blocks=2,
        depths=(1, 1),
        sr_ratios=(2, 1),
        hidden_sizes=(8, 16),
        patch_sizes=(7, 3),
        strides=(4, 2),
        num_attention_heads=(1, 2),
        mlp_ratios=(2, 2),
    )
    model = GridClassifier(GridConfig(small, 3, id2label={0: "cat", 1: "dog"}))
    for gate in model.gates.modules():
        if isinstance(gate, Gate):
            gate.mean_weight.normal_()
            gate.mean_bias.zero_()
    model.save_pretrained(tmp_path / "grid")
    page_at = tmp_path / "ways.html"
    asked = ["run", "dit_routing", "static_routing", "--model", str(tmp_path / "grid"), "--input", str(folder)]
    result = CliRunner().invoke(app, [*asked, "--html", str(page_at)])
    assert result.exit_code == 0, result.output
    assert "classes" in result.output and page_at.read_text().count("data:image/png;base64") == 4
    dense, routed, static = look(["dit_routing", "static_routing"], str(tmp_path / "grid"), folder).sides
    assert dense.cost == pytest.approx([model.whole] * 2, rel=1e-5) and set(dense.labels) <= {"cat", "dog"}
    assert all(0 < cost < model.whole for cost in routed.cost) and routed.flops < dense.flops
    assert all(0 < cost <= 1 + 1e-6 for cost in static.cost)
    with pytest.raises(BadRequest, match="zoo:scenes-grid-routed"):
        look(["dit_routing"], "zoo:scenes-classifier", folder)


def test_thresholds_beside_a_model_are_used(directory, folder, tmp_path):
    host = ImageModel(str(directory))
    kept = directory / "thresholds.json"
    calibrate(host.model, [torch.randn(4, 3, 32, 32)], fractions=(0.3,)).save(kept)
    try:
        assert "beside the model" in look(["dymu"], str(directory), folder / "3.png").note
    finally:
        kept.unlink()


def test_the_command_draws_a_page(directory, folder, tmp_path):
    page_at = tmp_path / "out" / "regions.html"
    asked = ["run", "tome", "--model", str(directory), "--input", str(folder), "--html", str(page_at), "--json"]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 0, result.output
    assert "data:image/png;base64" in page_at.read_text() and '"speedup"' in result.output


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK", "I;16"])
def test_every_kind_of_picture_is_read_as_rgb(mode, tmp_path):
    name = tmp_path / ("a.tif" if mode in ("CMYK", "I;16") else "a.png")
    base = Image.new("RGB", (20, 10), (200, 30, 40))
    (Image.new(mode, (20, 10), 700) if mode == "I;16" else base.convert(mode)).save(name)
    found = read_picture(name)
    assert found.shape == (10, 20, 3) and found.dtype == np.uint8


def test_what_is_transparent_is_white(tmp_path):
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "a.png")
    assert (read_picture(tmp_path / "a.png") == 255).all()


def test_bad_input_is_refused_in_a_sentence(directory, folder, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\nno")
    with pytest.raises(BadRequest, match="cannot be read as a picture"):
        read_picture(broken)
    with pytest.raises(BadRequest, match="no picture at"):
        pictures_in(tmp_path / "none.png")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(BadRequest, match="no picture at"):
        pictures_in(empty)
    Image.new("RGB", (5, 40)).save(tmp_path / "thin.png")
    with pytest.raises(BadRequest, match="two patches"):
        look(["tome"], str(directory), tmp_path / "thin.png")
    with pytest.raises(BadRequest, match="does not work on images"):
        look(["dyspec"], str(directory), folder / "3.png")
    with pytest.raises(BadRequest, match="cannot load an image model"):
        look(["tome"], str(tmp_path / "nowhere"), folder / "3.png")
    with pytest.raises(BadRequest, match="PlainSegmenter"):
        look(["dtop"], str(directory), folder / "3.png")


def test_regions_are_drawn_where_patches_differ():
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:, 4:] = 200
    place = np.array([[0, 1], [0, -1]])
    drawn = np.asarray(regions(pixels, place))
    side = (drawn.shape[1] - 8) // 2
    right = drawn[:, side + 8 :]
    half = side // 2
    assert (right[5, half] == 255).all() and not (right[half, half // 2] == 255).all()
    assert right[half + half // 2, half + half // 2].max() < 120 < right[half // 2, half + half // 2].min()
    assert page([("tome", "a < b", None)], "t").count("a &lt; b") == 1
