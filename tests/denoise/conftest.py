"""Tiny bidirectional models of every family, with random weights."""

from __future__ import annotations

import pytest
import torch

from tests.contract.conftest import FAMILIES

torch.set_num_threads(1)
MASK, END = 60, 1


def bidirectional(family: str, layers: int = 3, seed: int = 1):
    """A random model of the family that reads both ways, whose mask token is `MASK`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # whatever ran before
        model = FAMILIES[family](layers).eval()
    model.config.is_causal, model.config.mask_token_id = False, MASK
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


@pytest.fixture(scope="session")
def models():
    return {family: bidirectional(family) for family in FAMILIES}


@pytest.fixture(scope="session")
def model(models):
    return models["llama"]


def prompts(*lengths: int, seed: int = 0):
    """Left-padded prompts of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.randint(2, MASK, (len(lengths), width), generator=generator)
    mask = torch.stack([torch.arange(width) >= width - length for length in lengths]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def fill(model, inputs, decoder, length=16, **options):
    """The canvas that the decoder fills in, `[row, length]`."""
    options = {"do_sample": False} | options
    out = model.generate(**inputs, max_new_tokens=length, custom_generate=decoder, **options)
    return out[:, inputs["input_ids"].shape[1] :]


def alone(inputs, row):
    """One row without its padding."""
    kept = inputs["attention_mask"][row].bool()
    return {name: value[row, kept][None] for name, value in inputs.items()}
