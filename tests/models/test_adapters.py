"""Every family that has an adapter generates as transformers does; the contract suite runs the main ones in full."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

from pertoken.decode import make
from pertoken.models.adapter import families
from tests.contract.conftest import COMMON, FAMILIES

CONFIGS = {
    "qwen2": transformers.Qwen2Config,
    "smollm3": transformers.SmolLM3Config,
    "olmo2": transformers.Olmo2Config,
    "phi3": transformers.Phi3Config,
}


def test_no_family_is_untested():
    assert set(families()) == {*FAMILIES, *CONFIGS}


@pytest.mark.parametrize("name", ["full", "chain", "del"])
@pytest.mark.parametrize("family", CONFIGS)
def test_greedy_output_is_that_of_plain_generation(family, name):
    torch.manual_seed(1)
    config = CONFIGS[family](**COMMON, num_hidden_layers=3)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    draft = copy.deepcopy(model)
    with torch.no_grad():
        for weight in draft.parameters():
            weight.add_(torch.randn_like(weight) * 0.05 * weight.std())
    ids = torch.randint(2, 61, (3, 9))
    mask = torch.ones_like(ids)
    mask[1, :4], mask[2, :7] = 0, 0
    options = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **options)
    decoder = make(name, draft=draft)
    assert torch.equal(model.generate(ids, custom_generate=decoder, **options), expected)
