"""Eviction beside its definition: dense attention, computed again over the whole text, restricted to what survived."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pertoken.attend import eviction
from pertoken.attend.h2o import H2O
from pertoken.attend.kept import KeptLayer, bytes_over_time, cache_bytes
from pertoken.attend.random_keys import RandomKeys
from pertoken.attend.snapkv import SnapKV
from pertoken.core.attach import attach
from pertoken.core.budget import Budget
from pertoken.core.errors import BadRequest
from pertoken.core.fingerprint import fingerprint
from pertoken.core.trace import Trace
from pertoken.decode.full import Full
from pertoken.models.adapter import adapter_for
from tests.contract.conftest import FAMILIES, VOCABULARY

torch.set_num_threads(1)
HALF = Budget(fraction=0.5)
RULES = {
    "h2o": H2O(HALF),
    "h2o in keys": H2O(Budget(tokens=5), recent=0.4, sinks=1),
    "snapkv": SnapKV(HALF, window=2, kernel=3),
    "snapkv mean": SnapKV(Budget(tokens=6), window=3, kernel=5, pool="mean", sinks=1),
}
rules = pytest.mark.parametrize("policy", RULES.values(), ids=RULES)


def model_of(family, implementation="sdpa"):
    torch.manual_seed(1)
    model = FAMILIES[family](3).eval()
    model.set_attn_implementation(implementation)
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(
    params=[("llama", "sdpa"), ("qwen3", "eager"), ("gemma", "sdpa"), ("gemma2", "eager"), ("gpt2", "sdpa")]
)
def model(request):
    return model_of(*request.param)


@pytest.fixture
def llama():
    return model_of("llama")


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(5)
    ids, mask = torch.zeros(4, 15, dtype=torch.long), torch.zeros(4, 15, dtype=torch.long)
    for row, length in enumerate((15, 4, 11, 1)):
        ids[row, 15 - length :] = torch.randint(2, VOCABULARY, (length,), generator=generator)
        mask[row, 15 - length :] = 1
    return ids, mask


def steps(model, ids, mask, forced, cache=None):
    """Logits `[row, step, vocabulary]` after the prompt and after each forced token `[row, step]`; and the cache."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    found = []
    with torch.inference_mode():
        for step in range(forced.shape[1] + 1):
            if step:
                ids, mask = forced[:, step - 1 : step], torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            out = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
            found.append(out.logits[:, -1])
    return torch.stack(found, 1), cache


class Naive:
    """One row: the whole text is read again at every step, each query under the set that survived when it came."""

    def __init__(self, model, policy):
        self.model, self.policy = model, policy
        self.adapter = adapter_for(model)
        self.full = [i for i in range(self.adapter.depth) if self.adapter.window(i) is None]
        self.softcap = model.config._attn_implementation == "eager"
        heads = [(layer, kv) for layer in self.full for kv in range(self.adapter.kv_heads)]
        self.read = {at: [] for at in heads}  # by query: the places it reads
        self.kept = {at: [] for at in heads}
        self.heavy = {at: {} for at in heads}

    def attention(self, module, query, key, value, mask, **given):
        layer, each = module.layer_idx, query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(each, 1), value.repeat_interleave(each, 1)
        scale = given.get("scaling")
        scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
        if self.softcap and given.get("softcap"):
            scores = torch.tanh(scores / given["softcap"]) * given["softcap"]
        allowed = torch.zeros_like(scores, dtype=torch.bool)
        for head in range(query.shape[1]):
            for q in range(query.shape[2]):
                if layer in self.full:
                    allowed[0, head, q, self.read[layer, head // each][q]] = True
                else:
                    allowed[0, head, q, max(0, q - self.adapter.window(layer) + 1) : q + 1] = True
        law = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
        self.law[layer] = law[0].view(key.shape[1] // each, each, *law.shape[2:]).sum(1)  # [kv_head, query, key]
        return (law @ value).transpose(1, 2), None

    def run(self, chunks):
        """Logits after each chunk of one row."""
        text, found, prompt = [], [], 0
        before = self.model.config._attn_implementation
        ALL_ATTENTION_FUNCTIONS["test_naive"] = self.attention
        try:
            self.model.set_attn_implementation("test_naive")
            for chunk in chunks:
                new = range(len(text), len(text) + len(chunk))
                if not text or len(chunk) > 1:
                    prompt += len(chunk)
                for at in self.read:
                    self.read[at] += [self.kept[at] + [p for p in new if p <= q] for q in new]
                    self.kept[at] = self.kept[at] + list(new)
                text += chunk
                self.law = {}
                with torch.inference_mode():
                    found.append(self.model(torch.tensor([text]), use_cache=False).logits[0, -1])
                for layer, kv in self.kept:
                    (self.h2o if isinstance(self.policy, H2O) else self.snapkv)(layer, kv, new, prompt)
        finally:
            self.model.set_attn_implementation(before)
            del ALL_ATTENTION_FUNCTIONS["test_naive"]
        return torch.stack(found)

    def budget(self, prompt):
        budget = self.policy.budget
        return budget.tokens if budget.tokens is not None else math.ceil(prompt * budget.fraction)

    def choose(self, at, score, latest, prompt):
        sinks, kept = self.policy.sinks, self.kept[at]
        budget = max(self.budget(prompt), latest + sinks)
        if len(kept) <= budget:
            return
        always = kept[:sinks] + kept[len(kept) - latest :]
        others = sorted((k for k in kept if k not in always), key=lambda k: -score[k])
        self.kept[at] = sorted(always + others[: budget - len(always)])

    def h2o(self, layer, kv, new, prompt):
        heavy = self.heavy[layer, kv]
        for q in new:
            for k in self.read[layer, kv][q]:
                heavy[k] = heavy.get(k, 0) + float(self.law[layer][kv, q, k])
        budget = self.budget(prompt)
        self.choose((layer, kv), heavy, int(budget * self.policy.recent + 1e-9), prompt)

    def snapkv(self, layer, kv, new, prompt):
        policy, kept = self.policy, self.kept[layer, kv]
        if len(new) < policy.window:
            return
        seen = [float(self.law[layer][kv, new[-policy.window] : new[-1] + 1, k].sum()) for k in kept[: -policy.window]]
        score, side = {}, policy.kernel // 2
        for i in range(len(seen)):
            near = seen[max(0, i - side) : i + side + 1]
            score[kept[i]] = max(near) if policy.pool == "max" else sum(near) / policy.kernel
        self.choose((layer, kv), score, policy.window, prompt)


@rules
def test_it_is_its_definition(model, policy, prompts):
    ids = prompts[0][:1]
    with attach(model, policy):
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=7)[:, ids.shape[1] :]
        found, cache = steps(model, ids, torch.ones_like(ids), out[:, :-1])
    naive = Naive(model, policy)
    wanted = naive.run([ids[0].tolist(), *[[token] for token in out[0, :-1].tolist()]])
    assert torch.allclose(found[0], wanted, atol=2e-4)
    assert torch.equal(wanted.argmax(-1), out[0])
    dense = steps(model, ids, torch.ones_like(ids), out[:, :-1])[0]
    assert torch.allclose(dense[:, 0], found[:, 0], atol=1e-4) and not torch.allclose(dense, found, atol=1e-2)
    for (layer, kv), kept in naive.kept.items():
        held = cache.layers[layer].places
        assert [p for p in held[0, kv if held.shape[1] > 1 else 0].tolist() if p >= 0] == kept
    sets = {tuple(kept) for kept in naive.kept.values()}
    assert len(sets) > 1 or len(naive.full) == 1, "heads must keep different keys for this to say anything"


@rules
@pytest.mark.parametrize("chunks", [(6, 9), (4, 4, 4, 3), (1,) * 15])
def test_a_prompt_in_chunks_is_evicted_from_after_each(llama, policy, prompts, chunks):
    text = prompts[0][0].tolist()
    parts = [text[sum(chunks[:i]) : sum(chunks[: i + 1])] for i in range(len(chunks))]
    cache, found, read = DynamicCache(config=llama.config), [], 0
    with attach(llama, policy), torch.inference_mode():
        for part in parts:
            read += len(part)
            mask = torch.ones(1, read, dtype=torch.long)
            found.append(llama(torch.tensor([part]), attention_mask=mask, past_key_values=cache).logits[0, -1])
    assert torch.allclose(torch.stack(found), Naive(llama, policy).run(parts), atol=2e-4)


@rules
def test_ragged_rows_are_each_alone(model, policy, prompts):
    ids, mask = prompts
    forced = torch.randint(2, VOCABULARY, (len(ids), 6), generator=torch.Generator().manual_seed(2))
    with attach(model, policy):
        together, cache = steps(model, ids, mask, forced)
        sizes = set()
        for row in range(len(ids)):
            real = mask[row].bool()
            alone, own = steps(model, ids[row : row + 1, real], mask[row : row + 1, real], forced[row : row + 1])
            assert torch.allclose(alone[0], together[row], atol=1e-4)
            for mine, all_rows in zip(own.layers, cache.layers, strict=True):
                if isinstance(mine, KeptLayer):
                    padding = int((~real).sum())
                    groups = all_rows.places.shape[1]
                    held = mine.places.expand(-1, groups, -1)[0]
                    shared = all_rows.places[row]
                    for one, other in zip(held.tolist(), shared.tolist(), strict=True):
                        assert [p for p in one if p >= 0] == [p - padding for p in other if p >= padding]
                    sizes.add(mine.kept)
        assert len(sizes) > 1 or policy == RULES["h2o in keys"]


@pytest.mark.parametrize("policy", [H2O(Budget(tokens=21)), SnapKV(Budget(tokens=21), window=3)], ids=["h2o", "snapkv"])
def test_a_budget_of_all_there_is_is_dense(model, policy, prompts):
    ids, mask = prompts
    forced = torch.randint(2, VOCABULARY, (len(ids), 6), generator=torch.Generator().manual_seed(2))
    dense, _ = steps(model, ids, mask, forced)
    with attach(model, policy):
        found, cache = steps(model, ids, mask, forced)
        assert torch.allclose(found, dense, atol=1e-4)
        assert all(layer.whole for layer in cache.layers if isinstance(layer, KeptLayer))
        assert torch.equal(
            model.generate(ids, attention_mask=mask, max_new_tokens=6), free(model, ids, mask, max_new_tokens=6)
        )


def free(model, ids, mask, **settings):
    """Generated by a copy that nothing is attached to."""
    other = type(model)(model.config).eval()
    other.load_state_dict(model.state_dict())
    other.set_attn_implementation("sdpa" if "gemma2" not in model.config.model_type else "eager")
    other.generation_config.eos_token_id = None
    return other.generate(ids, attention_mask=mask, **settings)


@rules
def test_memory_is_freed_and_told_over_time(llama, policy, prompts):
    ids, mask = prompts
    settings = {"attention_mask": mask, "max_new_tokens": 6}
    out, dense = bytes_over_time(llama, ids, **settings)
    assert torch.equal(out, llama.generate(ids, **settings))
    adapter = adapter_for(llama)
    key = 2 * adapter.kv_heads * adapter.head_dim * 4
    assert dense == [3 * 4 * key * (15 + step) for step in range(6)]
    with attach(llama, policy):
        again, sizes = bytes_over_time(llama, ids, **settings)
        assert torch.equal(again, llama.generate(ids, **settings))
    budget = policy.budget.tokens or 8
    places = 8 * adapter.kv_heads + (4 * adapter.kv_heads if isinstance(policy, H2O) else 0)
    grows = 0 if isinstance(policy, H2O) else 1
    assert sizes == [3 * 4 * (key + places) * (budget + grows * step) for step in range(6)]


def test_the_cache_holds_no_more_storage_than_it_says(llama, prompts):
    with attach(llama, RULES["h2o"]):
        _, cache = steps(llama, *prompts, prompts[0][:, :3])
    for layer in cache.layers:
        for tensor in (layer.keys, layer.values, layer.places, *layer.beside.values()):
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def test_mass_is_weighed_in_blocks(llama, prompts, monkeypatch):
    from pertoken.ops.weighed_attention import torch as op

    widths = []
    weights = op._weights
    monkeypatch.setattr(op, "_weights", lambda query, *rest: widths.append(query.shape[2]) or weights(query, *rest))
    with attach(llama, RULES["h2o"]):
        whole, _ = steps(llama, *prompts, prompts[0][:, :2])
        assert max(widths) == 15
        monkeypatch.setattr(op, "BLOCK", 4 * 4 * 15 * 4 * 2)  # two queries of four rows and heads
        widths.clear()
        parts, _ = steps(llama, *prompts, prompts[0][:, :2])
    assert max(widths) == 2 and torch.allclose(whole, parts, atol=1e-5)


@rules
def test_undo_leaves_the_model_as_it_was(model, policy, prompts):
    ids, mask = prompts
    before = fingerprint(model, deep=True)
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=5)
    for _ in range(2):
        with attach(model, policy) as attached:
            changed = model.generate(ids, attention_mask=mask, max_new_tokens=5)
            with attached.disabled():
                assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=5), expected)
            assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=5), changed)
    with pytest.raises(RuntimeError, match="inside"), attach(model, policy):
        raise RuntimeError("inside")
    assert fingerprint(model, deep=True) == before
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=5), expected)


@rules
def test_recordings_hold_what_was_kept_and_replay(llama, policy, prompts, tmp_path):
    ids, mask = prompts
    forced = torch.randint(2, VOCABULARY, (len(ids), 4), generator=torch.Generator().manual_seed(2))
    recorded, again = Trace(), Trace()
    with attach(llama, policy):
        plain, _ = steps(llama, ids, mask, forced)
    with attach(llama, policy, trace=recorded):
        first, cache = steps(llama, ids, mask, forced)
    assert torch.allclose(first, plain, atol=1e-5) and len(recorded.steps) == 5 * 3
    for layer, step in enumerate(recorded.steps[-3:]):
        assert step.site == f"{eviction.SITE}.{layer}"
        held = cache.layers[layer].places
        assert torch.equal(step.decision.index[:, :, 0], held)
        assert step.decision.spent().tolist() == (held >= 0).sum(-1).amax(1).tolist()
    recorded.save(tmp_path / "trace.safetensors")
    with attach(llama, H2O(Budget.full()), trace=again, replay=Trace.load(tmp_path / "trace.safetensors")):
        assert torch.allclose(steps(llama, ids, mask, forced)[0], first, atol=1e-5)
    assert again.same_as(recorded)


@rules
def test_beams_keep_their_own_keys(llama, policy, prompts):
    """The score of the best beam is that of its text read by itself, so its keys went with it at every reordering."""
    ids, mask = prompts
    settings = {"max_new_tokens": 6, "num_beams": 3, "length_penalty": 0.0, "return_dict_in_generate": True}
    with attach(llama, policy):
        out = llama.generate(ids, attention_mask=mask, output_scores=True, **settings)
        new = out.sequences[:, ids.shape[1] :]
        logits, _ = steps(llama, ids, mask, new[:, :-1])
        greedy = llama.generate(ids, attention_mask=mask, max_new_tokens=6)[:, ids.shape[1] :]
    assert not torch.equal(new, greedy) and int((out.beam_indices[:, :6] % 3).amax()) > 0
    scores = logits.log_softmax(-1).gather(-1, new[..., None]).sum((1, 2))
    assert torch.allclose(scores, out.sequences_scores, atol=1e-3)


def test_a_prefix_that_was_read_before_is_evicted_from_too(llama, prompts):
    text, policy = prompts[0][:1], H2O(Budget(tokens=6))
    with torch.inference_mode():
        cache = llama(text[:, :9], use_cache=True).past_key_values
        dense = cache_bytes(cache)
        with attach(llama, policy):
            llama(text[:, 9:], past_key_values=cache)
            assert all(layer.kept == 6 for layer in cache.layers) and cache.get_seq_length() == 15
            assert cache_bytes(cache) < dense
            forks = [layer.fork() for layer in cache.layers]
            first = llama(text[:, :2], past_key_values=cache).logits
            cache.layers = forks
            assert torch.equal(llama(text[:, :2], past_key_values=cache).logits, first)
            cache.crop(-2)
            assert cache.get_seq_length() == 15
        with pytest.raises(BadRequest, match="has evicted keys"):
            llama(text[:, :1], past_key_values=cache)


def test_what_cannot_be_served_is_refused(llama, prompts):
    ids, mask = prompts
    policy = RULES["snapkv"]
    before = fingerprint(llama)
    with attach(llama, policy):
        with pytest.raises(BadRequest, match="StaticCache"):
            llama(ids, past_key_values=StaticCache(config=llama.config, max_cache_len=30))
        with pytest.raises(BadRequest, match="offloads"):
            cache = DynamicCache(config=llama.config)
            cache.offloading = True
            llama(ids, past_key_values=cache)
        with pytest.raises(BadRequest, match="not a mask of each query"):
            llama(ids, attention_mask=torch.ones(4, 1, 15, 15, dtype=torch.bool).tril())
        with pytest.raises(BadRequest, match="this decoder both decide what the cache holds"):
            llama.generate(ids, attention_mask=mask, max_new_tokens=3, custom_generate=Full())
        with pytest.raises(ValueError, match="both decide keys read"), attach(llama, RandomKeys(HALF)):
            pass
        assert llama(ids, attention_mask=mask, use_cache=False).logits.isfinite().all()
    with pytest.raises(BadRequest, match="sliding window"), attach(model_of("mistral"), policy):
        pass
    assert fingerprint(llama) == before


def test_settings_are_checked():
    for make in (
        lambda: H2O(Budget(layers=1)),
        lambda: H2O(recent=1.5),
        lambda: H2O(sinks=-1),
        lambda: SnapKV(window=1),
        lambda: SnapKV(kernel=4),
        lambda: SnapKV(pool="median"),
    ):
        with pytest.raises(BadRequest):
            make()
