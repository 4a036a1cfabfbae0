"""Keys in host memory: the same comes out as with keys on the device, whatever happens to the cache; what the device
holds; and what cannot be offloaded."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from transformers import DynamicCache, Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, StaticCache

from pertoken.attend.block_topk import BlockTopK
from pertoken.attend.dhsa import DHSA
from pertoken.attend.dma import DMA
from pertoken.attend.dynamic_mask import DynamicMask
from pertoken.attend.kept import cache_bytes
from pertoken.attend.random_keys import RandomKeys
from pertoken.attend.selection import SITE, device_bytes
from pertoken.attend.sink_window import SinkWindow
from pertoken.attend.snapkv import SnapKV
from pertoken.attend.tokenselect import TokenSelect
from pertoken.core.attach import attach
from pertoken.core.budget import Budget
from pertoken.core.errors import BadRequest
from pertoken.core.trace import Trace
from pertoken.decode.full import Full
from pertoken.decode.lossless import lossless
from pertoken.models.growing import GrowingLayer

torch.set_num_threads(1)
FEW = {"budget": Budget(tokens=5), "sinks": 2, "recent": 3, "run": 4}
POLICIES = {
    "votes": TokenSelect(**FEW, reuse=2.0),
    "reuses": TokenSelect(**FEW, reuse=0.3),
    "original": TokenSelect(**FEW, positions="original"),
    "chunks": DHSA(**FEW, chunk=3),
    "chunks, compact": DHSA(**FEW, chunk=3, positions="compact", groups=True),
    "trained mask": DMA(Budget(tokens=6), run=4, mask=DynamicMask([0, 1], kv_heads=2, dim=8, noise=1.0)),
    "of each key head": BlockTopK(**FEW, page=2),
    "a share": RandomKeys(**(FEW | {"budget": Budget(fraction=0.4)})),
    "window": SinkWindow(**FEW),
    "all": TokenSelect(Budget.full(), positions="original"),
}


def llama(layers: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model():
    return llama()


def ragged(lengths=(30, 4, 17), seed=0):
    generator = torch.Generator().manual_seed(seed)
    widest = max(lengths)
    ids = torch.randint(2, 61, (len(lengths), widest), generator=generator)
    mask = torch.stack([torch.arange(widest) >= widest - n for n in lengths]).long()
    return ids * mask, mask


class Machine(RuleBasedStateMachine):
    """A model that offloads beside one that does not: read, take back, reorder, drop, copy."""

    @initialize(name=st.sampled_from(sorted(POLICIES)), lengths=st.lists(st.integers(1, 14), min_size=1, max_size=3))
    def begin(self, name, lengths):
        self.scope, self.sides, self.step = ExitStack(), [], 0
        for offload in (False, True):
            own = llama()
            attached = self.scope.enter_context(attach(own, replace(POLICIES[name], offload=offload)))
            self.sides.append([own, attached, DynamicCache(config=own.config)])
        ids, self.mask = ragged(lengths)
        self.read(ids)

    def read(self, ids):
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        found = []
        for own, _, cache in self.sides:
            with torch.inference_mode():
                out = own(ids, attention_mask=self.mask, position_ids=positions, past_key_values=cache, use_cache=True)
            found.append(out.logits)
        real = self.mask[:, -ids.shape[1] :].bool()
        torch.testing.assert_close(found[1][real], found[0][real], atol=1e-4, rtol=1e-3)
        self.same_caches()

    def same_caches(self):
        (_, _, plain), (_, attached, away) = self.sides
        for one, other in zip(plain.layers, away.layers, strict=True):
            assert isinstance(other, GrowingLayer) and other.home == torch.device("cpu") and not other.attended
            torch.testing.assert_close(other.keys, one.keys, atol=1e-4, rtol=1e-3)
            torch.testing.assert_close(other.values, one.values, atol=1e-4, rtol=1e-3)
        asides = [state["aside"] for state in attached.state.get(SITE, {}).values() if "aside" in state]
        assert device_bytes(away, attached) == sum(one.keys.nbytes + one.values.nbytes for one in asides)

    @rule(new=st.integers(1, 5), seed=st.integers(0, 99))
    def more(self, new, seed):
        self.step += 1  # another text at each step: chunks of the same text tie, and rounding would choose among them
        generator = torch.Generator().manual_seed(1000 * self.step + seed)
        ids = torch.randint(2, 61, (len(self.mask), new), generator=generator)
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), new)], 1)
        self.read(ids)

    @rule(seed=st.integers(0, 99))
    def decode(self, seed):
        for at in range(3):
            self.more(1, seed + at)

    @rule(count=st.integers(1, 3))
    def take_back(self, count):
        if self.mask.shape[1] > count and bool((self.mask.sum(-1) > count).all()):
            for _, _, cache in self.sides:
                cache.crop(-count)
            self.mask = self.mask[:, :-count]

    @rule(data=st.data(), beams=st.booleans())
    def reorder(self, data, beams):
        order = data.draw(st.lists(st.integers(0, len(self.mask) - 1), min_size=1, max_size=3))
        for _, _, cache in self.sides:
            (cache.reorder_cache if beams else cache.batch_select_indices)(torch.tensor(order))
        self.mask = self.mask[order]

    @rule(deep=st.booleans())
    def go_on_with_a_copy(self, deep):
        """What the copy reads must not be seen by the one that it was copied from."""
        left = []
        for side in self.sides:
            held = side[2]
            side[2] = copy.deepcopy(held) if deep else copy.copy(held)
            if not deep:
                side[2].layers = [copy.copy(layer) for layer in held.layers]
            left += [(layer, layer.keys.clone(), layer.values.clone()) for layer in held.layers]
        self.more(1, self.step)
        assert all(torch.equal(one.keys, keys) and torch.equal(one.values, values) for one, keys, values in left)

    def teardown(self):
        if hasattr(self, "scope"):
            self.scope.close()


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=20, stateful_step_count=10, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.parametrize("name", POLICIES)
def test_generation_is_the_same(model, name):
    ids, mask = ragged()
    given = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    found = []
    for offload in (False, True):
        with attach(model, replace(POLICIES[name], offload=offload)):
            found += [model.generate(ids, **given), model.generate(ids, num_beams=2, **given)]
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("name", [name for name in POLICIES if name != "a share"])  # random keys are those of a row
def test_what_is_kept_follows_the_rows_of_the_cache(model, name, offload):
    """Rows that change places, and a row that goes on alone, read what they would have read."""
    ids, mask = ragged((22, 9, 15))
    for order in ([0, 1, 2], [2, 0, 1], [1], [1, 1, 2, 0]):
        with torch.inference_mode(), attach(model, replace(POLICIES[name], offload=offload)):
            cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
            steps = []
            for step in range(3):
                now = order if step else [0, 1, 2]
                if step == 1:
                    cache.batch_select_indices(torch.tensor(order))
                tokens = (torch.tensor(now) * 3 + step + 2)[:, None]
                longer = torch.nn.functional.pad(mask[now], (0, step + 1), value=1)
                steps.append(model(tokens, attention_mask=longer, past_key_values=cache).logits)
        if order == [0, 1, 2]:
            usual = steps
        for found, expected in zip(steps[1:], usual[1:], strict=True):
            torch.testing.assert_close(found, expected[order], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["chunks", "chunks, compact", "votes", "of each key head"])
@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0], [1], [1, 0, 2]])
def test_a_text_goes_on_behind_rows_that_changed_places(model, name, order):
    """What is kept of the prompt is that of the row; lengths are multiples of a run, so that runs are the whole's."""
    ids, mask = ragged((32, 24, 8))
    new = torch.randint(2, 61, (3, 5), generator=torch.Generator().manual_seed(2))
    longer = torch.nn.functional.pad(mask[order], (0, 5), value=1)
    places = [(one.cumsum(-1) - 1).clamp(min=0) for one in (mask, longer)]
    with torch.inference_mode(), attach(model, POLICIES[name]):
        cache = model(ids, attention_mask=mask, position_ids=places[0], use_cache=True).past_key_values
        cache.batch_select_indices(torch.tensor(order))
        given = {"attention_mask": longer, "past_key_values": cache, "position_ids": places[1][:, -5:]}
        found = model(new[order], **given).logits
        whole = torch.cat([ids[order], new[order]], 1)
        expected = model(whole, attention_mask=longer, position_ids=places[1]).logits[:, -5:]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_the_device_holds_what_is_read_and_no_more(model):
    ids = torch.randint(2, 61, (2, 200), generator=torch.Generator().manual_seed(1))
    policy = TokenSelect(**FEW, reuse=2.0, offload=True)
    cache = DynamicCache(config=model.config)
    with torch.inference_mode(), attach(model, policy) as attached:
        model(ids, past_key_values=cache)
        assert device_bytes(cache, attached) == 0
        for token in range(5):
            model(torch.full((2, 1), token + 2), past_key_values=cache)
        held = device_bytes(cache, attached)
        fetched = [state["aside"].fetched for state in attached.state[SITE].values()]
    slots = (5 + 2 + 3) * 9 // 8
    assert held == 2 * 2 * 2 * slots * 2 * 8 * 4  # layers, keys and values, rows, slots, key heads, dim, bytes
    assert cache_bytes(cache) == 2 * 2 * 2 * 205 * 2 * 8 * 4 > 15 * held
    assert all(20 <= count < 5 * 20 for count in fetched)  # at first all ten of each row, then what is new


def test_keys_that_are_still_read_are_not_fetched_again(model):
    cache = DynamicCache(config=model.config)
    with torch.inference_mode(), attach(model, SinkWindow(**FEW, offload=True)) as attached:
        model(torch.full((1, 40), 3), past_key_values=cache)
        counts = []
        for token in range(4):
            model(torch.tensor([[token + 2]]), past_key_values=cache)
            counts.append(attached.state[SITE][0]["aside"].fetched)
    assert counts == [10, 11, 12, 13]  # a window moves by one key


def test_any_other_attention_reads_the_same_cache(model):
    """Without the policy, with another one, and with it again."""
    ids = ragged((20,))[0]
    dense = model(torch.cat([ids, ids[:, :3]], 1)).logits[:, -3:]
    with torch.inference_mode():
        with attach(model, TokenSelect(Budget(fraction=1.0), offload=True)):
            cache = model(ids, use_cache=True).past_key_values
        parts = [model(ids[:, :1], past_key_values=cache).logits]
        with attach(model, TokenSelect(Budget(fraction=1.0), positions="original")):
            parts.append(model(ids[:, 1:2], past_key_values=cache).logits)
        with attach(model, TokenSelect(Budget(fraction=1.0), positions="original", offload=True)):
            parts.append(model(ids[:, 2:3], past_key_values=cache).logits)
    assert all(layer.home is not None for layer in cache.layers) and cache.get_seq_length() == 23
    assert not torch.allclose(parts[0], dense[:, :1], atol=1e-4)  # compact: these keys are not turned
    with torch.inference_mode():
        with attach(model, TokenSelect(Budget(fraction=1.0), positions="original", offload=True)):
            cache = model(ids, use_cache=True).past_key_values
        parts = [model(ids[:, :1], past_key_values=cache).logits]
        with attach(model, TokenSelect(Budget(fraction=1.0), positions="original")):
            parts.append(model(ids[:, 1:2], past_key_values=cache).logits)
        with attach(model, TokenSelect(Budget(fraction=1.0), positions="original", offload=True)):
            parts.append(model(ids[:, 2:3], past_key_values=cache).logits)
    assert torch.allclose(torch.cat(parts, 1), dense, atol=1e-4)


def test_a_cache_that_was_read_before_is_taken_over(model):
    ids = ragged((20, 20))[0]
    found = []
    for offload in (False, True):
        with torch.inference_mode():
            cache = model(ids, use_cache=True).past_key_values
            with attach(model, replace(POLICIES["original"], offload=offload)):
                found.append(model(ids[:, :1], past_key_values=cache).logits)
    assert torch.allclose(*found, atol=1e-4) and all(layer.home is not None for layer in cache.layers)


def test_layers_with_a_window_stay_on_the_device():
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=6, initializer_range=0.3, pad_token_id=0,
    )  # fmt: skip
    model, (ids, mask) = Gemma2ForCausalLM(config).eval(), ragged((20, 11))
    found = []
    for offload in (False, True):
        with torch.inference_mode(), attach(model, TokenSelect(**FEW, offload=offload)) as attached:
            cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
            mask_now = torch.cat([mask, mask.new_ones(2, 1)], 1)
            found.append(model(ids[:, -1:], attention_mask=mask_now, past_key_values=cache).logits)
            held = device_bytes(cache, attached)
    assert torch.allclose(*found, atol=1e-4)
    homes = [getattr(layer, "home", None) for layer in cache.layers]
    assert homes == [None, torch.device("cpu")] and held > cache.layers[0].keys.nbytes * 2 > 0


def test_recorded_and_replayed(model):
    ids, mask = ragged()
    policy, trace, again = replace(POLICIES["votes"], offload=True), Trace(), Trace()
    given = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    with attach(model, policy, trace=trace):
        first = model.generate(ids, **given)
    with attach(model, policy, trace=again, replay=trace):
        assert torch.equal(model.generate(ids, **given), first)
    assert again.same_as(trace) and trace.steps


def test_what_cannot_be_offloaded_is_refused(model):
    ids, mask = ragged((12, 9))
    policy = replace(POLICIES["votes"], offload=True)
    with attach(model, policy):
        with pytest.raises(BadRequest, match="offloads keys of a DynamicCache, got StaticCache"):
            model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=30))
        with pytest.raises(BadRequest, match="got StaticCache"):
            model.generate(ids, attention_mask=mask, max_new_tokens=3, cache_implementation="static")
        with pytest.raises(BadRequest, match="got a cache that offloads its layers"):
            cache = DynamicCache(config=model.config)
            cache.offloading = True
            model(ids, past_key_values=cache)
        with pytest.raises(BadRequest, match="this decoder has a cache of its own"):
            model.generate(ids, attention_mask=mask, max_new_tokens=3, custom_generate=Full())
        with pytest.raises(BadRequest, match="take no gradient"):
            model(ids, attention_mask=mask, use_cache=True)
        assert model(ids, attention_mask=mask, use_cache=False).logits.requires_grad
        with torch.no_grad():
            cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
    with pytest.raises(BadRequest, match="cache of its own"):
        model.generate(ids, attention_mask=mask, max_new_tokens=3, custom_generate=lossless(policy))
    with torch.no_grad(), attach(model, SnapKV(Budget(tokens=8))), pytest.raises(BadRequest, match="is a GrowingLayer"):
        model(ids[:, :1], past_key_values=cache)
