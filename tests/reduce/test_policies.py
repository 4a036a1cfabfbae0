"""ToMe, DyMU and the baselines against their definitions, calibration, heads on top of them, and bad input."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    LlamaConfig,
    LlamaForCausalLM,
    SiglipConfig,
    SiglipForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from pertoken.core.attach import attach
from pertoken.core.budget import Budget
from pertoken.core.errors import BadRequest
from pertoken.models.adapter import UnknownFamily
from pertoken.models.signature import signature
from pertoken.reduce.attention_pruning import AttentionPruning
from pertoken.reduce.dymu import DyMU
from pertoken.reduce.random_pruning import RandomPruning
from pertoken.reduce.reduction import TOKENS
from pertoken.reduce.thresholds import Thresholds, calibrate
from pertoken.reduce.tome import ToMe
from tests.reduce import naive
from tests.reduce.families import COMMON, encoder, images

SMALL = 24  # 36 patches: the definitions are slow


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(1)
    from transformers import ViTModel

    return ViTModel(ViTConfig(**COMMON | {"image_size": SMALL})).eval()


def groups_of(tokens, row):
    place = tokens.place[row].tolist()
    return sorted(sorted(i for i, p in enumerate(place) if p == g) for g in set(place) - {-1})


def same(vit, policy, choose, pixels):
    with torch.no_grad(), attach(vit, policy) as attached:
        found = vit(pixels).last_hidden_state
        tokens = attached.state[TOKENS]
    for row in range(len(pixels)):
        with torch.no_grad():
            expected, groups = naive.Naive(vit).run(pixels[row], choose)
        assert groups_of(tokens, row) == sorted(map(sorted, groups))
        there = ~expected.isnan().any(-1)
        assert there.all() and torch.allclose(found[row], expected, atol=2e-5)
    return tokens


@pytest.mark.parametrize("r", [3, 8])
def test_tome_is_its_definition(vit, r):
    tokens = same(vit, ToMe(r=r), naive.tome(r), images(2, SMALL))
    assert tokens.counts[0] == 37 - 4 * r or r == 8


def test_dymu_is_its_definition(vit):
    pixels = images(3, SMALL)
    thresholds = calibrate(vit, [images(8, SMALL, seed=9)], fractions=(0.4,))
    tokens = same(vit, DyMU(Budget(fraction=0.4), thresholds), naive.dymu(thresholds.at(0.4)), pixels)
    assert len(set(tokens.counts)) > 1


def test_attention_pruning_is_its_definition(vit):
    plain = naive.Naive(vit)
    pixels = images(2, SMALL)
    with torch.no_grad(), attach(vit, AttentionPruning(r=5)):
        found = vit(pixels).last_hidden_state
    for row in range(2):
        with torch.no_grad():
            expected, _ = plain.run(pixels[row], naive.attention_pruning(plain, 5))
        assert torch.allclose(found[row], expected[~expected.isnan().any(-1)], atol=2e-5)


def test_schedules_end_at_the_budget_and_lean_as_told():
    for inflect in (-1.0, -0.3, 0.0, 1.0):
        policy = ToMe(Budget(tokens=20), inflect=inflect)
        left = [policy.left(i, 100, 12) for i in range(12)]
        taken = [a - b for a, b in zip([100, *left], left, strict=False)]
        assert left[-1] == 20 and min(taken) >= 0
        assert (taken[0] - taken[-1]) * inflect <= 0
    assert [ToMe(r=13).left(i, 196, 12) for i in (0, 11)] == [183, 40]


def test_calibrated_counts_are_near_the_target_on_new_images():
    model = encoder("vit")
    seen = [images(16, seed=s) for s in range(4)]
    thresholds = calibrate(model, seen, fractions=(0.3, 0.6))
    fresh = torch.cat([images(16, seed=100 + s) for s in range(4)])
    for fraction in (0.3, 0.45, 0.6):
        with torch.inference_mode(), attach(model, DyMU(Budget(fraction=fraction), thresholds)) as attached:
            model(fresh)
        counts = torch.tensor(attached.state[TOKENS].counts).float() - 1
        assert abs(float(counts.mean()) - 64 * fraction) < 0.08 * 64 and counts.std() > 1


def test_thresholds_survive_a_file_and_refuse_strangers(tmp_path):
    model = encoder("vit")
    thresholds = calibrate(model, [images(6)], fractions=(0.3,))
    thresholds.save(tmp_path / "t.json")
    assert Thresholds.load(tmp_path / "t.json") == thresholds
    with attach(model, DyMU(thresholds=tmp_path / "t.json")):
        model(images(2))
    other = encoder("vit", seed=2)
    with pytest.raises(BadRequest, match="calibrate again"), attach(other, DyMU(thresholds=thresholds)):
        pass
    with pytest.raises(BadRequest, match="needs thresholds"), attach(model, DyMU()):
        pass
    with pytest.raises(BadRequest, match="below the least"), attach(model, DyMU(Budget(fraction=0.1), thresholds)):
        pass
    with pytest.raises(BadRequest, match="resize"), attach(model, DyMU(Budget(fraction=0.5), thresholds)):
        model(images(1, 40), interpolate_pos_encoding=True)
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(BadRequest, match="holds no thresholds"):
        Thresholds.load(tmp_path / "t.json")
    with pytest.raises(BadRequest, match="no thresholds at"):
        Thresholds.load(tmp_path / "none.json")


def test_thresholds_between_targets_merge_between_them():
    thresholds = Thresholds((0.2, 0.6), ((0.5, 0.4), (0.9, 0.8)), 64, "x", 1)
    assert thresholds.at(0.4) == pytest.approx((0.7, 0.6))
    assert thresholds.at(1.0) == (1.0, 1.0) and thresholds.at(0.8) == pytest.approx((0.95, 0.9))


def classifiers():
    torch.manual_seed(2)
    return {
        "vit": ViTForImageClassification(ViTConfig(**COMMON, num_labels=7)),
        "dinov2": Dinov2ForImageClassification(Dinov2Config(**COMMON, mlp_ratio=2, num_labels=7)),
        "clip": CLIPForImageClassification(CLIPConfig(vision_config=COMMON, num_labels=7)),
        "siglip": SiglipForImageClassification(SiglipConfig(vision_config=COMMON, num_labels=7)),
    }


@pytest.mark.parametrize("family", ["vit", "dinov2", "clip", "siglip"])
@pytest.mark.parametrize("policy", [ToMe(), RandomPruning(), AttentionPruning()], ids=lambda p: type(p).__name__)
def test_classifiers_run_as_they_are(family, policy):
    model = classifiers()[family].eval()
    with torch.inference_mode():
        expected = model(images()).logits
        with attach(model, policy):
            found = model(images()).logits
        assert torch.equal(model(images()).logits, expected)
    assert found.shape == (4, 7) and found.isfinite().all() and not torch.equal(found, expected)


def test_two_equal_halves_merge_without_a_trace():
    """Tokens that are equal throughout are one token counted twice: the outputs are those of the whole."""
    model = encoder("siglip")
    with torch.no_grad():
        positions = model.embeddings.position_embedding.weight
        positions.view(32, 2, -1)[:, 1] = positions.view(32, 2, -1)[:, 0]
    pixels = images().view(4, 3, 8, 4, 4, 2, 4)
    pixels = pixels[..., :1, :].expand(-1, -1, -1, -1, -1, 2, -1).reshape(4, 3, 32, 32)
    with torch.inference_mode():
        expected = model(pixels)
        once = Thresholds((0.5,), ((0.9999, 1.0, 1.0, 1.0),), 64, signature(model), 1)
        with attach(model, DyMU(Budget(fraction=0.5), once)) as attached:
            found = model(pixels)
        assert attached.state[TOKENS].counts == (32,) * 4
    assert torch.allclose(found.last_hidden_state, expected.last_hidden_state, atol=1e-4)
    assert torch.allclose(found.pooler_output, expected.pooler_output, atol=1e-4)


def test_bad_input_is_refused_in_a_sentence():
    model = encoder("vit")
    with pytest.raises(BadRequest, match="attention mask"), attach(model, ToMe()):
        mask = torch.ones(2, 65, dtype=torch.long)
        mask[:, 40:] = 0
        model(images(2), attention_mask=mask)
    with pytest.raises(BadRequest, match="inflect"):
        ToMe(inflect=2)
    with pytest.raises(BadRequest, match="negative"):
        RandomPruning(r=-1)
    text = LlamaForCausalLM(
        LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    with pytest.raises(UnknownFamily, match="families with one"), attach(text, ToMe()):
        pass
    with pytest.raises(BadRequest, match="at least one"):
        calibrate(model, [])
    with pytest.raises(BadRequest, match="above 0"):
        calibrate(model, [images(2)], fractions=(0.0,))
    model.train()
    for layer in model.layers:
        layer.gradient_checkpointing = True
    with pytest.raises(BadRequest, match="checkpointing"), attach(model, ToMe(), training=True):
        model(images(2))


def test_hidden_states_may_be_asked_for_while_attached():
    """transformers then puts hooks of its own on the model, which stay."""
    model = encoder("vit")
    with torch.inference_mode(), attach(model, ToMe()):
        states = model(images(2), output_hidden_states=True).hidden_states
    assert [s.shape[1] for s in states] == [65, 57, 49, 41, 65]
    with torch.inference_mode():
        assert torch.equal(model(images(2)).last_hidden_state, encoder("vit")(images(2)).last_hidden_state)
