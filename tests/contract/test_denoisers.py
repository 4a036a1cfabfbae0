"""Laws of every registered rule of the denoising loop, on every family, with no word about any one of them."""

from __future__ import annotations

import dataclasses
import inspect
import itertools

import pytest
import torch

from pertoken.core.attach import attach
from pertoken.core.budget import Budget
from pertoken.core.card import card, cards
from pertoken.core.errors import BadRequest
from pertoken.core.fingerprint import fingerprint
from pertoken.core.trace import Trace
from pertoken.denoise import COMMIT, REFRESH, is_rule, make
from pertoken.denoise.learn2pd import Filter
from pertoken.denoise.loop import Denoise
from tests.bench import toys
from tests.contract.conftest import END, FAMILIES, POLICIES, attachable, built
from tests.denoise.conftest import MASK, alone, bidirectional, fill, prompts

BLOCK, LENGTH = 4, 8
RULES = {name: one for name, one in cards().items() if is_rule(one)}
SLOTS = {
    slot: [name for name, one in RULES.items() if one.build.slot == slot]
    for slot in ("commit", "refresh", "canvas", "constraint")
}
STEADY = [name for name, one in RULES.items() if "noise" not in one.reads]
PAIRS = [
    "+".join(names)
    for names in itertools.product(SLOTS["commit"], SLOTS["refresh"], ["", *SLOTS["canvas"]])
    for names in [filter(None, names)]
]


def given() -> dict:
    """What rules may need, by the names that their cards use."""
    torch.manual_seed(3)
    net = Filter(BLOCK)
    for weight in net.parameters():
        weight.data.mul_(4)
    return {"filter": net, "tokenizer": toys.tokenizer()}


def decoder(name, **options):
    """The decoder of a rule or several; a sliding block is as long as the others, for which the filter is made."""
    takes = {key for part in name.split("+") for key in inspect.signature(card(part).build).parameters}
    return make(name, **(given() | {"block": BLOCK} | {key: BLOCK for key in ("window",) if key in takes} | options))


def sharp(family):
    """A model of the family that fills in a canvas, and is sure of itself now and then."""
    model = bidirectional(family)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 3)
    return model


@pytest.fixture(scope="session")
def filler(family):
    return sharp(family)


@pytest.fixture(scope="session")
def llama():
    return sharp("llama")


@pytest.mark.parametrize("name", STEADY)
def test_each_row_is_what_it_is_alone_and_in_any_order(filler, name):
    inputs, rule = prompts(7, 3, 12), decoder(name)
    torch.manual_seed(5)
    together = fill(filler, inputs, rule, LENGTH, eos_token_id=END)
    assert len({tuple(row.tolist()) for row in together}) == 3, "rows must differ for this to say anything"
    torch.manual_seed(6)  # a rule that does not read noise does not depend on the seed
    for row in range(3):
        assert fill(filler, alone(inputs, row), rule, LENGTH, eos_token_id=END)[0].tolist() == together[row].tolist()
    order = torch.tensor([2, 0, 1])
    permuted = fill(filler, {key: value[order] for key, value in inputs.items()}, rule, LENGTH, eos_token_id=END)
    assert permuted.equal(together[order])


@pytest.mark.parametrize("name", RULES)
def test_model_is_left_as_it_was(filler, name):
    before = fingerprint(filler, deep=True)
    fill(filler, prompts(5, 8), decoder(name), LENGTH)
    assert fingerprint(filler, deep=True) == before

    def fail(ids, scores):
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fill(filler, prompts(5, 8), decoder(name), LENGTH, logits_processor=[fail])
    assert fingerprint(filler, deep=True) == before


@pytest.mark.parametrize("name", RULES)
def test_a_sampled_recording_can_be_saved_and_replayed_and_its_counts_add_up(filler, name, tmp_path):
    inputs, rule, sampled = prompts(5, 8), decoder(name), {"do_sample": True, "top_k": 0}
    torch.manual_seed(11)
    with rule.record() as trace:
        first = fill(filler, inputs, rule, LENGTH, **sampled)
    counts, steps = dataclasses.asdict(rule.stats), list(trace.at(COMMIT))
    assert counts["steps"] == len(steps) and counts["row_steps"] == sum(len(step.rows) for step in steps)
    assert counts["token_forwards"] == sum(int(step.decision.spent().sum()) for step in trace.at(REFRESH))
    assert counts["tokens"] == first.numel() == sum(int(step.decision.spent().sum()) for step in steps)
    trace.save(tmp_path / "trace")
    loaded = Trace.load(tmp_path / "trace")
    assert loaded.same_as(trace)
    torch.manual_seed(12)
    with rule.replay(loaded), rule.record() as again:
        assert fill(filler, inputs, rule, LENGTH, **sampled).equal(first)
    assert again.same_as(trace)
    same = ("steps", "row_steps", "token_forwards", "tokens")
    assert [getattr(rule.stats, key) for key in same] == [counts[key] for key in same]


@pytest.mark.parametrize("name", SLOTS["commit"])
def test_every_position_is_committed_once_in_its_block_and_each_step_gets_on(filler, name):
    inputs, rule = prompts(5, 8), decoder(name)
    with rule.record() as trace:
        fill(filler, inputs, rule, LENGTH)
    start, times = inputs["input_ids"].shape[1], torch.zeros(2, LENGTH, dtype=torch.long)
    for step in trace.at(COMMIT):
        chosen = step.decision.keep
        assert not chosen[:, :start].any(), "a prompt is not committed"
        assert bool(chosen.any(-1).all()), "one step per position: each row commits at least its quota of one"
        blocks = torch.arange(LENGTH) // BLOCK
        for row, kept, block in zip(step.rows, chosen[:, start:], step.note["block"], strict=True):
            assert set(blocks[kept].tolist()) == {block}
            times[row] += kept
    assert times.eq(1).all()
    assert rule.stats.steps <= LENGTH


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("name", SLOTS["refresh"])
def test_a_full_refresh_is_no_cache_bit_for_bit(filler, name, shift):
    build = card(name).build
    own = {field.name for field in dataclasses.fields(build)}
    rule = build(**{key: value for key, value in build.full.items() if key in own})
    loop = {"block": BLOCK, "shift": shift} | {key: value for key, value in build.full.items() if key not in own}
    traces, outputs = [], []
    for side in (Denoise(refresh=rule, **loop), Denoise(sliding=rule.sliding, **loop)):
        with side.record() as trace:
            outputs.append(fill(filler, prompts(6, 10), side, LENGTH))
        traces.append(trace)
    assert outputs[0].equal(outputs[1]) and traces[0].same_as(traces[1])


@pytest.mark.parametrize("name", [name for name in SLOTS["refresh"] if card(name).exactness == "approximate"])
def test_a_refresh_rule_saves_work(llama, name):
    spent = []
    for side in (decoder(name), Denoise(block=BLOCK)):
        fill(llama, prompts(20, 24), side, LENGTH)
        spent.append(side.stats.token_forwards)
    assert spent[0] < spent[1]


@pytest.mark.parametrize("name", SLOTS["canvas"])
def test_without_an_end_of_text_a_canvas_rule_changes_nothing(filler, name):
    traces = []
    for side in (decoder(name), Denoise(block=BLOCK)):
        with side.record() as trace:
            fill(filler, prompts(6, 10), side, LENGTH)
        traces.append(trace)
    assert traces[0].same_as(traces[1])


@pytest.mark.parametrize("name", SLOTS["canvas"])
def test_with_an_end_of_text_a_canvas_rule_saves_work_and_nothing_follows_the_end(llama, name):
    inputs, spent = prompts(6, 10), []
    with torch.inference_mode():
        end = int(fill(llama, inputs, Denoise(block=BLOCK), LENGTH)[0, 1])  # a token that the model does write
    for side in (decoder(name), Denoise(block=BLOCK)):
        out = fill(llama, inputs, side, LENGTH, eos_token_id=end)
        spent.append(side.stats.row_steps)
    for row in fill(llama, inputs, decoder(name), LENGTH, eos_token_id=end).tolist():
        assert end not in row or set(row[row.index(end) + 1 :]) <= {0}
    assert end in out[0].tolist() and spent[0] < spent[1]


@pytest.mark.parametrize("name", PAIRS)
def test_rules_of_different_slots_go_together(llama, name):
    inputs, both = prompts(5, 8), decoder(name)
    before = fingerprint(llama)
    with both.record() as trace:
        out = fill(llama, inputs, both, LENGTH, eos_token_id=END)
    assert not (out == MASK).any()
    assert torch.stack([s.decision.keep.sum() for s in trace.at(COMMIT)]).gt(0).all()
    with both.replay(trace):
        assert fill(llama, inputs, both, LENGTH, eos_token_id=END).equal(out)
    if all("noise" not in card(part).reads for part in name.split("+")):
        assert fill(llama, alone(inputs, 0), both, LENGTH, eos_token_id=END)[0].equal(out[0])
    assert fingerprint(llama) == before


@pytest.mark.parametrize("slot", [slot for slot, names in SLOTS.items() if len(names) > 1])
def test_two_rules_of_one_slot_are_refused_in_one_sentence(slot):
    for pair in itertools.combinations(SLOTS[slot], 2):
        with pytest.raises(BadRequest, match=f"{pair[0]} and {pair[1]} both decide {slot}"):
            decoder("+".join(pair))


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_goes_under_the_loop(filler, policy):
    """The pair (policy, loop): the full budget changes nothing, the default one fills the canvas all the same."""
    inputs, side, one = prompts(5, 8), Denoise(block=BLOCK), built(policy)
    expected, before = fill(filler, inputs, side, LENGTH), fingerprint(filler)
    attachable(filler, one)
    with attach(filler, dataclasses.replace(one, budget=Budget.full())):
        assert fill(filler, inputs, side, LENGTH).equal(expected)
    with attach(filler, one):
        changed = fill(filler, inputs, side, LENGTH)
    assert not (changed == MASK).any() and not changed.equal(expected)
    assert fingerprint(filler) == before


def test_every_rule_and_family_is_covered():
    assert {"llama", "qwen3", "gpt2", "mistral", "gemma"} <= set(FAMILIES)
    assert len(SLOTS["commit"]) >= 8 and len(SLOTS["refresh"]) >= 6 and len(SLOTS["canvas"]) >= 2
    assert {need for one in RULES.values() for need in one.needs} <= {"diffusion", *given()}
    assert all(one.writes == {one.build.slot} for one in RULES.values())
