"""Low-rank weights in PEFT's format: what is written is read again, and PEFT makes the same of it."""

from __future__ import annotations

import json

import pytest
import torch

from pertoken.core.attach import attach
from pertoken.core.errors import BadRequest
from pertoken.depth.deciders import AsGiven
from pertoken.depth.lora import Lora
from pertoken.depth.peft_files import CONFIG, load_peft, save_peft
from pertoken.depth.think_at_hard import ThinkAtHard
from tests.depth.conftest import model_of
from tests.depth.test_think_at_hard import logits, lora


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_is_written_is_read_again(tmp_path, prompts, name):
    model = model_of(name)
    made = lora(model).to(torch.bfloat16).float()
    save_peft(made, model, tmp_path)
    found = load_peft(tmp_path, model)
    assert found.scale == made.scale and set(found.shapes) == set(made.shapes)
    twice = AsGiven(torch.full((5, 14), 2))
    sides = []
    for weights in (made, found):
        with torch.inference_mode(), attach(model, ThinkAtHard(decider=twice, lora=weights)):
            sides.append(logits(model, *prompts))
    assert torch.equal(*sides)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_peft_makes_the_same_of_it(tmp_path, prompts, name):
    peft = pytest.importorskip("peft")
    model, other = model_of(name), model_of(name)
    made = lora(model).to(torch.bfloat16).float()
    save_peft(made, model, tmp_path)
    made.merge(model)
    theirs = peft.PeftModel.from_pretrained(other, str(tmp_path)).eval()
    with torch.no_grad():
        assert torch.allclose(logits(theirs, *prompts), logits(model, *prompts), atol=1e-4)


def test_what_is_no_plain_lora_or_does_not_fit_is_refused(tmp_path):
    model = model_of("llama")
    save_peft(lora(model), model, tmp_path)
    with pytest.raises(BadRequest, match=r"has no adapter_config\.json"):
        load_peft(tmp_path / "nowhere", model)
    with pytest.raises(BadRequest, match="which is no low-rank weight of the layers"):
        load_peft(tmp_path, model_of("llama", layers=2))
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {"r": 3}))
    with pytest.raises(BadRequest, match=r"this model needs \[3, 48\] and \[32, 3\]"):
        load_peft(tmp_path, model)
    (tmp_path / CONFIG).write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(BadRequest, match="with use_dora; only plain LoRA"):
        load_peft(tmp_path, model)
    with pytest.raises(BadRequest, match="were trained for the model with signature"):
        save_peft(Lora.for_model(model_of("llama", seed=3)), model, tmp_path)
