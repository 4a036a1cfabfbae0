"""TokenSelect against a transcription with loops: the vote, the selection cache, rows that are moved under it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from pertoken.attend.selection import SITE
from pertoken.attend.sight import Causal
from pertoken.attend.tokenselect import TokenSelect, products
from pertoken.core.attach import attach
from pertoken.core.budget import Budget
from pertoken.core.errors import BadRequest
from pertoken.core.trace import Trace

torch.set_num_threads(1)
SMALL = TokenSelect(Budget(tokens=5), sinks=2, recent=3, run=4)


def llama(kv_heads: int = 2, layers: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def batch(lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Left-padded rows of which no token comes twice, so that keys differ wherever they stand."""
    generator = torch.Generator().manual_seed(seed)
    widest = max(lengths)
    ids = torch.stack([torch.randperm(59, generator=generator)[:widest] + 2 for _ in lengths])
    mask = torch.stack([torch.arange(widest) >= widest - n for n in lengths]).long()
    return ids * mask, mask


class Watched:
    """Queries and keys of every layer and forward, as the policy saw them, beside what was decided."""

    def __init__(self, model, policy, **given):
        self.views, self.decisions = [], []
        self.scope = attach(model, policy, **given)

    def __enter__(self):
        self.attached = self.scope.__enter__()
        decide = self.attached.decide

        def watched(site, view):
            kept = replace(view, queries=view.queries.clone(), keys=view.keys.clone(), state={})
            decision = decide(site, view)
            self.views.append((site, kept))
            self.decisions.append(decision)
            return decision

        self.attached.decide = watched
        return self

    def __exit__(self, *error):
        return self.scope.__exit__(*error)


def turned(rotary, x: Tensor, place: int) -> Tensor:
    if rotary is None:
        return x
    cos, sin = rotary.table(place + 1)
    half = len(x) // 2
    return x * cos[place] + torch.cat((-x[half:], x[:half])) * sin[place]


def elected(policy: TokenSelect, view, row: int, run: int, count: int) -> set[int]:
    """The paper's vote, one head and key at a time."""
    heads, kv_heads = view.queries.shape[1], view.keys.shape[1]
    candidates = view.kept.candidates[row, run].nonzero().flatten().tolist()
    votes = dict.fromkeys(candidates, 0.0)
    for head in range(heads):
        own = [q for q in range(view.runs.length) if view.runs.real[row, run, q]]
        asked = [turned(view.rotary, view.queries[row, head, run, q], policy.recent + q) for q in own]
        mean = sum(asked) / len(own)
        kv = head // (heads // kv_heads) if policy.groups == "division" else head % kv_heads
        scores = {j: policy.scale * float(mean @ view.keys[row, kv, j]) for j in candidates}
        if policy.vote == "soft":
            total = sum(math.exp(s - max(scores.values())) for s in scores.values())
            shares = {j: math.exp(s - max(scores.values())) / total for j, s in scores.items()}
        elif policy.vote == "sum":
            shares = scores
        else:
            favourites = sorted(candidates, key=lambda j: -scores[j])[:count]
            shares = {j: float(j in favourites) for j in candidates}
        for j in candidates:
            votes[j] += shares[j]
    return set(sorted(candidates, key=lambda j: (-coarse(votes[j]), -j))[:count])


def coarse(vote: float) -> float:
    """To 11 binary digits: below that votes are even, and the later key wins."""
    mantissa, exponent = math.frexp(vote)
    return math.ldexp(round(mantissa * 2**11), exponent)


def read(decision, row: int, run: int) -> set[int]:
    index = decision.index[row, 0, run]
    return set(index[index >= 0].tolist())


@pytest.mark.parametrize(
    "policy",
    [
        replace(SMALL, vote=vote, positions=positions, groups=groups, scale=scale, reuse=2.0)
        for vote in ("soft", "sum", "head")
        for positions in ("compact", "original")
        for groups, scale in (("division", 1.0), ("modulo", 0.3))
    ],
    ids=lambda p: f"{p.vote}-{p.positions}-{p.groups}",
)
def test_votes_as_the_paper_says(policy):
    model, (ids, mask), checked = llama(), batch([22, 13, 20]), 0
    with Watched(model, policy) as watched:
        model.generate(ids, attention_mask=mask, max_new_tokens=4)
    for (_, view), decision in zip(watched.views, watched.decisions, strict=True):
        for row in range(len(ids)):
            for run in range(view.runs.count):
                candidates = set(view.kept.candidates[row, run].nonzero().flatten().tolist())
                if len(candidates) > 5 and view.runs.real[row, run].any():
                    assert read(decision, row, run) & candidates == elected(policy, view, row, run, 5)
                    checked += 1
    assert checked > 20


def test_groups_differ_only_where_key_heads_are_shared():
    ids, mask = batch([24])
    for kv_heads, same in ((4, True), (2, False)):
        model = llama(kv_heads)
        with torch.inference_mode():
            outs = []
            for groups in ("division", "modulo"):
                with attach(model, replace(SMALL, groups=groups)):
                    outs.append(model(ids, attention_mask=mask).logits)
        assert torch.equal(*outs) == same


def test_a_head_of_large_norm_decides_the_sum_but_has_one_soft_vote():
    """Recall of the keys that heads other than a loud one attend to most."""
    model, (ids, mask) = llama(), batch([40])
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight[:8] *= 30
    hits = {}
    for vote in ("soft", "sum"):
        policy = replace(SMALL, vote=vote, run=1, positions="original")
        with Watched(model, policy) as watched, torch.inference_mode():
            model(ids, attention_mask=mask)
        hits[vote] = 0
        for (site, view), decision in zip(watched.views, watched.decisions, strict=True):
            if site != f"{SITE}.0":
                continue
            for run in range(20, 40):
                for head in range(1, 4):
                    scores = view.keys[0, head // 2] @ view.queries[0, head, run, 0]
                    scores = scores.masked_fill(~view.kept.candidates[0, run], -torch.inf)
                    hits[vote] += int(scores.argmax()) in read(decision, 0, run)
    assert hits["soft"] > hits["sum"] + 10


def decoded(policy: TokenSelect, ids: Tensor, mask: Tensor, tokens: int, model=None):
    model = model or llama()
    with Watched(model, policy) as watched:
        out = model.generate(ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False)
    return watched, out


@pytest.mark.parametrize("reuse", [-1.0, 0.3, 0.9])
@pytest.mark.parametrize("budget", [Budget(tokens=8), Budget(fraction=0.4)], ids=str)
def test_selection_cache_is_its_description(reuse, budget):
    """Algorithm 1 of the paper, row by row, with what left the window in the places of the weakest choices."""
    policy = replace(SMALL, reuse=reuse, budget=budget)
    ids, mask = batch([30, 11, 24])
    watched, _ = decoded(policy, ids, mask, 24)
    last: dict[tuple, tuple] = {}
    hits, asked = {}, {}
    for (site, view), decision in zip(watched.views, watched.decisions, strict=True):
        if view.runs.sight.queries > 1:
            continue
        for row in range(len(ids)):
            candidates = view.kept.candidates[row, 0].nonzero().flatten().tolist()
            limit = int(policy.limits(view.kept)[row, 0])
            found, query = read(decision, row, 0) & set(candidates), view.queries[row].flatten()
            assert len(found) == limit
            if limit == len(candidates):
                last.pop((site, row), None)
                continue
            asked[site] = asked.get(site, 0) + 1
            before = last.get((site, row))
            since = [] if before is None else [c for c in candidates if c > before[1]]
            if (
                before is not None
                and torch.cosine_similarity(query, before[0], dim=0) >= reuse
                and 2 * len(since) <= limit
            ):
                hits[site] = hits.get(site, 0) + 1
                assert set(since) <= found and found - set(since) <= before[2]
                continue
            assert found == elected(policy, view, row, 0, limit)
            last[site, row] = query, candidates[-1], found
    counted = policy.reused(watched.attached)
    assert {f"{SITE}.{layer}": n for layer, (_, n) in counted.items()} == asked
    assert {f"{SITE}.{layer}": n for layer, (n, _) in counted.items() if n} == hits
    assert hits or reuse == 0.9


def test_hits_fall_as_the_threshold_rises():
    ids, mask = batch([30, 24])
    shares = []
    for reuse in (-1.0, 0.2, 0.5, 0.9):
        policy = replace(SMALL, reuse=reuse)
        counted = policy.reused(decoded(policy, ids, mask, 16)[0].attached)
        shares.append(sum(h for h, _ in counted.values()) / sum(n for _, n in counted.values()))
    assert shares == sorted(shares, reverse=True) and shares[0] > 0.5 > shares[-1]
    assert not SMALL.reused(decoded(replace(SMALL, reuse=2.0), ids, mask, 4)[0].attached)


def test_a_hit_votes_for_nothing(monkeypatch):
    voted = []
    elect = TokenSelect.elect

    def counted(self, queries, *rest):
        voted.append(len(queries))
        return elect(self, queries, *rest)

    monkeypatch.setattr(TokenSelect, "elect", counted)
    policy = replace(SMALL, reuse=-1.0, budget=Budget(tokens=40), recent=1)
    decoded(policy, *batch([58, 57]), 9)
    assert voted == [2, 2, 2, 2]  # the prompt and the first token, at two layers


def test_only_rows_that_miss_vote(monkeypatch):
    """Each row votes as often in a batch as alone."""
    voted = []
    elect = TokenSelect.elect

    def counted(self, queries, *rest):
        voted.append(len(queries))
        return elect(self, queries, *rest)

    monkeypatch.setattr(TokenSelect, "elect", counted)
    policy = replace(SMALL, reuse=0.3)
    ids, mask = batch([30, 24, 18], seed=2)
    decoded(policy, ids, mask, 12)
    together, partly = sum(voted), any(0 < n < 3 for n in voted)
    voted.clear()
    for row in range(3):
        kept = mask[row].bool()
        decoded(policy, ids[row : row + 1, kept], mask[row : row + 1, kept], 12)
    assert together == sum(voted) and partly


@pytest.mark.parametrize("positions", ["compact", "original"])
def test_rows_may_be_moved_under_the_cache(positions):
    """After a reordering, as in a beam search, moved rows choose anew and rows that stayed use their choice again."""
    policy, model = replace(SMALL, reuse=-1.0, positions=positions, budget=Budget(tokens=12)), llama()
    ids, _ = batch([30, 30, 30, 30], seed=4)
    token = torch.tensor([[7], [9], [11], [13]])
    moves = torch.tensor([0, 2, 1, 1])
    with Watched(model, policy) as watched, torch.inference_mode():
        cache = DynamicCache()
        model(ids, past_key_values=cache)
        model(token, past_key_values=cache)
        cache.reorder_cache(moves)
        before = policy.reused(watched.attached)
        watched.views.clear()
        watched.decisions.clear()
        model(token, past_key_values=cache)
        after = policy.reused(watched.attached)
    for layer in (0, 1):
        assert after[layer][1] - before[layer][1] == 4 and after[layer][0] - before[layer][0] == 1
    for (_, view), decision in zip(watched.views, watched.decisions, strict=True):
        candidates = view.kept.candidates[0, 0].nonzero().flatten().tolist()
        for row in (1, 2, 3):
            assert read(decision, row, 0) & set(candidates) == elected(policy, view, row, 0, 12)


def test_dropped_rows_and_tokens_taken_back_choose_anew():
    policy, model = replace(SMALL, reuse=-1.0), llama()
    ids, _ = batch([30, 30, 30])
    with Watched(model, policy) as watched, torch.inference_mode():
        cache = DynamicCache()
        model(ids, past_key_values=cache)
        for token in ([[7], [9], [11]], [[8], [10], [12]]):
            model(torch.tensor(token), past_key_values=cache)
        hits = policy.reused(watched.attached)[1][0]
        assert hits == 3
        cache.batch_select_indices(torch.tensor([0, 2]))
        model(torch.tensor([[5], [6]]), past_key_values=cache)
        cache.crop(-2)
        model(torch.tensor([[15], [16]]), past_key_values=cache)
        assert policy.reused(watched.attached)[1] == (3, 10)


def test_beam_search_runs_and_beams_are_each_row_alone():
    model, (ids, mask) = llama(), batch([30, 17])
    given = {"num_beams": 3, "max_new_tokens": 8, "do_sample": False}
    with attach(model, replace(SMALL, reuse=0.3)):
        together = model.generate(ids, attention_mask=mask, **given)[:, ids.shape[1] :]
        for row in range(2):
            kept = mask[row].bool()
            alone = model.generate(ids[row : row + 1, kept], attention_mask=mask[row : row + 1, kept], **given)
            assert torch.equal(alone[0, int(kept.sum()) :], together[row])


@pytest.mark.parametrize("positions", ["compact", "original"])
def test_chunks_of_whole_runs_are_the_whole(positions):
    model, (ids, mask) = llama(), batch([33])
    with torch.inference_mode(), attach(model, replace(SMALL, positions=positions)):
        whole = model(ids, attention_mask=mask).logits
        cache, parts = DynamicCache(), []
        for at in (0, 8, 20):
            stop = {0: 8, 8: 20, 20: 33}[at]
            parts.append(model(ids[:, at:stop], attention_mask=mask[:, :stop], past_key_values=cache).logits)
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-4)


def test_positions_agree_while_nothing_is_left_out_and_differ_after():
    model, (ids, mask) = llama(), batch([20])
    with torch.inference_mode():
        dense = model(ids, attention_mask=mask).logits
        for budget, same in ((Budget(tokens=20), True), (Budget(tokens=4), False)):
            with attach(model, replace(SMALL, budget=budget), trace=Trace()):
                assert torch.allclose(model(ids, attention_mask=mask).logits, dense, atol=1e-4) == same


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_products_are_products(dtype):
    """Of keys that are a part of more, as in a cache that has room."""
    generator = torch.Generator().manual_seed(1)
    room = torch.randn(2, 3, 90, 8, generator=generator).to(dtype)
    asked, keys = torch.randn(2, 3, 4, 8, generator=generator).to(dtype), room[:, :, 5:70]
    wanted = torch.einsum("bgqd,bgkd->bgqk", asked.float(), keys.float())
    close = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.05, "rtol": 0.01}
    torch.testing.assert_close(products(asked, keys).float(), wanted, **close)


def test_what_is_between_the_first_and_the_last_candidate():
    sight = Causal(torch.ones(2, 20, dtype=torch.bool), 19, 1, lambda: None)
    assert sight.runs(4).kept(3, 5).span == (3, 15, True)
    ragged = torch.arange(20) >= torch.tensor([[0], [6]])
    assert Causal(ragged, 19, 1, lambda: None).runs(4).kept(3, 5).span == (3, 15, False)
    assert sight.runs(4).kept(12, 8).span == (0, 0, True)


def test_wrong_settings_say_what_is_allowed():
    for wrong in ({"vote": "loud"}, {"groups": "odd"}, {"positions": "none"}, {"scale": 0.0}):
        with pytest.raises(BadRequest, match=str(next(iter(wrong)))):
            TokenSelect(**wrong)
