"""Think-at-Hard against its definition: one row, one token, one pass after the other, keys in plain lists."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from transformers import StaticCache

from pertoken.core.attach import attach
from pertoken.core.budget import Budget
from pertoken.core.cost import count_flops
from pertoken.core.errors import BadRequest
from pertoken.core.fingerprint import fingerprint
from pertoken.core.trace import Trace
from pertoken.decode.del_ import DEL
from pertoken.decode.dyspec import DySpec
from pertoken.decode.full import Full
from pertoken.depth.deciders import AsGiven, ByChance, ByEntropy, NeuralDecider
from pertoken.depth.lora import Lora
from pertoken.depth.passes import PassView
from pertoken.depth.think_at_hard import ThinkAtHard, oracle_passes
from pertoken.models.adapter import adapter_for
from tests.contract.conftest import VOCABULARY
from tests.depth.conftest import model_of, rows
from tests.depth.reading import continued, logits

NEW = 8


def lora(model, seed=5):
    """Low-rank weights that change what a pass says."""
    torch.manual_seed(seed)
    found = Lora.for_model(model, rank=2, alpha=4.0)
    with torch.no_grad():
        for weight in found.up:
            weight.normal_(std=0.1)
    return found


def decider(model, seed=7):
    """A network whose chances lie on both sides of a half."""
    torch.manual_seed(seed)
    return NeuralDecider.for_model(model, inner=8, count=3).eval()


def split(model, judge, ids, mask):
    """A threshold that some of the tokens of a text pass, as far as can be from the chance of any."""
    seen = []

    class Watching(type(judge)):
        def chances(self, view):
            seen.append(super().chances(view))
            return torch.zeros_like(seen[-1])

    watching = copy.copy(judge)
    watching.__class__ = Watching
    with torch.no_grad(), attach(model, ThinkAtHard(decider=watching)):
        logits(model, ids, mask)
    ordered = torch.cat(seen).double().sort().values
    middle = ordered[len(ordered) // 4 : -len(ordered) // 4]
    at = int((middle[1:] - middle[:-1]).argmax())
    return float(middle[at : at + 2].mean())


class Keys:
    """Keys of one row, one layer and every pass: lists of (place, pass, key, value)."""

    is_compileable = False

    def __init__(self, adapter, ablated):
        self.ablated, self.windows = ablated, [adapter.window(index) for index in range(adapter.depth)]
        self.kept = [[] for _ in self.windows]
        self.place = self.number = 0

    def update(self, keys, values, layer_idx, *args, **kwargs):
        self.kept[layer_idx].append((self.place, self.number, keys, values))
        window = self.windows[layer_idx] or self.place + 1
        seen = [
            (k, v)
            for place, number, k, v in self.kept[layer_idx]
            if number <= self.number and 0 <= self.place - place < window and self.sees(place, number)
        ]
        return torch.cat([k for k, _ in seen], 2), torch.cat([v for _, v in seen], 2)

    def sees(self, place, number):
        if self.ablated == "own":
            return number == self.number
        return self.ablated == "both" or number == 1 or (place == self.place and number == self.number)

    def get_seq_length(self, layer_idx=0):
        return self.place


@torch.inference_mode()
def twin(model, tokens, again, most=2, top=100, low=None, sees="both"):
    """Logits `[token, vocabulary]` and passes of a text; again(place, passes run, states, summed logits) -> bool."""
    adapter, found, passes = adapter_for(model), [], []
    keys = Keys(adapter, sees)
    sides = {False: model, True: model if low is None else copy.deepcopy(model)}
    if low is not None:
        low.merge(sides[True])
    for place, token in enumerate(tokens):
        at = torch.tensor([[place]])
        table = adapter.embed(torch.arange(adapter.vocabulary)[None], at.expand(1, adapter.vocabulary))[0]
        x, total, keys.place = table[token][None, None], torch.zeros(adapter.vocabulary), place
        for number in range(1, most + 1):
            keys.number, side = number, adapter_for(sides[number > 1])
            states, rotary = [x], adapter.rotary(x, at)
            for layer in range(adapter.depth):
                states.append(side.run_layer(layer, states[-1], None, at, rotary, keys))
            total = total + model.lm_head(adapter.norm(states[-1]))[0, 0]
            if number == most or not again(place, number, [s[0, 0] for s in states], total):
                break
            best, names = total.topk(min(top, len(total)))
            x = (best.softmax(-1)[:, None] * table[names]).sum(0)[None, None]
        cap = getattr(model.config, "final_logit_softcapping", None)
        found.append(total if cap is None else torch.tanh(total / cap) * cap)
        passes.append(number)
    return torch.stack(found), passes


def scattered(place, number):
    return (place * 7 + number * 3) % 5 < 2


def given(most, length=64):
    """An oracle that gives place p as many passes as `scattered` lets it have."""
    passes = []
    for place in range(length):
        number = 1
        while number < most and scattered(place, number):
            number += 1
        passes.append(number)
    return passes


@pytest.mark.parametrize("most", [2, 3])
@pytest.mark.parametrize("cut", [14, 5])
def test_batches_and_caches_are_the_definition_token_by_token(target, prompts, most, cut):
    ids, mask = (part.clone() for part in prompts)
    mask[:, -1] = 1
    passes, low = given(most), lora(target)
    policy = ThinkAtHard(decider=AsGiven(torch.tensor([passes] * len(ids))), passes=most, top=9, lora=low)
    trace = Trace()
    with attach(target, policy, trace=trace):
        found = continued(target, ids, mask, cut)
    for row, tokens in enumerate(rows(ids, mask)):
        wanted, ran = twin(target, tokens, lambda p, n, *_: scattered(p, n), most, 9, low)
        assert ran == passes[: len(tokens)] and (len(tokens) < 4 or len(set(ran)) > 1)
        assert torch.allclose(found[row, -len(tokens) :], wanted, atol=3e-4), row
    first = next(trace.at("depth.passes.1")).decision
    assert first.layers.shape[-1] == most * 4 and first.spent().sum() > 4 * mask[:, :cut].sum()


@pytest.mark.parametrize("sees", ["first", "own"])
def test_ablations_see_what_they_say(prompts, sees):
    for name in ("llama", "mistral"):
        model, (ids, mask) = model_of(name), prompts
        ids, mask = ids.clone(), mask.clone()
        mask[:, -1] = 1
        policy = ThinkAtHard(decider=AsGiven(torch.tensor([given(3)] * len(ids))), passes=3, sees=sees)
        with attach(model, policy):
            found = continued(model, ids, mask, 9)
        for row, tokens in enumerate(rows(ids, mask)):
            wanted, _ = twin(model, tokens, lambda p, n, *_: scattered(p, n), 3, sees=sees)
            assert torch.allclose(found[row, -len(tokens) :], wanted, atol=3e-4), row


def test_a_trained_decider_is_asked_what_the_definition_asks(prompts):
    for name in ("llama", "qwen3", "mistral"):
        model, (ids, mask) = model_of(name), prompts
        judge, low = decider(model), lora(model)
        level = split(model, judge, ids, mask)

        def again(place, number, states, total, judge=judge, level=level):
            chosen = [states[at][None] for at in judge.layers]
            return float(judge(chosen, total[None]).sigmoid()) > level

        policy, trace = ThinkAtHard(decider=judge, threshold=level, lora=low), Trace()
        with torch.inference_mode(), attach(model, policy, trace=trace):
            found = logits(model, ids, mask)
        decided = trace.steps[0].decision.layers.sum(-1) // 4
        for row, tokens in enumerate(rows(ids, mask)):
            wanted, ran = twin(model, tokens, again, low=low)
            assert decided[row, -len(tokens) :].tolist() == ran
            assert torch.allclose(found[row, -len(tokens) :], wanted, atol=3e-4)
        assert 0 < int((decided[mask.bool()] == 2).sum()) < int(mask.sum())


def test_what_is_cached_is_what_a_fresh_pass_gives(target, prompts):
    ids, mask = prompts
    policy = ThinkAtHard(budget=Budget(fraction=0.5), lora=lora(target))
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with attach(target, policy):
        out = target.generate(ids, attention_mask=mask, return_dict_in_generate=True, output_logits=True, **options)
        whole = torch.cat([mask, mask.new_ones(len(mask), NEW)], 1)
        with torch.inference_mode():
            again = logits(target, out.sequences, whole, use_cache=False)
    assert torch.allclose(again[:, ids.shape[1] - 1 : -1], torch.stack(out.logits, 1), atol=3e-4)


def test_a_later_token_changes_nothing_before_it(target, prompts):
    ids, mask = prompts
    other = ids.clone()
    other[:, 9:] = (other[:, 9:] + 5) % VOCABULARY
    with torch.inference_mode(), attach(target, ThinkAtHard(budget=Budget(fraction=0.5), lora=lora(target))):
        one, two = logits(target, ids, mask), logits(target, other, mask)
    kept = mask[:, :9].bool()
    assert torch.equal(one[:, :9][kept], two[:, :9][kept]) and not torch.equal(one, two)


def test_where_the_decider_says_stop_the_logits_are_those_of_the_model(target, prompts):
    wanted = logits(target, *prompts)
    policy = ThinkAtHard(decider=decider(target), threshold=1.0, lora=lora(target))
    with torch.no_grad(), attach(target, policy):
        assert torch.equal(logits(target, *prompts), wanted)


def test_another_pass_costs_what_runs_it():
    model = model_of("llama")
    ids = torch.randint(2, VOCABULARY, (3, 40), generator=torch.Generator().manual_seed(1))

    def cost(decider):
        with torch.inference_mode(), attach(model, ThinkAtHard(decider=decider)):
            return count_flops(lambda: model(ids))

    none, all_ = (cost(AsGiven(torch.full((3, 40), n))) for n in (1, 2))
    few = torch.ones(3, 40, dtype=torch.long)
    few[:, [4, 9, 25, 38]] = 2
    some = cost(AsGiven(few))
    with torch.inference_mode():
        assert none == count_flops(lambda: model(ids))
    assert 1.9 * none < all_ < 2.6 * none
    assert 1.05 * none < some < 1.2 * none


def test_gradients_reach_the_low_rank_weights_and_the_first_pass():
    model, ids = model_of("llama"), torch.randint(2, VOCABULARY, (2, 12))
    low = lora(model)
    passes = torch.ones(2, 12, dtype=torch.long)
    passes[:, ::3] = 2
    with attach(model, ThinkAtHard(decider=AsGiven(passes), lora=low), training=True):
        out = model(ids, use_cache=False).logits
        out[:, 9].square().mean().backward()
    for weight in (*low.down, *low.up, model.model.layers[0].self_attn.k_proj.weight, model.lm_head.weight):
        assert weight.grad is not None and weight.grad.abs().sum() > 0
    assert low.gate == 1.0


def test_low_rank_weights_drop_some_of_what_they_read_while_they_are_trained(prompts):
    model = model_of("llama")
    low, (ids, mask) = lora(model), prompts
    low.dropout = 0.5
    with torch.inference_mode(), attach(model, ThinkAtHard(decider=AsGiven(torch.full_like(ids, 2)), lora=low)):
        assert not torch.equal(logits(model, ids, mask), logits(model, ids, mask))
        low.eval()
        kept = logits(model, ids, mask)
        low.dropout = 0.0
        assert torch.equal(kept, logits(model, ids, mask))


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_beams_are_those_of_a_model_without_a_cache(prompts, name):
    model, (ids, mask) = model_of(name), prompts
    options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    with attach(model, ThinkAtHard(budget=Budget(fraction=0.4), lora=lora(model))):
        found = model.generate(ids, attention_mask=mask, **options)
        assert torch.equal(model.generate(ids, attention_mask=mask, use_cache=False, **options), found)


def test_an_assistant_whose_guesses_are_cropped_changes_nothing(prompts):
    model, assistant, (ids, mask) = model_of("llama"), model_of("llama", seed=2), prompts
    options = {"attention_mask": mask[:1], "max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    with attach(model, ThinkAtHard(budget=Budget(fraction=0.5), lora=lora(model))):
        plain = model.generate(ids[:1], **options)
        assert torch.equal(model.generate(ids[:1], assistant_model=assistant, **options), plain)


def test_decoders_over_a_trained_decider_write_what_it_writes_alone(prompts):
    model, (ids, mask) = model_of("qwen3"), prompts
    judge = decider(model)
    policy = ThinkAtHard(decider=judge, threshold=split(model, judge, ids, mask), lora=lora(model))
    options = {"attention_mask": mask, "max_new_tokens": NEW, "pad_token_id": 0, "do_sample": False}
    with attach(model, policy):
        plain = model.generate(ids, **options)
        assert torch.equal(model.generate(ids, custom_generate=Full(), **options), plain)
        assert torch.equal(model.generate(ids, custom_generate=DySpec(size=6), **options), plain)
        with pytest.raises(BadRequest, match="did not run them all"):
            model.generate(ids, custom_generate=DEL(fixed=(2, 3)), **options)


def test_bf16_runs(prompts):
    model = model_of("llama").to(torch.bfloat16)
    with torch.inference_mode(), attach(model, ThinkAtHard(budget=Budget(fraction=0.5), lora=lora(model))):
        found = logits(model, *prompts)
        tokens = model.generate(prompts[0], attention_mask=prompts[1], max_new_tokens=4, pad_token_id=0)
    assert found.dtype == torch.bfloat16 and found.isfinite().all() and tokens.shape[1] > prompts[0].shape[1]


def test_a_prompt_can_be_left_alone_but_for_its_last_token(prompts):
    model, (ids, mask) = model_of("llama"), prompts
    trace = Trace()
    policy = ThinkAtHard(decider=ByChance(1.0), prompt=False)
    with attach(model, policy, trace=trace):
        model.generate(ids, attention_mask=mask, max_new_tokens=3, pad_token_id=0, eos_token_id=None)
    first, *later = [step.decision.layers.sum(-1) // 4 for step in trace.steps]
    assert first[:, -1].eq(2).all() and first[:, :-1].eq(1).all()
    assert all(one.eq(2).all() for one in later)


def test_controls_choose_as_they_say(prompts):
    model, (ids, mask) = model_of("llama"), prompts

    def passes(judge):
        trace = Trace()
        with torch.inference_mode(), attach(model, ThinkAtHard(decider=judge), trace=trace):
            logits(model, ids, mask)
        return trace.steps[0].decision.layers.sum(-1) // 4

    plain = logits(model, ids, mask).detach().log_softmax(-1)
    entropy = -(plain.exp() * plain).sum(-1)
    level = float(entropy[mask.bool()].median())
    assert torch.equal((passes(ByEntropy(level)) == 2)[mask.bool()], (entropy > level)[mask.bool()])
    long = torch.zeros(1, 4000, dtype=torch.long)
    places = torch.arange(4000)[None]
    view = PassView(long == 0, 4, positions=places, passed=1, passes=long + 1, asked=long == 0)
    assert abs(float(ByChance(0.07).chances(view).mean()) - 0.07) < 0.02
    assert not torch.equal(ByChance(0.5).chances(view), ByChance(0.5, seed=1).chances(view))


def test_oracle_passes_are_shares_of_the_hardest():
    losses = torch.randn(4, 25, generator=torch.Generator().manual_seed(0))
    passes = oracle_passes(losses, (0.88, 0.08, 0.04))
    assert [int((passes == n).sum()) for n in (1, 2, 3)] == [88, 8, 4]
    assert losses[passes == 3].min() > losses[passes == 2].max() > losses[passes == 1].max()
    with pytest.raises(BadRequest, match="add to 1"):
        oracle_passes(losses, (0.5, 0.4))


def test_the_decider_has_the_size_of_the_papers():
    sizes = {(1024, (0, 7, 13, 20, 26), 256): 5e6, (2048, (2, 10, 18, 26), 512): 18e6}
    for (width, layers, inner), wanted in sizes.items():
        count = sum(weight.numel() for weight in NeuralDecider(width, layers, inner).parameters())
        assert abs(count / wanted - 1) < 0.06

    class Config:
        hidden_size, num_hidden_layers, vocab_size = 8, 28, 500

    class Model(torch.nn.Module):
        config = Config()

    assert NeuralDecider.for_model(Model()).layers == (0, 7, 13, 20, 26)


def test_decider_and_weights_come_back_as_saved_and_know_their_model(tmp_path, prompts):
    model, other = model_of("llama"), model_of("llama", seed=2)
    judge, low = decider(model).to(torch.bfloat16).float(), lora(model).to(torch.bfloat16).float()
    judge.about["shares"] = [1 - place / 1000 for place in range(1001)]
    judge.save(tmp_path)
    low.save(tmp_path)
    made = ThinkAtHard(decider=judge, lora=low, threshold=None, budget=Budget(fraction=0.4))
    found = ThinkAtHard(decider=str(tmp_path), lora=str(tmp_path), threshold=None, budget=Budget(fraction=0.4))
    assert found.level() == pytest.approx(0.6)
    with torch.inference_mode(), attach(model, made):
        wanted = logits(model, *prompts)
    with torch.inference_mode(), attach(model, found):
        assert torch.equal(logits(model, *prompts), wanted)
    before = fingerprint(other)
    for policy in (dataclasses.replace(found, lora=None), dataclasses.replace(found, decider=None, threshold=0.5)):
        with pytest.raises(BadRequest, match="trained for the model with signature"), attach(other, policy):
            pass
    assert fingerprint(other) == before


def test_a_cache_of_another_kind_is_refused(prompts):
    model, (ids, mask) = model_of("llama"), prompts
    cache = StaticCache(config=model.config, max_cache_len=32)
    with attach(model, ThinkAtHard()), pytest.raises(BadRequest, match="DynamicCache, got StaticCache"):
        logits(model, ids, mask, past_key_values=cache)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda model: ThinkAtHard(threshold=1.5), "threshold=1.5 is a probability"),
        (lambda model: ThinkAtHard(sees="none"), "sees='none' is unknown"),
        (lambda model: ThinkAtHard(passes=0), "passes=0 and top=100 must be at least 1"),
        (lambda model: ThinkAtHard(budget=Budget(layers=2)), "layers=2 says nothing about passes"),
        (lambda model: ThinkAtHard(decider="/nowhere"), "no decider at"),
        (lambda model: ThinkAtHard(lora="/nowhere"), "no low-rank weights at"),
        (lambda model: ThinkAtHard(decider=ByEntropy(1.0), threshold=None), "asks a trained decider"),
        (lambda model: ThinkAtHard(decider=decider(model), threshold=None), "does not know what share"),
        (lambda model: ThinkAtHard(decider=NeuralDecider(32, (1, 0))), "must be rising numbers"),
    ],
)
def test_refuses(build, message):
    model = model_of("llama")
    before = fingerprint(model)
    with pytest.raises(BadRequest, match=message), attach(model, build(model)):
        pass
    assert fingerprint(model) == before


def test_a_model_that_fills_a_canvas_is_refused():
    model = model_of("llama")
    model.config.is_causal = False
    with pytest.raises(BadRequest, match="reads in both directions"), attach(model, ThinkAtHard()):
        pass
