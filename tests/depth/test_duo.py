"""Big and small modules: what each token gets is its definition, what it does not get is not computed."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from pertoken.core.attach import attach
from pertoken.core.budget import Budget
from pertoken.core.cost import count_flops
from pertoken.core.decision import Depth
from pertoken.core.errors import BadRequest
from pertoken.core.fingerprint import fingerprint
from pertoken.core.policy import View
from pertoken.core.trace import Trace
from pertoken.decode.dyspec import DySpec
from pertoken.decode.full import Full
from pertoken.decode.lossless import lossless
from pertoken.depth.duo import BIG, SKIP, SMALL, Duo, projections
from pertoken.depth.duo_llm import DuoLLM
from pertoken.depth.fixed_modules import FixedModules
from pertoken.depth.modules import GivenModules
from pertoken.depth.random_modules import RandomModules
from pertoken.depth.skipdecode import SkipDecode
from pertoken.models.adapter import adapter_for
from tests.depth import naive
from tests.depth.conftest import model_of, rows
from tests.depth.reading import continued

OPTIONS = ("big", "small", "skip")
INNER = 5


def duo_for(model, options=2, rank=0, seed=3):
    """Random routers and a table of margins that is not zero."""
    torch.manual_seed(seed)
    duo = Duo.for_model(model, INNER, OPTIONS[:options], rank)
    with torch.no_grad():
        duo.routers.normal_(std=0.2)
        duo.margins.copy_(torch.linspace(1, -1, len(duo.margins)))
        if duo.lora is not None:
            for weight in duo.lora.up:
                weight.normal_(std=0.2)
    return duo.eval()


class Twin:
    """One row under the digest's equations, one token and one layer after the other."""

    def __init__(self, model, duo, threshold):
        self.model, self.duo, self.threshold, self.taken = model, duo, threshold, []

    def block(self, layer, forward, x):
        logits = [float(row @ x[0, 0]) for row in self.duo.routers[layer]]
        best = max(range(1, len(logits)), key=lambda option: logits[option])
        option = BIG if logits[0] - logits[best] > self.threshold else best
        self.taken[-1].append(option)
        if option == BIG:
            return forward(x)
        if option == SKIP:
            return torch.zeros_like(x)
        small = self.duo.small[layer]
        inner = small.act(small.up.weight @ x[0, 0] if small.gate is None else small.gate.weight @ x[0, 0])
        inner = inner if small.gate is None else inner * (small.up.weight @ x[0, 0])
        return (small.down.weight @ inner).expand_as(x)

    @torch.no_grad()
    def read(self, tokens):
        """Logits `[token, vocabulary]`."""
        adapter, found = adapter_for(self.model), []
        cache = naive.ListCache(adapter)
        for position, token in enumerate(tokens):
            ids, at = torch.tensor([[token]]), torch.tensor([[position]])
            hidden = adapter.embed(ids, at)
            rotary = adapter.rotary(hidden, at)
            self.taken.append([])
            for layer in range(adapter.depth):
                module = adapter.feed_forward(layer)
                forward = module.forward
                module.forward = lambda x, layer=layer, forward=forward: self.block(layer, forward, x)
                hidden = adapter.run_layer(layer, hidden, None, at, rotary, cache)
                del module.forward
            found.append(adapter.head(adapter.norm(hidden))[0, 0])
        return torch.stack(found)


def logits(model, ids, mask, **options):
    with torch.no_grad():
        return model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), **options).logits


@pytest.mark.parametrize("options", [2, 3])
@torch.no_grad()
def test_ragged_batches_are_the_definition_token_by_token(target, prompts, options):
    ids, mask = prompts
    mask = mask.clone()
    mask[:, -1] = 1
    duo, trace = duo_for(target, options), Trace()
    policy = DuoLLM(Budget(layers=3), modules=duo)
    with attach(target, policy, trace=trace):
        found = continued(target, ids, mask, 5)
    taken = []
    for row, tokens in enumerate(rows(ids, mask)):
        twin = Twin(target, duo, duo.threshold(0.75))
        wanted = twin.read(tokens)
        assert torch.allclose(found[row, -len(tokens) :], wanted, atol=2e-4), row
        taken += itertools.chain.from_iterable(twin.taken)
    assert set(taken) == set(range(options)), "every option must be taken for this to say anything"
    spent = sum(int(step.decision.spent().sum()) for step in trace.steps)
    small = sum(int((step.decision.small & step.decision.valid[..., None]).sum()) for step in trace.steps)
    assert (spent, small) == (taken.count(BIG), taken.count(SMALL))


def test_all_big_is_the_model_bit_for_bit(target, prompts):
    wanted = continued(target, *prompts, 5)
    with attach(target, GivenModules(modules=duo_for(target), route=torch.full((1, 1, 4), BIG))):
        assert torch.equal(continued(target, *prompts, 5), wanted)


def test_operations_are_those_of_the_blocks_that_were_chosen(prompts):
    model, (ids, mask) = model_of("llama"), prompts
    duo, trace = duo_for(model, 3), Trace()
    dense = count_flops(lambda: logits(model, ids, mask))
    with attach(model, DuoLLM(modules=duo), trace=trace):
        found = count_flops(lambda: logits(model, ids, mask))
    real, everywhere = int(mask.sum()), ids.numel()
    big = sum(int(step.decision.spent().sum()) for step in trace.steps)
    small = sum(int((step.decision.small & step.decision.valid[..., None]).sum()) for step in trace.steps)
    assert 0 < big < 4 * real and small and big + small < 4 * real
    routers = 4 * everywhere * 2 * 32 * 3
    assert found == dense - 6 * 32 * 48 * (4 * everywhere - big) + 6 * 32 * INNER * small + routers


def test_gradients_are_those_of_masking(prompts):
    ids, mask = prompts
    route, found = torch.randint(3, (*ids.shape, 4), generator=torch.Generator().manual_seed(0)), []
    for gathered in (True, False):
        model = model_of("llama")
        duo = duo_for(model, 3)
        with attach(model, GivenModules(modules=duo, route=route if gathered else route * 0), training=True) as on:
            if not gathered:
                for layer in range(4):

                    def mixed(forward, x, layer=layer, duo=duo):
                        parts = torch.stack([forward(x), duo.small[layer](x), torch.zeros_like(x)])
                        return (
                            parts * torch.nn.functional.one_hot(route[..., layer], 3).permute(2, 0, 1)[..., None]
                        ).sum(0)

                    on.wrap(adapter_for(model).feed_forward(layer), mixed)
            out = model(ids, attention_mask=mask, use_cache=False).logits
            out[mask.bool()].square().mean().backward()
        found.append([weight.grad for one in (model, duo.small) for weight in one.parameters()])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, atol=1e-4 * float(other.abs().max() + 1e-6))


def test_decoders_over_it_write_what_it_writes_alone_and_lossless_is_dense(target, prompts):
    ids, mask = prompts
    policy = DuoLLM(modules=duo_for(target))
    options = {"attention_mask": mask, "max_new_tokens": 10, "pad_token_id": 0, "do_sample": False}
    dense = target.generate(ids, **options)
    with attach(target, policy):
        plain = target.generate(ids, **options)
        assert not torch.equal(plain, dense)
        assert torch.equal(target.generate(ids, custom_generate=Full(), **options), plain)
        assert torch.equal(target.generate(ids, custom_generate=DySpec(size=6), **options), plain)
    decoder = lossless(policy, size=4, economy=False)
    assert torch.equal(target.generate(ids, custom_generate=decoder, **options), dense)


@pytest.mark.parametrize("make", [DuoLLM, FixedModules, RandomModules])
def test_replay_serves_the_recording(make, prompts, tmp_path):
    model, (ids, mask) = model_of("qwen3"), prompts
    duo, recorded, again = duo_for(model, 3), Trace(), Trace()
    with attach(model, make(modules=duo), trace=recorded):
        first = model.generate(ids, attention_mask=mask, max_new_tokens=6)
    recorded.save(tmp_path / "trace")
    loaded = Trace.load(tmp_path / "trace")
    assert loaded.same_as(recorded)
    with attach(model, make(Budget.full(), modules=duo), trace=again, replay=loaded):
        assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=6), first)
    assert again.same_as(recorded)
    with attach(model, make(Budget.full()), replay=loaded), pytest.raises(BadRequest, match="tokens in small modules"):
        model(ids, attention_mask=mask)


def test_random_and_fixed_spend_the_same_for_every_token():
    valid = torch.ones(3, 40, dtype=torch.bool)
    view = View(valid, 12, positions=torch.arange(40).expand(3, -1) + torch.tensor([[0], [7], [0]]))
    for share in (0.0, 0.25, 0.5, 1.0):
        for policy in (RandomModules(Budget(fraction=share)), FixedModules(Budget(fraction=share))):
            decision = policy.decide(view)
            assert isinstance(decision, Depth) and (decision.layers.sum(-1) == 12 * share).all()
    layers = RandomModules().decide(view).layers
    assert torch.equal(layers[0], layers[2]) and torch.equal(layers[0, 7:], layers[1, :-7])
    assert len({tuple(token.tolist()) for token in layers[0]}) > 20
    many = View(torch.ones(1, 4000, dtype=torch.bool), 12)
    assert (RandomModules().decide(many).layers.float().mean((0, 1)) - 0.5).abs().max() < 0.05
    assert not torch.equal(layers, RandomModules(seed=1).decide(view).layers)
    route = (BIG, SMALL, SKIP, BIG)
    assert FixedModules(route=route).choose(View(valid, 4))[0, 0].tolist() == list(route)


def test_the_threshold_is_where_the_budget_s_share_was_above(target):
    duo = duo_for(target)
    for share, wanted in ((0.0, 1.0), (0.25, 0.5), (0.5, 0.0), (1.0, -1.0)):
        assert duo.threshold(share) == pytest.approx(wanted, abs=1e-6)


def test_small_blocks_begin_as_the_neurons_with_the_largest_weights(target):
    adapter = adapter_for(target)
    inner = projections(adapter.feed_forward(0))[1].shape[0]
    whole = Duo.for_model(target, inner)
    x = torch.randn(3, 32)
    with torch.no_grad():
        block = adapter.feed_forward(1)
        if target.config.model_type != "gpt2":  # whose block has biases, which start at zero
            assert torch.allclose(whole.small[1](x), block(x), atol=1e-4)
        mine, (_, up, down) = Duo.for_model(target, 2).small[1], projections(block)
        best = up.norm(dim=1) * down.norm(dim=0) * (1 if mine.gate is None else projections(block)[0].norm(dim=1))
        assert torch.equal(mine.down.weight, down[:, best.topk(2).indices])
    assert Duo.for_model(target).inner == inner // 16


def test_changes_of_big_blocks_hold_while_attached_or_for_good(target, prompts):
    model = copy.deepcopy(target)
    duo, wanted, before = duo_for(model, rank=2), logits(model, *prompts), fingerprint(model, deep=True)
    assert all(".mlp." in name for name in duo.lora.shapes)
    with attach(model, DuoLLM(modules=duo)):
        found = logits(model, *prompts)
    assert fingerprint(model, deep=True) == before
    with attach(model, DuoLLM(Budget.full(), modules=duo)):
        assert torch.equal(logits(model, *prompts), wanted)
    merged = duo.merged(model)
    assert not torch.allclose(logits(model, *prompts), wanted, atol=1e-3)
    with attach(model, DuoLLM(modules=merged)):
        kept = prompts[1].bool()
        assert torch.allclose(logits(model, *prompts)[kept], found[kept], atol=1e-3)
    with pytest.raises(BadRequest, match="trained for the model with signature"):
        duo.merged(model)


@pytest.mark.parametrize("rank", [0, 2])
def test_saved_and_loaded_it_is_the_same_and_knows_its_model(tmp_path, prompts, rank):
    model = model_of("gemma")
    duo = duo_for(model, 3, rank)
    duo.to(torch.bfloat16).float()
    duo.save(tmp_path)
    loaded = Duo.load(tmp_path)
    assert loaded.options == OPTIONS and loaded.about == duo.about
    for name, value in duo.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    with attach(model, DuoLLM(modules=duo)):
        wanted = logits(model, *prompts)
    with attach(model, DuoLLM(modules=str(tmp_path))):
        assert torch.equal(logits(model, *prompts), wanted)
    other = model_of("gemma", seed=2)
    with pytest.raises(BadRequest, match="trained for the model with signature"), attach(other, DuoLLM(modules=loaded)):
        pass


def test_runs_in_bf16(prompts):
    model, (ids, mask) = model_of("llama").bfloat16(), prompts
    with attach(model, DuoLLM(modules=duo_for(model, 3))):
        out = model.generate(ids, attention_mask=mask, max_new_tokens=4)
        assert logits(model, ids, mask).dtype == torch.bfloat16 and out.shape == (5, 18)


def test_refuses(tmp_path):
    model = model_of("llama")
    refused = {
        "no small modules at": lambda: DuoLLM(modules=str(tmp_path)),
        r"options=\('small', 'big'\) is unknown": lambda: Duo.for_model(model, options=("small", "big")),
        "inner=0": lambda: Duo.for_model(model, inner=0),
        r"route=\(0, 3\) must be": lambda: FixedModules(route=(0, 3)),
        "has 2 entries; the model has 4 layers": lambda: FixedModules(route=(0, 1)).choose(
            View(torch.ones(1, 1) > 0, 4)
        ),
    }
    for message, build in refused.items():
        with pytest.raises(BadRequest, match=message):
            build()
    with attach(model, SkipDecode()), pytest.raises(ValueError, match="both decide layers"), attach(model, DuoLLM()):
        pass
