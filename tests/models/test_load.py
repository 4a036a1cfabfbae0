"""What cannot be loaded says what was given, what is allowed, and what to do."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaModel, OPTConfig, OPTForCausalLM

from pertoken.models import UnknownFamily, adapter_for, families, load, resolve
from pertoken.zoo import model_path
from tests.contract.conftest import COMMON

torch.set_num_threads(1)
SMALL = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}


def test_unknown_directory_is_named(tmp_path):
    with pytest.raises(ValueError, match="not-a-model") as raised:
        load(str(tmp_path / "not-a-model"))
    assert "save_pretrained" in str(raised.value) and "zoo:" in str(raised.value)


def test_directory_without_a_model_is_told_apart(tmp_path):
    with pytest.raises(ValueError, match="no usable model") as raised:
        load(str(tmp_path))
    assert str(tmp_path) in str(raised.value)


def test_directory_with_a_broken_config(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="cannot load model") as raised:
        load(str(tmp_path))
    assert str(tmp_path) in str(raised.value)


def test_directory_of_an_unknown_architecture(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "abacus"}))
    with pytest.raises(ValueError, match="abacus"):
        load(str(tmp_path))


def test_unknown_zoo_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="'no-such'") as raised:
        resolve("zoo:no-such")
    assert "code-target" in str(raised.value)
    with pytest.raises(ValueError, match="'no-such'"):
        load("zoo:no-such")


@pytest.mark.parametrize("name", ["", "..", "/"])
def test_zoo_names_are_names_not_paths(name):
    with pytest.raises(ValueError, match="unknown"):
        model_path(name)


def test_unknown_dtype_lists_the_known_ones():
    with pytest.raises(ValueError, match="'int3'") as raised:
        load("zoo:code-target", "int3")
    assert all(name in str(raised.value) for name in ("fp32", "bf16", "fp16", "auto"))


@pytest.mark.parametrize("dtype", ["fp32", torch.float32])
def test_the_zoo_model_loads_in_the_dtype_asked_for(dtype):
    model, tokenizer = load("zoo:code-target", dtype)
    assert next(model.parameters()).dtype == torch.float32 and not model.training
    assert tokenizer.padding_side == "left" and tokenizer.pad_token_id is not None
    text = "def f(x):\n    return x + 1\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        (lambda: OPTForCausalLM(OPTConfig(**SMALL, ffn_dim=8, word_embed_proj_dim=8)), "opt"),
        (lambda: BertForMaskedLM(BertConfig(**SMALL, intermediate_size=8)), "bert"),
        (lambda: torch.nn.Linear(2, 2), "Linear"),
    ],
)
def test_a_family_without_an_adapter_is_named_with_those_that_have_one(model, kind):
    with pytest.raises(UnknownFamily, match=f"'{kind}'") as raised:
        adapter_for(model())
    assert all(family in str(raised.value) for family in families())
    assert "adapter.py" in str(raised.value)


def test_a_model_without_a_head_is_refused():
    with pytest.raises(UnknownFamily, match="causal language model"):
        adapter_for(LlamaModel(LlamaConfig(**COMMON, num_hidden_layers=1)))
