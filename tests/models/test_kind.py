from types import SimpleNamespace

import pytest

from pertoken.models.kind import KINDS, kind_needed, kind_of

CONFIGS = {
    "causal": [{}, {"is_causal": True}, {"is_causal": None}, {"stop_token_id": 0}],
    "diffusion": [{"is_causal": False}, {"is_causal": False, "stop_token_id": None}, {"model_type": "diffusion_gemma"}],
    "insertion": [{"is_causal": False, "stop_token_id": 0}],
    "image": [{"model_type": "vit"}, {"model_type": "clip_vision_model"}, {"model_type": "llava"}],
    "video": [{"model_type": "llava_next_video"}],
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_of_the_kind_its_configuration_says(kind):
    for config in CONFIGS[kind]:
        assert kind_of(SimpleNamespace(config=SimpleNamespace(**config))) == kind


def test_what_a_card_needs_names_the_kind():
    assert kind_needed({"diffusion", "filter"}) == "diffusion"
    assert kind_needed({"insertion"}) == "insertion"
    assert kind_needed({"draft"}) == kind_needed(()) == "causal"
