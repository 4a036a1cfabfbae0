"""The boundary predictor: its network, the choice among its guesses, labels and training, each by its definition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from pertoken.attend.boundaries import Boundaries, accepted, no_longer
from pertoken.attend.boundary_training import agreement, contrast, focal, lessons, train_boundaries
from pertoken.core.errors import BadRequest
from pertoken.core.fingerprint import fingerprint

torch.set_num_threads(1)
SIZES = {
    "vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "initializer_range": 0.6, "pad_token_id": 0,
}  # fmt: skip


def llama():
    torch.manual_seed(3)
    return LlamaForCausalLM(LlamaConfig(**SIZES, max_position_embeddings=128)).eval()


def some_ids(rows, length, seed=0):
    return torch.randint(2, 61, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_the_network_is_attention_over_each_window(monkeypatch):
    torch.manual_seed(0)
    net, keys = Boundaries(8, 3, 2, 5).eval(), torch.randn(2, 17, 8)
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    attention.in_proj_weight.copy_(net.qkv.weight)
    attention.in_proj_bias.copy_(net.qkv.bias)
    attention.out_proj.load_state_dict(net.out.state_dict())
    found = net(keys)
    assert found.shape == (2, 12)
    for row in range(2):
        for place in range(3, 15):
            window = keys[row, place - 3 : place + 3][None]
            y = net.norm(attention(window, window, window)[0])[0]
            left, right = y[:3].mean(0), y[3:].mean(0)
            alike = (left @ right / (left.norm() * right.norm())).view(1)
            wanted = net.judge(torch.cat([left, right, (left - right).abs(), left * right, alike]))
            assert torch.allclose(found[row, place - 3], wanted[0], atol=1e-5)
    monkeypatch.setattr("pertoken.attend.boundaries.PIECE", 4)
    assert torch.allclose(net(keys), found, atol=1e-6)
    assert net(keys[:, :5]).shape == (2, 0)
    masked = net.places(keys, torch.tensor([0, 2]), torch.tensor([9, 99]))
    assert masked[0].isfinite().tolist() == [3 <= place <= 6 for place in range(12)]
    assert masked[1].isfinite().tolist() == [place >= 1 for place in range(12)]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(0, 5), st.integers(1, 4), st.sampled_from([-0.5, 0.4]))
def test_boundaries_are_accepted_from_the_highest_down(seed, block, spacing, most, theta):
    logits = torch.randn(2, 3 * block, generator=torch.Generator().manual_seed(seed))
    logits[0, :2] = -torch.inf
    found = accepted(logits, theta, spacing, most, block)
    for row in range(2):
        wanted = []
        for start in range(0, 3 * block, block):
            taken = []
            for place in sorted(range(start, start + block), key=lambda p: -float(logits[row, p])):
                free = all(abs(place - other) > spacing for other in taken)
                if float(logits[row, place]) > theta and free and len(taken) < most:
                    taken.append(place)
            wanted += taken
        assert found[row].nonzero().flatten().tolist() == sorted(wanted)


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(1, 9))
def test_no_chunk_is_longer(flags, longest):
    wanted, start = [], 0
    for place, flag in enumerate(flags):
        if place == 0 or flag or place - start == longest:
            wanted.append(place)
            start = place
    assert no_longer(torch.tensor([flags]), longest)[0].nonzero().flatten().tolist() == wanted


@pytest.mark.parametrize("window", [1, 3])
def test_labels_are_sums_over_rectangles(window):
    attention = torch.rand(2, 15, 15, generator=torch.Generator().manual_seed(0)).tril()
    found = contrast(attention, window)
    for row in range(2):
        for place in range(15):
            if place < window or place + window >= 15:
                assert found[row, place] == -torch.inf
                continue
            past = future = 0.0
            for i in range(place + window, 15):
                past += sum(float(attention[row, i, j]) for j in range(place - window, place))
                future += sum(float(attention[row, i, j]) for j in range(place, place + window))
            wanted = math.log(max(past, future) + 1e-6) - math.log(min(past, future) + 1e-6)
            assert float(found[row, place]) == pytest.approx(wanted, abs=1e-4)
    assert not contrast(attention[:, : 2 * window, : 2 * window], window).isfinite().any()


def test_the_loss_is_focal():
    logits, wanted = torch.tensor([[2.0, -1.0, 0.5]]), torch.tensor([[True, False, True]])
    counted = torch.tensor([[True, True, False]])
    one, two = 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-1))
    expected = (1.3 * (1 - one) ** 2 * -math.log(one) + (1 - two) ** 2 * -math.log(two)) / 2
    assert float(focal(logits, wanted, counted)) == pytest.approx(expected, rel=1e-5)
    assert float(focal(logits, wanted, counted & False)) == 0


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_lessons_are_the_models_own_attention(family):
    model = llama()
    if family == "gemma2":
        torch.manual_seed(3)
        model = Gemma2ForCausalLM(Gemma2Config(**SIZES, sliding_window=8, attn_logit_softcapping=2.0)).eval()
    model.set_attn_implementation("eager")
    ids = some_ids(2, 24)
    with torch.no_grad():
        out = model(ids, output_attentions=True, use_cache=True)
    before = fingerprint(model)
    found = list(lessons(model, ids, 3))
    assert fingerprint(model) == before
    layers = [1] if family == "gemma2" else [0, 1]
    assert len(found) == len(layers)
    for layer, (keys, ratio, counted) in zip(layers, found, strict=True):
        assert torch.equal(keys, out.past_key_values.layers[layer].keys.transpose(1, 2).flatten(2))
        wanted = contrast(out.attentions[layer].mean(1), 3)
        assert torch.allclose(ratio, wanted, atol=1e-3)
        assert counted.sum() == 2 * (24 - 12) and not counted[:, :6].any() and not counted[:, -6:].any()


def test_it_learns_where_attention_changes_and_is_kept_in_a_file(tmp_path):
    model, batches, told = llama(), [some_ids(4, 40, seed) for seed in range(5)], []
    before = fingerprint(model, deep=True)
    net = train_boundaries(
        model, batches, window=2, heads=2, hidden=16, epochs=30, lr=1e-2, progress=lambda *at: told.append(at)
    )
    assert fingerprint(model, deep=True) == before
    assert [step for step, _ in told] == list(range(1, 121)) and told[-1][1] < 0.8 * told[0][1]
    seen = agreement(net, model, batches[:4])
    assert seen["f1"] > seen["chance"] + 0.1 and 0 < seen["rate"] < 1
    assert net.about["f1"] == pytest.approx(agreement(net, model, batches[4:])["f1"], abs=1e-4)
    net.save(tmp_path / "boundaries.safetensors")
    again = Boundaries.load(tmp_path)
    keys = torch.randn(1, 12, 8)
    assert torch.equal(again(keys), net(keys)) and again.about == net.about and not again.training
    few = train_boundaries(model, batches, window=2, heads=2, hidden=4, layers=[1], steps=3, held=0)
    assert few.about == {"layers": [1], "steps": 3, "seed": 0, "theta": 0.0}


def test_what_cannot_be_is_refused_in_one_sentence(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(BadRequest, match="heads=3 does not divide"):
        Boundaries(8, heads=3)
    with pytest.raises(BadRequest, match="no boundary predictor at"):
        Boundaries.load(tmp_path / "none.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(BadRequest, match="says nothing about one"):
        Boundaries.load(tmp_path / "other.safetensors")
    for batches in ([], [some_ids(1, 16)]):
        with pytest.raises(BadRequest, match="batches and 2 layers to learn from"):
            train_boundaries(llama(), batches)
