"""DToP and the segmenter that it works on: its definition, context, canvas, training, figures, bad input."""

from __future__ import annotations

import pytest
import torch
from transformers import ViTConfig

from pertoken.core.attach import attach
from pertoken.core.budget import Budget
from pertoken.core.errors import BadRequest
from pertoken.models.segmenter import IGNORED, PlainSegmenter, SegmenterConfig, mean_iou
from pertoken.reduce.dtop import DToP, threshold_for
from pertoken.reduce.random_finalising import RandomFinalising
from pertoken.reduce.reduction import TOKENS
from tests.reduce.families import COMMON, encoder, images, segmenter

PATCHES = 64


@pytest.fixture(scope="module", params=["atm", "linear"])
def model(request):
    return segmenter(head=request.param)


def naive(model, pixels, p0, k, freeze):
    """One image: layers on the tokens that are there, one head after the other, token by token. Returns the scores
    `[patch, class]` and the patches that reach the last head."""
    encoder, ends = model.encoder, model.config.ends
    hidden = encoder.embeddings(pixels[None])[0]
    active = list(range(PATCHES))
    canvas, scored, presence = {}, {}, None
    for index, layer in enumerate(encoder.layers):
        rows = [0, *(1 + n for n in active)]
        hidden = hidden.clone()
        hidden[rows] = layer(hidden[rows][None])[0]
        if index not in ends:
            continue
        states = hidden[[1 + n for n in active]][None]
        graded = model.heads[ends.index(index)](states, torch.ones(1, len(active), dtype=torch.bool))
        presence, easy = graded.presence_logits, {}
        for i, n in enumerate(active):
            canvas[n], scored[n] = graded.logits[0, i], graded.scores[0, i]
            value, label = float(scored[n].max()), int(scored[n].argmax())
            if value > p0:
                easy.setdefault(label, []).append((value, -n))
        if index == ends[-1]:
            break
        leave = sorted((one for own in easy.values() for one in sorted(own, reverse=True)[k:]), reverse=True)
        for _, n in leave[: len(active) - 1]:  # somebody has to stay
            active.remove(-n)
    logits = torch.stack([canvas[n] for n in range(PATCHES)])
    if freeze == "score":
        return torch.stack([scored[n] for n in range(PATCHES)]), active
    if presence is None:
        return logits.softmax(-1), active
    return presence[0].softmax(-1)[:, 0] * logits.sigmoid(), active


@pytest.mark.parametrize("freeze", ["mask", "score"])
@pytest.mark.parametrize("keep", [0, 2])
def test_it_is_its_definition(model, freeze, keep):
    pixels = images(3)
    p0 = threshold_for(model, [pixels], 0.4)
    with torch.no_grad(), attach(model, DToP(threshold=p0, keep=keep, freeze=freeze)) as attached:
        scores = model.graded(pixels)[-1].scores
        counts = attached.state[TOKENS].counts
    for row in range(3):
        with torch.no_grad():
            expected, active = naive(model, pixels[row], p0, keep, freeze)
        assert counts[row] - 1 == len(active)
        assert torch.allclose(scores[row], expected, atol=1e-4)
    assert len(set(counts)) > 1 and min(counts) < 1 + PATCHES


def test_a_threshold_of_one_is_the_segmenter_bit_by_bit(model):
    with torch.inference_mode():
        expected = model(images()).logits
        for policy in (DToP(threshold=1.0), DToP(Budget.full())):
            with attach(model, policy):
                assert torch.equal(model(images()).logits, expected)


def test_a_class_keeps_at_most_its_context(model):
    """Where all is easy, k tokens of each class go on and no others."""
    with torch.inference_mode(), attach(model, DToP(threshold=0.0, keep=3)) as attached:
        model(images())
        assert max(attached.state[TOKENS].counts) - 1 <= 3 * 5


def test_every_head_sees_the_canvas_while_training(model):
    pixels, labels = images(3), torch.randint(0, 5, (3, 32, 32))
    labels[:, :4] = IGNORED
    p0 = threshold_for(model, [pixels], 0.4)
    with attach(model, DToP(threshold=p0), training=True):
        grades = model.graded(pixels, every=True)
        assert [tuple(g.logits.shape) for g in grades] == [(3, PATCHES, 5)] * 3
        loss = model(pixels, labels=labels).loss
        loss.backward()
    for head in model.heads:
        assert any(w.grad is not None and w.grad.abs().sum() > 0 for w in head.parameters())
    assert all(w.grad is None or w.grad.isfinite().all() for w in model.parameters())
    model.zero_grad()


def test_random_finalising_leaves_what_the_budget_says(model):
    with torch.inference_mode(), attach(model, RandomFinalising(Budget(tokens=20))) as attached:
        model(images())
    assert attached.state[TOKENS].counts == (21,) * 4


def test_thresholds_are_quantiles(model):
    batches = [images(4), images(4, seed=8)]
    p0 = threshold_for(model, batches, 0.25)
    with torch.no_grad():
        seen = torch.cat([model.graded(b, every=True)[0].scores.amax(-1).flatten() for b in batches])
    assert abs(float((seen > p0).float().mean()) - 0.25) < 0.01


def test_mean_iou_is_that_of_its_definition():
    predicted, labels = torch.tensor([[0, 0, 1, 2]]), torch.tensor([[0, 1, 1, IGNORED]])
    assert mean_iou(predicted, labels, 4) == pytest.approx((1 / 2 + 1 / 2) / 2)


def test_a_segmenter_survives_its_directory(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = PlainSegmenter.from_pretrained(tmp_path).eval()
    with torch.inference_mode():
        assert torch.equal(again(images()).logits, model(images()).logits)


def test_bad_input_is_refused_in_a_sentence(model):
    with pytest.raises(BadRequest, match="PlainSegmenter"), attach(encoder("vit"), DToP()):
        pass
    with pytest.raises(BadRequest, match="freeze="):
        DToP(freeze="all")
    with pytest.raises(BadRequest, match="keep="):
        DToP(keep=-1)
    with pytest.raises(BadRequest, match="threshold="):
        DToP(threshold=-0.1)
    with pytest.raises(BadRequest, match="share="):
        threshold_for(model, [images()], 1.0)
    with pytest.raises(BadRequest, match="must ascend"):
        PlainSegmenter(SegmenterConfig(ViTConfig(**COMMON), ends=(2, 1), classes=3))
    with pytest.raises(BadRequest, match="head="):
        SegmenterConfig(ViTConfig(**COMMON), head="mlp")
