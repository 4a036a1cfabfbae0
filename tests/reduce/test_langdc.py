"""Clips: tokens that a policy makes and keeps, LangDC's experts, fixed pooling and places by lot."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest
import torch
from transformers import DynamicCache

from pertoken.core.attach import active, attach
from pertoken.core.budget import Budget
from pertoken.core.errors import BadRequest
from pertoken.core.fingerprint import fingerprint
from pertoken.core.policy import View
from pertoken.core.trace import Trace
from pertoken.models.llava import VIDEO as SHOWN
from pertoken.models.llava import Llava
from pertoken.reduce.clips import pooled_to
from pertoken.reduce.expert import ABOUT, Expert
from pertoken.reduce.fixed_pooling import FixedPooling, grid
from pertoken.reduce.langdc import FIRST, WRITTEN, LangDC
from pertoken.reduce.language import REPORT
from pertoken.reduce.random_places import RandomPlaces
from tests.reduce.families import (
    FRAMES,
    PLACES,
    SIZE,
    TEXTS,
    VIDEO,
    clip_prompts,
    clips,
    encoder,
    expert,
    llava,
    watcher,
)

LIMIT = 9


@pytest.fixture(scope="module")
def model():
    return watcher()


@pytest.fixture(scope="module")
def small(model):
    return expert(model)


def policies(model, small):
    return [
        LangDC(expert=small, limit=LIMIT),
        LangDC(expert=small, limit=LIMIT, end_bias=1.5),
        FixedPooling(Budget(fraction=0.3)),
        RandomPlaces(Budget(fraction=0.3)),
    ]


def logits(model, given):
    mask = given["attention_mask"]
    with torch.inference_mode():
        return model(**given, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits


def written(model, given, **options):
    with torch.inference_mode():
        out = model.generate(**given, max_new_tokens=5, do_sample=False, suppress_tokens=[VIDEO], **options)
    return out[:, given["input_ids"].shape[1] :]


def only(given, row):
    """A row by itself, without its padding."""
    kept = given["attention_mask"][row].bool()
    return {
        "input_ids": given["input_ids"][row : row + 1, kept],
        "attention_mask": given["attention_mask"][row : row + 1, kept],
        "pixel_values_videos": given["pixel_values_videos"][row : row + 1],
    }


def text_of(given, row, found):
    """What was found at the tokens of a row's text."""
    ids, mask = given["input_ids"][row], given["attention_mask"][row].bool()
    return found[mask & (ids != VIDEO)]


def naive(model, small, clip, limit, end_bias=0.0):
    """Tokens of one clip `[token, width]`, token by token, each description read anew for every word."""
    llava = Llava(model, SHOWN)
    states = llava.frames(clip[None])[0]
    side = small.setting.base
    cells = states.shape[1] // side**2
    tokens = []
    for frame in states:
        grid_ = frame.reshape(side, 8 // side, side, 8 // side, -1).transpose(1, 2).reshape(side * side, cells, -1)
        tokens += [llava.projected(cell.mean(0)) for cell in grid_]
    span = small.setting.span
    for start in range(0, len(states), span):
        frames = [states[min(i, len(states) - 1)] for i in range(start, start + span)]
        seen = []
        for frame in frames:
            projected = small.project(frame).reshape(2, 4, 2, 4, -1)
            seen += [projected[i, :, j].flatten(0, 1).mean(0) for i in range(2) for j in range(2)]
        words = list(small.setting.prompt)
        table = small.language.get_input_embeddings().weight
        said = []
        while True:
            embeds = torch.cat([torch.stack(seen), table[torch.tensor(words)]])[None]
            law = small.language(inputs_embeds=embeds, use_cache=False).logits[0, -1].clone()
            law[small.setting.end] += end_bias
            word = int(law.argmax())
            if (word == small.setting.end and said) or len(said) == limit:
                break
            words.append(word)
            embeds = torch.cat([torch.stack(seen), table[torch.tensor(words)]])[None]
            out = small.language(inputs_embeds=embeds, use_cache=False, output_hidden_states=True)
            said.append(small.post(small.norm(out.hidden_states[small.setting.layer][0, -1])))
            if word == small.setting.end:
                break
        tokens += said
    return torch.stack(tokens)


@pytest.mark.parametrize("end_bias", [0.0, 1.5])
def test_the_host_reads_what_the_naive_twin_makes(model, small, end_bias):
    given = clip_prompts()
    with attach(model, LangDC(expert=small, limit=LIMIT, end_bias=end_bias)) as attached:
        found = logits(model, given)
        kept = attached.state[REPORT]["kept"]
    with torch.inference_mode():
        own = [naive(model, small, clip, LIMIT, end_bias) for clip in given["pixel_values_videos"]]
        assert kept == [len(tokens) for tokens in own] and len(set(kept)) > 1
        for row, tokens in enumerate(own):
            alone = only(given, row)
            ids = alone["input_ids"][0]
            table = model.get_input_embeddings().weight
            first = int((ids == VIDEO).nonzero()[0])
            embeds = torch.cat([table[ids[:first]], tokens, table[ids[first + PLACES :]]])[None]
            hidden = model.model.language_model(inputs_embeds=embeds).last_hidden_state
            expected = model.lm_head(hidden)[0]
            expected = torch.cat([expected[:first], expected[first + len(tokens) :]])
            assert torch.allclose(text_of(given, row, found[row]), expected, atol=1e-3)


def test_states_are_the_same_decoded_and_read(model, small):
    states = Llava(model, SHOWN).frames(clips(4))
    segments = small.segments(states)
    said = small.describe(segments, LIMIT)
    read = small.carried(small.read(segments, said.ids), said.ids.shape[1])
    assert torch.allclose(said.hidden, read, atol=1e-5)
    assert len(set(said.written.sum(-1).tolist())) > 1
    for row in range(len(segments)):
        alone = small.describe(segments[row : row + 1], LIMIT)
        count = max(int(alone.written.sum()), 1)
        assert int(said.written[row].sum()) == int(alone.written.sum())
        assert torch.allclose(alone.hidden[0, :count], said.hidden[row, :count], atol=1e-5)


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_ragged_batch_is_each_row_alone(model, small, number, side):
    given, policy = clip_prompts(side), policies(model, small)[number]
    with attach(model, policy) as attached:
        together = logits(model, given)
        kept = attached.state[REPORT]["kept"]
        if isinstance(policy, LangDC):
            assert len(set(kept)) > 1
        for row in range(3):
            alone = logits(model, only(given, row))
            own = text_of(only(given, row), 0, alone[0])
            assert torch.allclose(text_of(given, row, together[row]), own, atol=1e-3)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("tower", ["vit", "clip"])
def test_writing_with_a_cache_is_reading_it_all_again(text, tower):
    model = watcher(text, tower)
    for policy in policies(model, expert(model)):
        with attach(model, policy):
            said = written(model, clip_prompts())
            assert torch.equal(said, written(model, clip_prompts(), use_cache=False))
            assert torch.equal(said[1], written(model, only(clip_prompts(), 1))[0])
            written(model, clip_prompts(), num_beams=2)


@pytest.mark.parametrize("number", range(4))
def test_full_budget_is_the_model_and_undo_is_exact(model, small, number):
    policy = policies(model, small)[number]
    expected, before = logits(model, clip_prompts()), fingerprint(model, deep=True)
    with attach(model, dataclasses.replace(policy, budget=Budget.full())):
        assert torch.equal(logits(model, clip_prompts()), expected)
    with attach(model, dataclasses.replace(policy, budget=Budget.full()), trace=Trace()):
        assert torch.allclose(logits(model, clip_prompts()), expected, atol=1e-5)
    with attach(model, policy) as attached:
        assert not torch.allclose(logits(model, clip_prompts()), expected, atol=1e-3)
        with attached.disabled():
            assert torch.equal(logits(model, clip_prompts()), expected)
        with pytest.raises(ValueError, match="both decide video tokens"), attach(model, policy):
            pass
    assert fingerprint(model, deep=True) == before and not active(model)


@pytest.mark.parametrize("number", range(4))
def test_replay_serves_the_recording(model, small, number, tmp_path):
    policy, recorded, again = policies(model, small)[number], Trace(), Trace()
    with attach(model, policy, trace=recorded):
        expected = logits(model, clip_prompts())
    recorded.save(tmp_path / "trace")
    loaded = Trace.load(tmp_path / "trace")
    other = dataclasses.replace(policy, end_bias=50.0) if isinstance(policy, LangDC) else policy
    if isinstance(policy, LangDC):
        with attach(model, policy, replay=loaded, trace=again):
            assert torch.allclose(logits(model, clip_prompts()), expected, atol=1e-4)
        assert again.same_as(recorded)
        with attach(model, other) as attached:
            logits(model, clip_prompts())
            assert min(attached.state[REPORT]["kept"]) == FRAMES + 2
    else:
        with attach(model, dataclasses.replace(policy), replay=loaded, trace=again):
            assert torch.equal(logits(model, clip_prompts()), expected)
        assert again.same_as(recorded)


def test_the_decision_is_its_naive_twin(small):
    generator = torch.Generator().manual_seed(1)
    written_ = torch.rand(5, 12, generator=generator) < 0.5
    first = torch.zeros(5, 12, dtype=torch.bool)
    first[:, [0, 6]] = True
    valid = torch.ones(5, 12, dtype=torch.bool)
    valid[2, 9:] = False
    found = LangDC(expert=small).decide(View(valid, 0, {WRITTEN: written_, FIRST: first}))
    for row in range(5):
        for place in range(12):
            stays = valid[row, place] and (written_[row, place] or place in (0, 6))
            assert bool(found.keep[row, place]) == bool(stays)


def test_a_budget_and_a_bias_make_descriptions_shorter(model, small):
    given, counts = clip_prompts(), []
    for bias in (-50.0, 0.0, 1.5, 50.0):
        with attach(model, LangDC(expert=small, limit=LIMIT, end_bias=bias)) as attached:
            logits(model, given)
            counts.append(attached.state[REPORT]["kept"])
    assert counts[0] == [FRAMES + 2 * LIMIT] * 3 and counts[-1] == [FRAMES + 2] * 3
    assert all(a >= b for one, other in itertools.pairwise(counts) for a, b in zip(one, other, strict=True))
    with attach(model, LangDC(Budget(tokens=FRAMES + 7), expert=small, end_bias=-50.0)) as attached:
        logits(model, given)
        assert attached.state[REPORT] == {"kept": [FRAMES + 6] * 3, "full": PLACES}


def test_the_last_frame_fills_the_last_segment(model, small):
    states = Llava(model, SHOWN).frames(clips(2, 4))
    segments = small.segments(states)
    assert segments.shape[:2] == (4, 3)
    assert torch.equal(segments[1], torch.stack([states[0, 3]] * 3))
    assert torch.equal(segments[2], states[1, :3])
    with attach(model, LangDC(Budget.full(), expert=small)):
        assert logits(model, clip_prompts(frames=4)).isfinite().all()


def test_pooling_is_a_mean_over_cells():
    states = torch.randn(2, 3, 16, 5)
    found = pooled_to(states, 2, 4)
    square = states.reshape(2, 3, 4, 4, 5)
    for clip in range(2):
        for frame in range(3):
            for row in range(2):
                for column in range(4):
                    cell = square[clip, frame, 2 * row : 2 * row + 2, column].mean(0)
                    assert torch.allclose(found[clip, frame * 8 + row * 4 + column], cell, atol=1e-6)
    with pytest.raises(BadRequest, match="no squares"):
        pooled_to(torch.randn(1, 1, 15, 2), 1, 1)
    with pytest.raises(BadRequest, match="5 x 1"):
        pooled_to(states, 5, 1)


def test_grids_are_the_largest_that_fit():
    assert [grid(n, 8) for n in (1, 2, 3, 4, 6, 8, 9, 16, 64)] == [
        (1, 1), (1, 2), (1, 2), (2, 2), (2, 3), (2, 4), (3, 3), (4, 4), (8, 8),
    ]  # fmt: skip


def test_baselines_keep_what_the_budget_says(model):
    for policy, count in ((FixedPooling(Budget(tokens=27)), 24), (RandomPlaces(Budget(tokens=27)), 27)):
        with attach(model, policy) as attached:
            logits(model, clip_prompts())
            assert attached.state[REPORT]["kept"] == [count] * 3
    with attach(model, RandomPlaces(Budget(fraction=0.2))):
        one = logits(model, clip_prompts())
    with attach(model, RandomPlaces(Budget(fraction=0.2), seed=1)):
        assert not torch.allclose(logits(model, clip_prompts()), one, atol=1e-3)


def test_parts_are_saved_and_loaded(model, small, tmp_path):
    small.save(tmp_path, model)
    loaded = Expert.load(tmp_path)
    assert loaded.setting == small.setting
    with attach(model, LangDC(expert=small, limit=LIMIT)):
        expected = logits(model, clip_prompts())
    with attach(model, LangDC(expert=str(tmp_path), limit=LIMIT)):
        assert torch.allclose(logits(model, clip_prompts()), expected, atol=1e-5)


def test_bf16_runs():
    low = watcher().bfloat16()
    given = clip_prompts() | {"pixel_values_videos": clips().bfloat16()}
    for policy in policies(low, expert(low)):
        with attach(low, policy):
            assert logits(low, given).isfinite().all()


def test_training_reaches_the_projection(model):
    small = expert(model)
    given = clip_prompts()
    with attach(model, LangDC(expert=small, limit=LIMIT), training=True):
        model(**given, labels=given["input_ids"].masked_fill(given["input_ids"] == VIDEO, -100)).loss.backward()
    assert small.post.weight.grad is not None and small.post.weight.grad.abs().sum() > 0
    model.zero_grad()


def test_text_alone_is_the_model_itself(model, small):
    given = {"input_ids": torch.tensor([[1, 5, 9]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    expected = logits(model, given)
    with attach(model, LangDC(expert=small)):
        assert torch.equal(logits(model, given), expected)


def test_bad_input_is_refused_in_a_sentence(model, small, tmp_path):
    given = clip_prompts()
    with torch.inference_mode(), attach(model, LangDC(expert=small, limit=LIMIT)):
        for clip, message in (
            (torch.zeros(3, 0, 3, SIZE, SIZE), "0 frames"),
            (torch.zeros(3, FRAMES, 3, 4, 4), "4 x 4 pixels"),
            (torch.zeros(3, 3, SIZE, SIZE), "stack the frames"),
        ):
            with pytest.raises(BadRequest, match=message):
                model(**given | {"pixel_values_videos": clip})
        with pytest.raises(BadRequest, match="got -1"):
            model(**given, vision_feature_layer=-1)
        begun = model(input_ids=torch.ones(3, 1, dtype=torch.long), past_key_values=DynamicCache(), use_cache=True)
        with pytest.raises(BadRequest, match="the first forward"):
            longer = torch.cat([torch.ones(3, 1, dtype=torch.long), given["attention_mask"]], 1)
            model(**given | {"attention_mask": longer}, past_key_values=begun.past_key_values)
    scarce = LangDC(Budget(tokens=FRAMES + 1), expert=small)
    wanted = pytest.raises(BadRequest, match=f"tokens={FRAMES + 2}")
    with torch.inference_mode(), attach(model, scarce), wanted:
        model(**given)
    for wrong in (llava(), encoder("vit"), model.model.language_model):
        with pytest.raises(BadRequest, match="LLaVA-NeXT-Video"), attach(wrong, LangDC(expert=small)):
            pass
    other = watcher("qwen2")
    with pytest.raises(BadRequest, match="signature"), attach(other, LangDC(expert=small)):
        pass
    with pytest.raises(BadRequest, match="needs an expert"), attach(model, LangDC()):
        pass
    with pytest.raises(BadRequest, match="holds no parts"), attach(model, LangDC(expert=tmp_path / "none")):
        pass
    small.save(tmp_path, model)
    (tmp_path / ABOUT).write_text(json.dumps({"format": "another"}))
    with pytest.raises(BadRequest, match="holds no parts"):
        Expert.load(tmp_path)
    with pytest.raises(BadRequest, match="limit=0"):
        LangDC(limit=0)
    with pytest.raises(BadRequest, match="layers=2"):
        LangDC(Budget(layers=2))
    with pytest.raises(BadRequest, match="layer=7"):
        expert(model, layer=7)
    with pytest.raises(BadRequest, match="span=0"):
        expert(model, span=0)
    assert not active(model)
