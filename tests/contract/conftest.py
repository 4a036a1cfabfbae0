"""Tiny random models of every family, and every registered method as a parameter. Nothing here names a method."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from pertoken.core.attach import active, attach
from pertoken.core.card import card, cards
from pertoken.core.errors import BadRequest
from pertoken.decode import make
from pertoken.methods import load_methods
from pertoken.models.adapter import adapter_for
from pertoken.models.kind import draft_kind, kind_of

transformers.logging.set_verbosity_error()
load_methods()

VOCABULARY = 61
END = 1
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": END,
    "eos_token_id": END,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": lambda layers: LlamaForCausalLM(LlamaConfig(**COMMON, num_hidden_layers=layers)),
    "qwen3": lambda layers: Qwen3ForCausalLM(Qwen3Config(**COMMON, num_hidden_layers=layers)),
    "mistral": lambda layers: MistralForCausalLM(MistralConfig(**COMMON, num_hidden_layers=layers, sliding_window=9)),
    "gemma": lambda layers: GemmaForCausalLM(GemmaConfig(**COMMON, num_hidden_layers=layers)),
    "gemma2": lambda layers: Gemma2ForCausalLM(Gemma2Config(**COMMON, num_hidden_layers=layers, sliding_window=9)),
    "gpt2": lambda layers: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=layers,
            n_head=4,
            n_positions=256,
            initializer_range=0.3,
            bos_token_id=END,
            eos_token_id=END,
            pad_token_id=0,
        )
    ),
}
LAYERS = 4
DECODERS = [name for name, one in cards().items() if one.shape == "decoder" and one.question == "decode"]
LOSSLESS = [name for name in DECODERS if card(name).exactness == "lossless"]
POLICIES = [name for name, one in cards().items() if one.shape == "policy" and not one.needs & {"image", "video"}]


def built(name):
    """A policy at a setting under which it decides something about a dozen tokens."""
    build = card(name).build
    return build(**getattr(build, "small", {}))


def decoder_of(name, drafts):
    """A decoder with the draft of the kind it needs, at a setting under which it decides something."""
    kind = draft_kind(card(name).needs)
    return make(name, draft=drafts.get(kind), **getattr(card(name).build, "small", {}))


def attachable(model, policy):
    """Skips where a policy of keys has nothing to decide: the model reads both ways, through windows alone (unless it
    adds keys), or has no rotation to take off keys that are to be turned anew. There it must refuse in a sentence and
    leave nothing; anywhere else a refusal is a failure."""
    adapter = adapter_for(model)
    windows = all(adapter.window(layer) is not None for layer in range(adapter.depth))
    reasons = {
        "reads in both directions": kind_of(model) != "causal",
        "sliding window": windows and "passes" not in policy.writes,
        "learned positions": getattr(policy, "compact", False) and model.config.model_type == "gpt2",
    }
    reason = next((name for name, true in reasons.items() if true), None)
    if "keys read" not in policy.writes or reason is None:
        with attach(model, policy):
            return
    with pytest.raises(BadRequest, match=reason), attach(model, policy):
        pass
    assert not active(model)
    pytest.skip(f"{type(policy).__name__} chooses keys; {reason}")


@pytest.fixture(autouse=True)
def set_aside(monkeypatch):
    """Small models set aside what they read too."""
    monkeypatch.setattr("pertoken.attend.aside.WORTH", 0)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="session")
def target(family):
    torch.manual_seed(1)
    return FAMILIES[family](LAYERS).eval()


@pytest.fixture(scope="session")
def draft(family, target):
    """A draft that is often right: the target itself with noise on its weights."""
    torch.manual_seed(1)
    model = FAMILIES[family](LAYERS).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.06 * weight.std())
    return model


@pytest.fixture(scope="session")
def drafts(family, draft):
    """A draft of every kind: `draft`, and the same weights reading both ways, with a mask token."""
    filler = FAMILIES[family](LAYERS).eval()
    filler.load_state_dict(draft.state_dict())
    filler.config.is_causal, filler.config.mask_token_id, filler.config.prediction_shift = False, VOCABULARY - 1, 1
    return {"causal": draft, "diffusion": filler}


@pytest.fixture(scope="session")
def prompts():
    """Five ragged prompts, left-padded: ids and mask `[5, 14]`; a repetition in each gives n-grams something to
    find."""
    generator = torch.Generator().manual_seed(5)
    rows, mask = torch.zeros(5, 14, dtype=torch.long), torch.zeros(5, 14, dtype=torch.long)
    for row, length in enumerate((14, 3, 9, 1, 12)):
        ids = torch.randint(2, VOCABULARY, (length,), generator=generator)
        ids[length // 2 + 1 :] = ids[: length - length // 2 - 1]
        rows[row, 14 - length :], mask[row, 14 - length :] = ids, 1
    return rows, mask
