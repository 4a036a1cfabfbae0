"""AdaDec's threshold for the zoo's code model: it is that model's, and is found without being named."""

from __future__ import annotations

import pytest
import torch

from pertoken.decode.adadec import AdaDec, Threshold
from pertoken.models.load import load
from pertoken.models.signature import signature
from pertoken.zoo.pausing import PAUSES


@pytest.mark.parametrize("name", PAUSES)
def test_the_packaged_threshold_was_learnt_on_its_model(name):
    recipe = PAUSES[name]
    found = Threshold.load(recipe.kept)
    model, tokenizer = load(f"zoo:{recipe.model}", "fp32")
    assert found.model == signature(model)
    assert found.slope < 0 and 0 < found.entropy < 8 and found.steps == recipe.steps * (recipe.length - recipe.given)
    decoder = AdaDec()
    batch = tokenizer(
        ["def parse(text):\n    ", "class Tree:\n    def __init__(self"], return_tensors="pt", padding=True
    )
    torch.set_num_threads(1)
    out = model.generate(**batch, custom_generate=decoder, max_new_tokens=12, do_sample=False)
    assert out.shape[1] > batch["input_ids"].shape[1] and decoder.stats.pauses > 0
    assert 0 < found.pauses < 0.5
