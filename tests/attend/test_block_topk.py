"""BlockTopK against a transcription with loops, and the summaries that it keeps against summaries made anew."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

from pertoken.attend.block_topk import BlockTopK
from pertoken.core.attach import attach
from pertoken.core.budget import Budget
from pertoken.core.errors import BadRequest
from tests.attend.test_tokenselect import Watched, batch, coarse, llama, read, turned

torch.set_num_threads(1)
SMALL = BlockTopK(Budget(tokens=7), sinks=2, recent=3, run=4, page=3)


def paged(policy, view, row, run, group) -> set[int]:
    """The best pages of a key head, one page, head and dimension at a time, until the budget is spent."""
    candidates = view.kept.candidates[row, run].nonzero().flatten().tolist()
    limit = int(policy.limits(view.kept)[row, run])
    own = [q for q in range(view.runs.length) if view.runs.real[row, run, q]]
    pages = [candidates[at : at + policy.page] for at in range(0, len(candidates), policy.page)]
    scores = []
    for page in pages:
        keys = view.keys[row, group, page]
        heads = []
        for head in (2 * group, 2 * group + 1):
            asked = sum(turned(view.rotary, view.queries[row, head, run, q], policy.recent + q) for q in own) / len(own)
            if policy.summary == "mean":
                heads.append(float(keys.mean(0) @ asked))
            else:
                bound = [max(q * keys[:, d].max(), q * keys[:, d].min()) for d, q in enumerate(asked)]
                assert sum(bound) >= (keys @ asked).max() - 1e-4
                heads.append(float(sum(bound)))
        scores.append(max(heads))
    order = sorted(range(len(pages)), key=lambda p: (-coarse(scores[p]), -p))
    return set([key for p in order for key in pages[p]][:limit])


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("summary", ["bound", "mean"])
@pytest.mark.parametrize("budget", [Budget(tokens=7), Budget(fraction=0.3)], ids=str)
def test_reads_the_best_pages(summary, positions, budget):
    policy = replace(SMALL, summary=summary, positions=positions, budget=budget)
    model, (ids, mask), checked = llama(), batch([26, 15, 22]), 0
    with Watched(model, policy) as watched:
        model.generate(ids, attention_mask=mask, max_new_tokens=8)
    for (_, view), decision in zip(watched.views, watched.decisions, strict=True):
        for row in range(len(ids)):
            for run in range(view.runs.count):
                candidates = set(view.kept.candidates[row, run].nonzero().flatten().tolist())
                if not candidates or not view.runs.real[row, run].any():
                    continue
                for group in range(2):
                    index = decision.index[row, group if decision.index.shape[1] > 1 else 0, run]
                    found = set(index[index >= 0].tolist()) & candidates
                    assert found == paged(policy, view, row, run, group)
                    checked += math.ceil(len(candidates) / 3) > 1
    assert checked > 40


def test_summaries_are_kept_and_made_anew_when_rows_move(monkeypatch):
    """What is summarised per step is a page or two, until rows are reordered; what is read is the same either way."""
    made, summaries = [], BlockTopK.summaries

    def counted(self, keys, columns, real):
        made.append(columns.flatten(1).shape[1])
        return summaries(self, keys, columns, real)

    monkeypatch.setattr(BlockTopK, "summaries", counted)
    model, (ids, _) = llama(layers=1), batch([50, 50], seed=1)
    tokens = [torch.tensor([[n], [n + 20]]) for n in (3, 8, 5, 9)]
    with attach(model, SMALL), torch.inference_mode():
        cache = DynamicCache()
        model(ids, past_key_values=cache)
        made.clear()
        kept = [model(token, past_key_values=cache).logits for token in tokens[:3]]
        assert max(made) <= 2 * SMALL.page
        cache.reorder_cache(torch.tensor([1, 0]))
        made.clear()
        moved = model(tokens[3], past_key_values=cache).logits
        assert max(made) > 30
    with attach(model, SMALL) as attached, torch.inference_mode():
        cache = DynamicCache()
        model(ids, past_key_values=cache)
        for token, wanted in zip(tokens[:3], kept, strict=True):
            attached.reset()
            assert torch.equal(model(token, past_key_values=cache).logits, wanted)
        cache.reorder_cache(torch.tensor([1, 0]))
        attached.reset()
        assert torch.equal(model(tokens[3], past_key_values=cache).logits, moved)


def test_chunks_of_whole_runs_are_the_whole():
    model, (ids, mask) = llama(), batch([33])
    with torch.inference_mode(), attach(model, SMALL):
        whole = model(ids, attention_mask=mask).logits
        cache, parts = DynamicCache(), []
        for at, stop in ((0, 8), (8, 20), (20, 33)):
            parts.append(model(ids[:, at:stop], attention_mask=mask[:, :stop], past_key_values=cache).logits)
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-4)


def test_pages_of_one_key_are_the_keys_themselves():
    """A bound over one key is its score, and so is its mean."""
    model, (ids, mask) = llama(), batch([30, 21])
    read_by = []
    for summary in ("bound", "mean"):
        with Watched(model, replace(SMALL, page=1, summary=summary)) as watched, torch.inference_mode():
            model(ids, attention_mask=mask)
        read_by.append([read(d, row, -1) for d in watched.decisions for row in range(2)])
    assert read_by[0] == read_by[1]


def test_wrong_settings_say_what_is_allowed():
    for wrong in ({"summary": "none"}, {"page": 0}):
        with pytest.raises(BadRequest, match=str(next(iter(wrong)))):
            BlockTopK(**wrong)
