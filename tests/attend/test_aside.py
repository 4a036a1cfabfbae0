"""Keys set aside in decoding: the same output as keys gathered anew, whatever happens to the rows in between."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from pertoken.attend import aside
from pertoken.attend.aside import Aside
from pertoken.attend.block_topk import BlockTopK
from pertoken.attend.dma import DMA
from pertoken.attend.random_keys import RandomKeys
from pertoken.attend.selection import SITE
from pertoken.attend.sink_window import SinkWindow
from pertoken.attend.tokenselect import TokenSelect
from pertoken.core.attach import attach
from pertoken.core.budget import Budget

torch.set_num_threads(1)
FEW = {"budget": Budget(tokens=5), "sinks": 2, "recent": 3, "run": 4}
POLICIES = {
    "votes": TokenSelect(**FEW, reuse=2.0),
    "reuses": TokenSelect(**FEW, reuse=-1.0),
    "original": TokenSelect(**FEW, reuse=0.5, positions="original"),
    "a share": TokenSelect(**(FEW | {"budget": Budget(fraction=0.4)})),
    "of each key head": BlockTopK(**FEW, page=2),
    "random": RandomKeys(**FEW),
    "window": SinkWindow(**FEW),
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def prompts(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 61, (3, 30), generator=generator)
    mask = torch.stack([torch.arange(30) >= 30 - n for n in (30, 4, 17)]).long()
    return ids * mask, mask


def steps(model, policy, monkeypatch, worth, between=lambda step, cache, mask: mask, **given):
    """Logits of 14 tokens after a ragged prompt; `between` may change the cache, and returns the mask."""
    monkeypatch.setattr(aside, "WORTH", worth)
    ids, mask = prompts()
    cache, found = DynamicCache(config=model.config), []
    with torch.inference_mode(), attach(model, policy, **given) as attached:
        for step in range(14):
            if step:
                mask = between(step, cache, mask)
                ids = torch.full((len(mask), 1), 2 + 3 * step) + torch.arange(len(mask))[:, None]
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            out = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
            found.append(out.logits[:, -1])
        held = [state.get("aside") for state in attached.state.get(SITE, {}).values()]
    return torch.cat(found), held


@pytest.mark.parametrize("name", POLICIES)
def test_as_if_gathered_anew(model, monkeypatch, name):
    wanted, none = steps(model, POLICIES[name], monkeypatch, 10**9)
    found, held = steps(model, POLICIES[name], monkeypatch, 0)
    assert all(one is None for one in none) and all(isinstance(one, Aside) for one in held)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", POLICIES)
def test_rows_reordered_dropped_and_taken_back(model, monkeypatch, name):
    def between(step, cache, mask):
        if step in (3, 9):  # a beam search
            order = torch.tensor([2, 0, 2] if step == 3 else [1, 1, 0])
            cache.reorder_cache(order)
            mask = mask[order]
        if step == 6:  # tokens taken back
            cache.crop(-2)
            mask = mask[:, :-2]
        if step == 11:  # a row is done
            cache.batch_select_indices(torch.tensor([0, 2]))
            mask = mask[[0, 2]]
        return mask

    wanted, _ = steps(model, POLICIES[name], monkeypatch, 10**9, between)
    found, _ = steps(model, POLICIES[name], monkeypatch, 0, between)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_mask_of_a_layer_goes_with_its_keys(model, monkeypatch):
    torch.manual_seed(0)
    policy = DMA(budget=Budget(tokens=6), run=4)
    wanted, _ = steps(model, policy, monkeypatch, 10**9)
    found, _ = steps(model, policy, monkeypatch, 0)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_only_new_columns_are_copied(model, monkeypatch):
    copied = []
    fetch = Aside.fetch

    def counted(self, view, index, free, new):
        copied.append(int(new.sum()))
        return fetch(self, view, index, free, new)

    monkeypatch.setattr(Aside, "fetch", counted)
    steps(model, SinkWindow(**FEW), monkeypatch, 0)
    first, later = copied[:2], copied[2:]  # two layers; a window moves by one key in each of three rows
    assert min(first) > 15 and max(later) == 3


def test_memory_that_was_never_written_changes_nothing(model, monkeypatch):
    made = torch.Tensor.new_zeros

    def poisoned(self, *shape, **given):
        found = made(self, *shape, **given)
        return found.fill_(1e30) if found.is_floating_point() and found.ndim == 4 else found

    wanted, _ = steps(model, POLICIES["votes"], monkeypatch, 0)
    monkeypatch.setattr(torch.Tensor, "new_zeros", poisoned)
    found, _ = steps(model, POLICIES["votes"], monkeypatch, 0)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_steps_in_and_out_of_inference_mode(model, monkeypatch):
    monkeypatch.setattr(aside, "WORTH", 0)
    ids, mask = prompts()
    with attach(model, POLICIES["votes"]), torch.no_grad():
        with torch.inference_mode():
            cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
            mask = torch.cat([mask, mask.new_ones(3, 1)], 1)
            model(ids[:, :1] + 2, attention_mask=mask, past_key_values=cache)
        mask = torch.cat([mask, mask.new_ones(3, 1)], 1)
        out = model(ids[:, :1] + 2, attention_mask=mask, past_key_values=cache)
    assert out.logits.isfinite().all()
