"""Leaving early: Stop & Exit and its controls against their definition, token by token."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from pertoken.core.attach import attach
from pertoken.core.budget import Budget
from pertoken.core.cost import count_flops
from pertoken.core.errors import BadRequest
from pertoken.core.fingerprint import fingerprint
from pertoken.core.trace import Trace
from pertoken.decode.del_ import DEL
from pertoken.decode.dyspec import DySpec
from pertoken.decode.full import Full
from pertoken.decode.lossless import lossless
from pertoken.depth.controller import Controller
from pertoken.depth.fixed_exit import FixedExit
from pertoken.depth.random_exit import RandomExit, uniform
from pertoken.depth.stop_exit import StopExit
from pertoken.models.adapter import adapter_for
from pertoken.models.signature import signature
from tests.contract.conftest import VOCABULARY
from tests.depth import naive
from tests.depth.conftest import model_of, rows

NEW = 14


def controller(model, heads=False, seed=3):
    torch.manual_seed(seed)
    found = Controller(32, (1, 2, 3), VOCABULARY if heads else None, {"model": signature(model)})
    with torch.no_grad():
        found.judge.weight.normal_(std=0.4)
        for head in found.heads.values():
            head.weight.mul_(2)
    return found.eval()


def generate(model, ids, mask, decoder=None, new=NEW, end=None):
    extra = {} if decoder is None else {"custom_generate": decoder}
    options = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0, "eos_token_id": end}
    out = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, output_logits=True, **options, **extra)
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, 1)


class Twin:
    """One row under Stop & Exit, by the digest: after each checked layer of a generated token look at its state."""

    def __init__(self, model, judge, exit, stop):
        self.model, self.judge, self.exit, self.stop = model, judge, exit, stop
        self.left, self.stopped, self.layers = {}, {}, []

    def runs(self, position, prompt, layer, hidden):
        if position in self.left:
            return False
        if layer and layer in self.judge.layers and position >= prompt:
            p = self.judge(hidden[0, 0]).softmax(-1).tolist()
            best = p.index(max(p))
            if best == 0 and self.stop is not None and p[0] > self.stop:
                self.left[position], self.stopped[position] = layer, True
            elif best == 1 and self.exit is not None and p[1] > self.exit:
                self.left[position] = layer
        return position not in self.left

    def logits(self, position, hidden):
        adapter = adapter_for(self.model)
        if self.stopped.get(position):
            return None
        if self.judge.heads and position in self.left:
            return self.judge.heads[str(self.left[position])](hidden)[0, 0]
        return adapter.head(adapter.norm(hidden))[0, 0]

    def decode(self, prompt, new, end):
        """Tokens to the end of text, and how many layers each position ran."""
        adapter, tokens = adapter_for(self.model), list(prompt)
        cache = naive.ListCache(adapter)
        for position in range(len(prompt) + new - 1):
            ids, at = torch.tensor([[tokens[position]]]), torch.tensor([[position]])
            hidden = adapter.embed(ids, at)
            rotary, ran = adapter.rotary(hidden, at), 0
            for layer in range(adapter.depth):
                out = adapter.run_layer(layer, hidden, None, at, rotary, cache)  # writes keys in any case
                if self.runs(position, len(prompt), layer, hidden):
                    hidden, ran = out, ran + 1
            self.layers.append(ran)
            if position < len(prompt) - 1:
                continue
            logits = self.logits(position, hidden)
            tokens.append(end if logits is None else int(logits.argmax()))
            if tokens[-1] == end:
                break
        return tokens[len(prompt) :]


@pytest.mark.parametrize("heads", [False, True], ids=["shared head", "own heads"])
@torch.no_grad()
def test_ragged_batches_are_the_definition_token_by_token(target, prompts, heads):
    ids, mask = prompts
    judge = controller(target, heads)
    policy, depths = StopExit(controller=judge, exit=0.4, stop=0.75), set()
    with attach(target, policy):
        tokens, _ = generate(target, ids, mask, end=1)
        by_decoder, _ = generate(target, ids, mask, Full(), end=1)
    for row, given in enumerate(rows(ids, mask)):
        twin = Twin(target, judge, 0.4, 0.75)
        wanted = twin.decode(given, NEW, 1)
        assert tokens[row, : len(wanted)].tolist() == wanted
        assert by_decoder[row, : len(wanted)].tolist() == wanted
        assert tokens[row, len(wanted) :].eq(0).all()
        depths |= set(twin.layers)
    assert len(depths) > 1, "tokens must leave at unlike depths for this to say anything"


def test_thresholds_that_nothing_passes_change_no_token(target, prompts):
    wanted = generate(target, *prompts)[1]
    for policy in (
        StopExit(controller=controller(target), exit=None, stop=None),
        StopExit(controller=controller(target), exit=1.0, stop=1.0),
    ):
        with attach(target, policy):
            assert torch.equal(generate(target, *prompts, end=None)[1], wanted)


def test_what_is_cached_is_what_a_fresh_pass_gives(prompts):
    """Incremental logits are those of one forward over the text with the depths that the recording shows."""
    model, (ids, mask) = model_of("qwen3"), prompts
    trace, policy = Trace(), StopExit(controller=controller(model), exit=0.4, stop=None)
    with attach(model, policy, trace=trace):
        tokens, logits = generate(model, ids, mask)
    assert trace.steps and {step.decision.kind for step in trace.steps} == {"exit"}
    whole, kept = torch.cat([ids, tokens], 1), torch.cat([mask, mask.new_ones(tokens.shape)], 1)
    free = FromHere(controller=policy.controller, exit=0.4, stop=None, prompt=True, given=tuple(mask.sum(-1).tolist()))
    with attach(model, free), torch.no_grad():
        again = model(whole, attention_mask=kept, position_ids=(kept.cumsum(-1) - 1).clamp(min=0)).logits
    assert torch.allclose(again[:, ids.shape[1] - 1 : -1], logits, atol=2e-4)


@dataclasses.dataclass(frozen=True)
class FromHere(StopExit):
    """Nobody leaves before these places."""

    given: tuple[int, ...] = ()

    def after(self, view):
        return super().after(view) * (view.positions >= torch.tensor(self.given)[:, None])


@pytest.mark.parametrize("policy", ["stop_exit", "fixed", "random"])
def test_speculation_over_it_and_with_it_is_exact(target, prompts, policy):
    ids, mask = prompts
    policy = {
        "stop_exit": StopExit(controller=controller(target), exit=0.4, stop=None),
        "fixed": FixedExit(Budget(layers=2)),
        "random": RandomExit(((1, 0.3), (2, 0.3))),
    }[policy]
    dense, _ = generate(target, ids, mask)
    found, _ = generate(target, ids, mask, lossless(policy, size=4, economy=False))
    assert torch.equal(found, dense)
    trace = Trace()
    with attach(target, policy, trace=trace):
        alone, _ = generate(target, ids, mask)
    decided = [step.decision for step in trace.steps]
    assert any(((one.left > 0) & (one.left < target.config.num_hidden_layers) & one.valid).any() for one in decided)
    with attach(target, policy):
        assert torch.equal(generate(target, ids, mask, DySpec(size=5))[0], alone)
        assert torch.equal(generate(target, ids, mask, DEL(fixed=(2, 3)))[0], alone)


def test_fewer_operations_where_rows_leave(prompts):
    model = model_of("llama")
    ids = torch.randint(2, VOCABULARY, (4, 40))

    def cost(policy):
        with attach(model, policy), torch.inference_mode():
            return count_flops(lambda: model(ids))

    full = cost(FixedExit(Budget.full()))
    half = cost(FixedExit(Budget(layers=2), prompt=True))
    mixed = cost(RandomExit(((1, 0.5),), prompt=True))
    assert half < 0.75 * full and mixed < 0.9 * full


def test_random_exits_come_at_their_rates():
    drawn = uniform(torch.arange(20_000), seed=4)
    assert abs(float(drawn.mean()) - 0.5) < 0.01 and abs(float((drawn < 0.2).float().mean()) - 0.2) < 0.01
    assert not torch.equal(drawn, uniform(torch.arange(20_000), seed=5))


def test_replay_serves_the_recording_with_stops(prompts):
    model, (ids, mask) = model_of("llama"), prompts
    policy, recorded, again = StopExit(controller=controller(model), exit=0.4, stop=0.6), Trace(), Trace()
    with attach(model, policy, trace=recorded):
        first, _ = generate(model, ids, mask, end=1)
    other = dataclasses.replace(policy, exit=1.0, stop=1.0)
    with attach(model, other, trace=again, replay=recorded):
        assert torch.equal(generate(model, ids, mask, end=1)[0], first)
    assert again.same_as(recorded)


def test_controller_comes_back_as_it_was_saved_and_knows_its_model(tmp_path):
    model, other = model_of("llama"), model_of("llama", seed=2)
    made = controller(model, heads=True).to(torch.bfloat16).float()
    made.save(tmp_path)
    found = Controller.load(tmp_path)
    assert all(torch.equal(one, two) for one, two in zip(made.parameters(), found.parameters(), strict=True))
    before = fingerprint(other)
    with (
        pytest.raises(BadRequest, match="trained for the model with signature"),
        attach(other, StopExit(controller=found)),
    ):
        pass
    assert fingerprint(other) == before


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda model: StopExit(exit=1.5), r"exit=1.5 is a probability"),
        (
            lambda model: StopExit(controller=Controller(32, (1, 4))),
            "after .1, 4. layers; the model has width 32 and 4 layers",
        ),
        (lambda model: StopExit(controller=Controller(16, (1,))), "states of width 16"),
        (lambda model: StopExit(controller="/nowhere"), "no controller at"),
        (lambda model: Controller(32, (2, 1)), "must be numbers of layers run"),
        (lambda model: RandomExit(((1, 0.7), (2, 0.7))), "shares that add to at most 1"),
    ],
)
def test_refuses(build, message):
    model = model_of("llama")
    with pytest.raises(BadRequest, match=message), attach(model, build(model)):
        pass


def test_stopping_needs_an_end_of_text():
    model = model_of("llama")
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    with pytest.raises(BadRequest, match="no end-of-text token"), attach(model, StopExit(controller=controller(model))):
        pass
