"""Reduced images in a language model: virtual unmerging, closed-up sequences, the compact cache."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache

from pertoken.core.attach import attach
from pertoken.core.budget import Budget
from pertoken.core.errors import BadRequest
from pertoken.core.fingerprint import fingerprint
from pertoken.reduce.compact import CompactLayer
from pertoken.reduce.dymu import DyMU
from pertoken.reduce.language import REPORT
from pertoken.reduce.random_pruning import RandomPruning
from pertoken.reduce.thresholds import Thresholds, calibrate
from pertoken.reduce.tome import ToMe
from tests.reduce.families import IMAGE, PATCHES, TEXTS, images, llava, prompts

HALF = Budget(fraction=0.4)


@pytest.fixture(scope="module")
def model():
    return llava()


@pytest.fixture(scope="module")
def thresholds(model):
    return calibrate(model, [images(8, seed=9)], fractions=(0.3, 0.5))


def logits(model, given):
    mask = given["attention_mask"]
    with torch.inference_mode():
        return model(**given, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits


def written(model, given, **options):
    with torch.inference_mode():
        out = model.generate(**given, max_new_tokens=6, do_sample=False, suppress_tokens=[IMAGE], **options)
    return out[:, given["input_ids"].shape[1] :]


def only(given, row):
    """A row by itself, without its padding."""
    kept = given["attention_mask"][row].bool()
    pictures = slice(0, 1) if row == 0 else slice(1, 3)
    return {
        "input_ids": given["input_ids"][row : row + 1, kept],
        "attention_mask": given["attention_mask"][row : row + 1, kept],
        "pixel_values": given["pixel_values"][pictures],
    }


@pytest.mark.parametrize("policy", [ToMe(Budget.full()), ToMe(r=0)], ids=["full", "r=0"])
def test_nothing_merged_is_the_model_bit_by_bit(model, policy):
    expected, said, before = logits(model, prompts()), written(model, prompts()), fingerprint(model, deep=True)
    with attach(model, policy):
        assert torch.equal(logits(model, prompts()), expected)
        assert torch.equal(written(model, prompts()), said)
    assert fingerprint(model, deep=True) == before


def test_a_threshold_of_one_is_the_model_bit_by_bit(model, thresholds):
    off = Thresholds((0.5,), ((1.0,) * thresholds.layers,), PATCHES, thresholds.model, 1)
    expected = logits(model, prompts())
    with attach(model, DyMU(Budget(fraction=0.5), off)):
        assert torch.equal(logits(model, prompts()), expected)


@pytest.mark.parametrize("unmerge", ["fast", "exact", None])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_ragged_batch_is_each_row_alone(model, thresholds, unmerge, side):
    given = prompts(side)
    with attach(model, DyMU(HALF, thresholds=thresholds, unmerge=unmerge)) as attached:
        together = logits(model, given)
        assert len(set(attached.state[REPORT]["kept"])) > 1
        for row in range(2):
            alone = logits(model, only(given, row))[0]
            ids = given["input_ids"][row][given["attention_mask"][row].bool()]
            own = together[row][given["attention_mask"][row].bool()]
            assert torch.allclose(own[ids != IMAGE], alone[ids != IMAGE], atol=1e-3)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("unmerge", ["fast", None])
def test_writing_with_a_compact_cache_is_reading_it_all_again(text, tower, unmerge):
    model = llava(text, tower)
    for policy in (ToMe(HALF, unmerge=unmerge), RandomPruning(HALF, unmerge=unmerge)):
        with attach(model, policy):
            said = written(model, prompts())
            assert torch.equal(said, written(model, prompts(), use_cache=False))
            assert torch.equal(said[0], written(model, only(prompts(), 0))[0])
            written(model, prompts(), num_beams=2)


def test_the_two_forms_agree(model, thresholds):
    found = []
    for unmerge in ("fast", "exact"):
        with attach(model, DyMU(HALF, thresholds=thresholds, unmerge=unmerge)):
            found.append(logits(model, prompts()))
    assert torch.allclose(*found, atol=1e-4)


def test_one_layer_reads_as_if_features_had_been_put_back(thresholds):
    """Text reads merged tokens at all of their places; nothing is averaged where a token stands once."""
    one = llava(layers=1)
    given = prompts()
    policy = ToMe(HALF)
    with torch.inference_mode(), attach(one, policy):
        found = logits(one, given)
        features = one.model.get_image_features(given["pixel_values"]).pooler_output
    spots = given["input_ids"] == IMAGE
    embeds = one.get_input_embeddings()(given["input_ids"]).detach().clone()
    embeds[spots] = torch.cat(features).clone()
    mask = given["attention_mask"]
    with torch.inference_mode():
        out = one.model.language_model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)
        )
        expected = one.lm_head(out.last_hidden_state)
    text = mask.bool() & ~spots
    assert torch.allclose(found[text], expected[text], atol=1e-4)


def test_the_cache_holds_each_token_once(model):
    given = only(prompts(), 0)
    kept = 64 * 0.4
    with torch.inference_mode(), attach(model, ToMe(HALF)):
        cache = model(**given, use_cache=True).past_key_values
        full = given["input_ids"].shape[1]
        assert cache.get_seq_length() == full
        layer = cache.layers[0]
        assert isinstance(layer, CompactLayer) and layer.keys.shape[-2] == full - PATCHES + round(kept)
        step = {"input_ids": torch.tensor([[7]]), "past_key_values": cache}
        mask = torch.ones(1, full + 1, dtype=torch.long)
        first = model(**step, attention_mask=mask).logits
        cache.crop(-1)
        assert cache.get_seq_length() == full
        assert torch.equal(model(**step, attention_mask=mask).logits, first)
        with pytest.raises(BadRequest, match="cannot be taken back"):
            cache.crop(-40)


def test_several_turns_go_on_from_one_cache(model):
    given = only(prompts(), 1)
    more = torch.tensor([[9, 11, 13]])
    with torch.inference_mode(), attach(model, ToMe(HALF)):
        cache = model(**given, use_cache=True).past_key_values
        mask = torch.ones(1, given["input_ids"].shape[1] + 3, dtype=torch.long)
        found = model(input_ids=more, past_key_values=cache, attention_mask=mask).logits
        whole = {
            "input_ids": torch.cat([given["input_ids"], more], 1),
            "attention_mask": mask,
            "pixel_values": given["pixel_values"],
        }
        expected = model(**whole).logits[:, -3:]
    assert torch.allclose(found, expected, atol=1e-4)


def test_text_alone_is_the_model_itself(model):
    given = {"input_ids": torch.tensor([[1, 5, 9]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    expected = logits(model, given)
    with attach(model, ToMe(HALF)):
        assert torch.equal(logits(model, given), expected)


def test_training_reaches_the_features(model):
    given = prompts()
    with attach(model, ToMe(HALF), training=True):
        out = model(**given, labels=given["input_ids"], use_cache=False)
        out.loss.backward()
    weights = model.model.multi_modal_projector.linear_1.weight
    assert weights.grad is not None and weights.grad.isfinite().all() and weights.grad.abs().sum() > 0
    model.zero_grad()


def test_bf16_runs(thresholds):
    low = llava().bfloat16()
    given = prompts() | {"pixel_values": images(3).bfloat16()}
    with attach(low, ToMe(HALF)):
        assert logits(low, given).isfinite().all()


def test_bad_input_is_refused_in_a_sentence(model):
    with pytest.raises(BadRequest, match="unmerge="):
        ToMe(unmerge="slow")
    several = llava(vision_feature_layer=[-2, -1])
    with pytest.raises(BadRequest, match="one vision_feature_layer"), attach(several, ToMe()):
        pass
    with torch.inference_mode(), attach(model, ToMe(HALF)):
        given = prompts()
        spread_out = given["input_ids"].clone()
        spread_out[0, -1], spread_out[1, 3] = IMAGE, 5
        with pytest.raises(BadRequest, match="spread over several rows"):
            model(**given | {"input_ids": spread_out})
        with pytest.raises(BadRequest, match="got -1"):
            model(**given, vision_feature_layer=-1)
        static = StaticCache(config=model.config, max_cache_len=200)
        with pytest.raises(BadRequest, match="DynamicCache"):
            model(**given, past_key_values=static, use_cache=True)
        begun = model(input_ids=torch.tensor([[1], [1]]), past_key_values=DynamicCache(), use_cache=True)
        with pytest.raises(BadRequest, match="the first forward"):
            longer = torch.cat([torch.ones(2, 1, dtype=torch.long), given["attention_mask"]], 1)
            model(**given | {"attention_mask": longer}, past_key_values=begun.past_key_values)
        outside = None
    with torch.inference_mode():
        outside = {"image": model.model.get_image_features(given["pixel_values"])}
    with torch.inference_mode(), attach(model, ToMe(HALF)), pytest.raises(BadRequest, match="without the policy"):
        model(input_ids=given["input_ids"], mm_encoder_outputs=outside)
