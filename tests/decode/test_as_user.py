"""As a user of transformers: `model.generate(..., custom_generate=decoder)` with everything that generate takes."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    StoppingCriteria,
    StopStringCriteria,
    TextStreamer,
)

from pertoken.core.fingerprint import fingerprint
from pertoken.core.trace import Trace, TraceMismatch
from pertoken.decode import make
from pertoken.models.load import load
from tests.contract.conftest import COMMON, END, VOCABULARY

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)
NEW = 20
LENGTHS = (9, 3, 1, 12, 6)
NAMES = ("dyspec", "del", "prompt_lookup")


def llama(seed=1, layers=3, **changes):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**(COMMON | {"num_hidden_layers": layers} | changes))).eval()


def noisy(model, scale=0.06):
    """A draft that is often right: the model with noise on its weights."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * scale * weight.std())
    return other


@pytest.fixture(scope="module")
def model():
    return llama()


@pytest.fixture(scope="module")
def draft(model):
    return noisy(model)


@pytest.fixture(params=NAMES)
def decoder(request, draft):
    return make(request.param, draft=draft, **({"economy": False, "size": 12} if request.param == "dyspec" else {}))


@pytest.fixture
def dyspec(draft):
    return make("dyspec", draft=draft, economy=False, size=12)


def prompts(rows=5, side="left"):
    generator = torch.Generator().manual_seed(9)
    ids = torch.zeros(rows, max(LENGTHS[:rows]), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(LENGTHS[:rows]):
        own = torch.randint(2, VOCABULARY, (length,), generator=generator)
        at = slice(ids.shape[1] - length, None) if side == "left" else slice(0, length)
        ids[row, at], mask[row, at] = own, 1
    return {"input_ids": ids, "attention_mask": mask}


def generate(model, inputs, decoder=None, **options):
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0} | options
    if decoder is not None:
        options["custom_generate"] = decoder
    return model.generate(**inputs, **options)


class Favour(LogitsProcessor):
    """Raises one token that depends on what stands in the row so far, on where the row stands, and on how long it
    is."""

    def __call__(self, input_ids, scores):
        token = (input_ids[:, -1] * 3 + input_ids[:, -2] + input_ids.shape[1]) % VOCABULARY
        return scores.scatter_add(1, token[:, None], torch.full((len(scores), 1), 6.0, dtype=scores.dtype))


class InPlace(LogitsProcessor):
    """Writes into the scores it is given, as many do."""

    def __call__(self, input_ids, scores):
        scores[torch.arange(len(scores)), input_ids[:, -1]] = -torch.inf
        scores[:, ::7] -= 4.0
        return scores


def one_letter(batch, ids):
    """`prefix_allowed_tokens_fn` that gives every row of the batch its own tokens."""
    return list(range(2 + batch * 11, 13 + batch * 11))


RULES = {
    "repetition_penalty": {"repetition_penalty": 1.6},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "bad_words_ids": {"bad_words_ids": [[t] for t in range(4, 60, 3)] + [[5, 6], [8, 9]]},
    "suppress_tokens": {"suppress_tokens": list(range(2, 40))},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(2, 45))},
    "min_new_tokens": {"min_new_tokens": 15, "eos_token_id": list(range(1, 40))},
    "forced_eos_token_id": {"forced_eos_token_id": 7},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (3, 1.5), "eos_token_id": 5},
    "sequence_bias": {"sequence_bias": [[[9], 4.0], [[8, 20], 9.0], [[46], -8.0]]},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.7},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": one_letter},
    "custom": {"logits_processor": [Favour()]},
    "custom, in place": {"logits_processor": [InPlace()]},
    "several": {"logits_processor": [Favour()], "repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
}
STILL = {"min_new_tokens", "begin_suppress_tokens"}


@pytest.mark.parametrize("rule", RULES)
def test_logits_processors_act_as_in_plain_generation(model, decoder, rule):
    """On one row and on a ragged batch whose rows stand at different lengths."""
    for rows in (1, 5):
        inputs = prompts(rows)
        expected = generate(model, inputs, **RULES[rule])
        assert torch.equal(generate(model, inputs, decoder, **RULES[rule]), expected)
    without = {k: v for k, v in RULES[rule].items() if k == "eos_token_id"}
    assert not torch.equal(generate(model, prompts(), **without), expected), "the rule must change something"


def test_guidance_needs_the_model_itself_and_acts_or_is_refused(model, dyspec):
    """Classifier-free guidance runs the model inside a processor that counts on one call per token of the whole
    batch."""
    inputs = prompts(1)
    expected = generate(model, inputs, guidance_scale=1.5)
    assert torch.equal(generate(model, inputs, dyspec, guidance_scale=1.5), expected)
    inputs = prompts()
    try:
        found = generate(model, inputs, dyspec, guidance_scale=1.5)
    except ValueError as refusal:
        assert "guidance_scale" in str(refusal)
    else:
        assert torch.equal(found, generate(model, inputs, guidance_scale=1.5))


# ------------------------------------------------------------------------------------------------ stopping


class LongEnough(StoppingCriteria):
    """Stops a row when its last token is a multiple of three after at least four new ones."""

    def __init__(self, width):
        self.width, self.lengths = width, []

    def __call__(self, input_ids, scores, **kwargs):
        self.lengths.append(input_ids.shape[1])
        return (input_ids[:, -1] % 3 == 0) & (input_ids.shape[1] >= self.width + 4)


class OldStyle(StoppingCriteria):
    """Returns one bool for the whole batch, which transformers broadcasts."""

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.shape[1] >= 18


class ZeroDimensional(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.tensor(input_ids.shape[1] >= 18)


class ByScore(StoppingCriteria):
    """Looks at the scores, which transformers gives when they are kept."""

    def __call__(self, input_ids, scores, **kwargs):
        assert scores is not None and len(scores) == input_ids.shape[1] - 12
        return scores[-1].amax(-1) > 1e6


def test_custom_stopping_criteria_stop_each_row_where_plain_generation_stops_it(model, decoder):
    inputs = prompts()
    width = inputs["input_ids"].shape[1]
    expected = generate(model, inputs, stopping_criteria=[LongEnough(width)])
    ends = (expected[:, width:] != 0).sum(-1)
    assert len(set(ends.tolist())) > 1 and int(ends.max()) <= NEW
    criterion = LongEnough(width)
    assert torch.equal(generate(model, inputs, decoder, stopping_criteria=[criterion]), expected)
    assert set(criterion.lengths) <= set(range(width + 1, width + NEW + 1))


@pytest.mark.parametrize("criterion", [OldStyle(), ZeroDimensional()], ids=["bool", "0-d tensor"])
def test_criteria_that_give_one_answer_for_the_batch(model, decoder, criterion):
    for rows in (1, 5):
        inputs = prompts(rows)
        expected = generate(model, inputs, stopping_criteria=[criterion])
        assert torch.equal(generate(model, inputs, decoder, stopping_criteria=[criterion]), expected)


def test_criteria_see_the_scores_when_they_are_kept(model, decoder):
    options = {"return_dict_in_generate": True, "output_scores": True, "stopping_criteria": [ByScore()]}
    inputs = prompts(4)
    expected = generate(model, inputs, **options)
    assert torch.equal(generate(model, inputs, decoder, **options).sequences, expected.sequences)


@pytest.mark.parametrize("ends", [7, [7, 30], [46, 24, 3], list(range(50, 20, -1))], ids=str)
@pytest.mark.parametrize("pad", [0, None])
def test_lists_of_end_tokens(decoder, ends, pad):
    """Without a padding token transformers pads with the first end token of the list, not the smallest."""
    model = llama(pad_token_id=None)
    inputs, options = prompts(), {"eos_token_id": ends, "pad_token_id": pad, "max_new_tokens": 30}
    expected = generate(model, inputs, **options)
    assert torch.equal(generate(model, inputs, decoder, **options), expected)


def test_no_end_token_at_all(model, decoder):
    model = llama(eos_token_id=None)
    inputs = prompts()
    found = generate(model, inputs, decoder)
    assert torch.equal(found, generate(model, inputs)) and found.shape[1] == inputs["input_ids"].shape[1] + NEW


def test_max_time_ends_early_and_what_came_is_right(model, decoder):
    inputs = prompts(2)
    full = generate(model, inputs, max_new_tokens=200, eos_token_id=None)
    found = generate(model, inputs, decoder, max_new_tokens=200, eos_token_id=None, max_time=1e-6)
    assert found.shape[1] == inputs["input_ids"].shape[1] + 1, "the clock is looked at after every token"
    assert torch.equal(found, full[:, : found.shape[1]])


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_few_new_tokens(model, decoder, limit):
    inputs = prompts()
    expected = generate(model, inputs, max_new_tokens=limit)
    assert torch.equal(generate(model, inputs, decoder, max_new_tokens=limit), expected)
    assert expected.shape[1] == inputs["input_ids"].shape[1] + limit


def test_max_length_counts_the_padded_prompt(model, decoder):
    inputs = prompts()
    expected = generate(model, inputs, max_new_tokens=None, max_length=19)
    assert torch.equal(generate(model, inputs, decoder, max_new_tokens=None, max_length=19), expected)


# ------------------------------------------------------------------------------------------------ streaming, returning


class Collect:
    """Takes what the streamer protocol hands it."""

    def __init__(self):
        self.puts, self.ended = [], 0

    def put(self, value):
        self.puts.append(value.clone())

    def end(self):
        self.ended += 1


@pytest.mark.parametrize("rows", [1, 5])
def test_a_streamer_sees_the_columns_of_the_output(model, decoder, rows):
    inputs, streamer, reference = prompts(rows), Collect(), Collect()
    options = {"eos_token_id": list(range(30, 45))} if rows > 1 else {}
    expected = generate(model, inputs, streamer=reference, **options)
    assert torch.equal(generate(model, inputs, decoder, streamer=streamer, **options), expected)
    assert streamer.ended == reference.ended == 1
    assert len(streamer.puts) == len(reference.puts)
    for mine, theirs in zip(streamer.puts, reference.puts, strict=True):
        assert torch.equal(mine, theirs)


class Letters:
    """The least a TextStreamer asks of a tokenizer."""

    def decode(self, ids, **kwargs):
        return "".join(chr(33 + int(i)) + " " for i in ids)


def test_text_streamers_print_one_row_and_refuse_more(model, decoder, capsys):
    inputs = prompts(1)
    out = generate(model, inputs, decoder, streamer=TextStreamer(Letters(), skip_prompt=True))
    assert capsys.readouterr().out.split() == Letters().decode(out[0, inputs["input_ids"].shape[1] :]).split()
    with pytest.raises(ValueError, match="batch size 1"):
        generate(model, prompts(2), decoder, streamer=TextStreamer(Letters()))


@pytest.mark.parametrize("rule", ["no_repeat_ngram_size", "custom"])
def test_scores_and_logits_are_those_of_plain_generation(model, decoder, rule):
    inputs = prompts()
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True} | RULES[rule]
    mine, theirs = generate(model, inputs, decoder, **options), generate(model, inputs, **options)
    assert torch.equal(mine.sequences, theirs.sequences)
    width = inputs["input_ids"].shape[1]
    for name in ("scores", "logits"):
        own, plain = getattr(mine, name), getattr(theirs, name)
        assert len(own) == len(plain) == mine.sequences.shape[1] - width
        for step in range(len(own)):
            assert own[step].shape == (5, VOCABULARY) and own[step].dtype == torch.float32
            alive = ~(mine.sequences[:, width : width + step] == END).any(-1)
            assert torch.allclose(own[step][alive], plain[step][alive], atol=2e-4)
    assert not torch.allclose(mine.scores[3], mine.logits[3], atol=1e-3), "scores are processed, logits raw"


def test_transition_scores_can_be_computed(model, dyspec):
    inputs = prompts(1)
    options = {"return_dict_in_generate": True, "output_scores": True}
    both = [generate(model, inputs, d, **options) for d in (dyspec, None)]
    scores = [model.compute_transition_scores(o.sequences, o.scores, normalize_logits=True) for o in both]
    assert torch.allclose(scores[0], scores[1], atol=1e-4)


def test_output_can_be_trained_on(model, decoder):
    """What comes back are ordinary tensors: they can be written to, and be the input of a forward with gradients."""
    inputs = prompts(2)
    out = generate(model, inputs, decoder, return_dict_in_generate=True, output_scores=True)
    assert not out.sequences.is_inference() and not out.scores[0].is_inference()
    student = llama()
    student(out.sequences, labels=out.sequences).loss.backward()
    assert student.lm_head.weight.grad.abs().sum() > 0
    out.sequences[0, 0] = 3
    weight = nn.Parameter(torch.ones(()))
    (out.scores[0] * weight).sum().backward()


def test_a_model_that_was_used_can_be_trained(decoder):
    model = llama()
    expected = copy.deepcopy(model)
    generate(model, prompts(2), decoder)
    ids = prompts(1)["input_ids"]
    for each in (model, expected):
        each.train()
        each(ids, labels=ids).loss.backward()
    for mine, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)


# ------------------------------------------------------------------------------------------------ inputs, settings


def test_a_generation_config_object_is_honoured(model, decoder):
    config = GenerationConfig(max_new_tokens=7, no_repeat_ngram_size=1, eos_token_id=[9, 12], pad_token_id=3)
    before = config.to_dict()
    inputs = prompts()
    expected = model.generate(**inputs, generation_config=config)
    assert torch.equal(model.generate(**inputs, generation_config=config, custom_generate=decoder), expected)
    assert config.to_dict() == before


def test_the_model_s_own_generation_config_is_honoured(decoder):
    model = llama()
    model.generation_config.max_new_tokens = 5
    model.generation_config.no_repeat_ngram_size = 1
    inputs = prompts()
    assert torch.equal(model.generate(**inputs, custom_generate=decoder), model.generate(**inputs))


def test_right_padding_gives_what_left_padding_gives(model, decoder):
    """Plain generation goes on behind the padding; a decoder that knows the rows' own tokens need not."""
    new = [generate(model, prompts(side=side), decoder)[:, max(LENGTHS) :] for side in ("left", "right")]
    assert torch.equal(new[0], new[1])
    assert torch.equal(new[0], generate(model, prompts())[:, max(LENGTHS) :])


def test_one_row_needs_no_mask_and_ids_may_come_first(model, decoder):
    ids = prompts(1)["input_ids"]
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, custom_generate=decoder, **options), model.generate(ids, **options))


def test_no_prompt_starts_from_the_first_token_of_text(model, decoder):
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(model.generate(custom_generate=decoder, **options), model.generate(**options))


def test_a_hole_in_the_mask_is_left_out(model, decoder):
    inputs = prompts(1)
    inputs["attention_mask"][0, 3:5] = 0
    kept = inputs["attention_mask"].bool()[0]
    alone = {k: v[:, kept] for k, v in inputs.items()}
    width = inputs["input_ids"].shape[1]
    found = generate(model, inputs, decoder)
    assert torch.equal(found[:, width:], generate(model, inputs)[:, width:])
    assert torch.equal(found[:, width:], generate(model, alone)[:, int(kept.sum()) :])


@pytest.mark.parametrize("what", ["inputs_embeds", "position_ids"])
def test_what_the_decoder_does_not_read_is_refused_by_name(model, decoder, what):
    """Plain generation would follow these; leaving them out silently would give another text."""
    inputs = prompts(2)
    if what == "inputs_embeds":
        extra = model.get_input_embeddings()(inputs["input_ids"].flip(0)).detach()
    else:
        extra = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0) * 3
    expected = generate(model, inputs, **{what: extra})
    assert not torch.equal(expected[:, -NEW:], generate(model, inputs)[:, -NEW:])
    try:
        found = generate(model, inputs, decoder, **{what: extra})
    except ValueError as refusal:
        assert what in str(refusal)
    else:
        assert torch.equal(found, expected)


def test_embeddings_without_ids_are_refused_by_name(model, decoder):
    inputs = prompts(2)
    embeds = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    with pytest.raises(ValueError, match="inputs_embeds"):
        generate(model, inputs, decoder, inputs_embeds=embeds)


def test_several_samples_per_prompt(model, decoder):
    inputs = prompts(2)
    torch.manual_seed(0)
    out = generate(model, inputs, decoder, do_sample=True, num_return_sequences=3, top_k=0)
    width = inputs["input_ids"].shape[1]
    assert out.shape[0] == 6
    assert torch.equal(out[:, :width], inputs["input_ids"].repeat_interleave(3, 0))
    assert len({tuple(row.tolist()) for row in out}) > 2


def test_sampling_respects_truncation(model, decoder):
    inputs = prompts()
    width = inputs["input_ids"].shape[1]
    torch.manual_seed(0)
    only = generate(model, inputs, decoder, do_sample=True, top_k=1)
    assert torch.equal(only, generate(model, inputs))
    options = {"return_dict_in_generate": True, "output_scores": True, "do_sample": True, "top_k": 4, "top_p": 0.9}
    out = generate(model, inputs, decoder, **options)
    for step, scores in enumerate(out.scores):
        alive = ~(out.sequences[:, width : width + step] == END).any(-1)
        chosen = scores[alive].gather(1, out.sequences[alive, width + step, None])
        assert torch.isfinite(chosen).all() and (torch.isfinite(scores).sum(-1) <= 4).all()


def test_the_same_seed_gives_the_same_sample(model, decoder):
    outs = []
    for seed in (4, 4, 5):
        torch.manual_seed(seed)
        outs.append(generate(model, prompts(), decoder, do_sample=True, top_k=0))
    assert torch.equal(outs[0], outs[1])
    assert outs[0].shape != outs[2].shape or not torch.equal(outs[0], outs[2])


# ------------------------------------------------------------------------------------------------ the model's state


@pytest.mark.parametrize("name", NAMES)
def test_bf16_tokens_are_within_a_near_tie_of_the_best(name):
    model = llama().to(torch.bfloat16)
    decoder = make(name, draft=noisy(model))
    inputs = prompts()
    out = generate(model, inputs, decoder, eos_token_id=None)
    width = inputs["input_ids"].shape[1]
    mask = torch.cat([inputs["attention_mask"], torch.ones(5, NEW, dtype=torch.long)], 1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(out, attention_mask=mask, position_ids=positions).logits[:, width - 1 : -1].float()
    short = logits.amax(-1) - logits.gather(-1, out[:, width:, None])[..., 0]
    tolerance = 0.02 * float(logits.abs().max())
    assert float(short.max()) <= tolerance, "an emitted token is not near the best one"
    assert (short == 0).float().mean() > 0.9


def test_training_mode_is_left_as_it_was(model, decoder):
    expected = generate(model, prompts())
    model.train()
    try:
        assert torch.equal(generate(model, prompts(), decoder), expected)
        assert model.training and all(m.training for m in model.modules())
    finally:
        model.eval()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_any_gradient_mode(model, decoder, context):
    expected = generate(model, prompts())
    with context():
        assert torch.equal(generate(model, prompts(), decoder), expected)
    assert all(p.grad is None for p in model.parameters())


def test_weights_changed_in_place_between_calls(decoder):
    model = llama()
    first = generate(model, prompts(), decoder)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(-1.5)
    second = generate(model, prompts(), decoder)
    assert torch.equal(second, generate(model, prompts())) and not torch.equal(first, second)


def test_draft_changed_in_place_between_calls_is_used_as_it_is(model):
    draft = noisy(model, 3.0)
    decoder = make("chain", draft=draft)
    expected = generate(model, prompts(), decoder)
    poor = decoder.stats.accepted
    with torch.no_grad():
        for mine, theirs in zip(draft.parameters(), model.parameters(), strict=True):
            mine.copy_(theirs)
    assert torch.equal(generate(model, prompts(), decoder), expected)
    assert decoder.stats.accepted > poor and decoder.stats.steps < NEW


def test_decoders_in_turn_and_twice(model, draft):
    inputs = prompts()
    expected = generate(model, inputs)
    decoders = [make(name, draft=draft) for name in NAMES]
    for decoder in decoders + decoders:
        assert torch.equal(generate(model, inputs, decoder), expected)
        other = prompts(2)
        assert torch.equal(generate(model, other, decoder), generate(model, other))


def test_one_model_is_target_of_one_call_and_draft_of_another(model, draft):
    one, other = make("dyspec", draft=draft), make("dyspec", draft=model)
    for _ in range(2):
        assert torch.equal(generate(model, prompts(), one), generate(model, prompts()))
        assert torch.equal(generate(draft, prompts(), other), generate(draft, prompts()))


class Failing(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        if input_ids.shape[1] > 16:
            raise RuntimeError("in the middle")
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize("name", [*NAMES, "lossless"])
def test_an_exception_in_the_middle_changes_nothing(model, draft, name):
    decoder = make(name, draft=draft)
    before, drafted = fingerprint(model, deep=True), fingerprint(draft, deep=True)
    expected = generate(model, prompts())
    with pytest.raises(RuntimeError, match="in the middle"), decoder.record():
        generate(model, prompts(), decoder, stopping_criteria=[Failing()])
    assert fingerprint(model, deep=True) == before and fingerprint(draft, deep=True) == drafted
    assert torch.equal(generate(model, prompts(), decoder), expected)


def test_a_broken_draft_costs_speed_only(model):
    draft = noisy(model)
    with torch.no_grad():
        draft.lm_head.weight[::3] = torch.nan
    for name in ("dyspec", "chain", "kary_tree", "random_tree"):
        decoder = make(name, draft=draft, **({"economy": False} if name == "dyspec" else {}))
        assert torch.equal(generate(model, prompts(), decoder), generate(model, prompts()))
        assert generate(model, prompts(), decoder, do_sample=True).isfinite().all()


# ------------------------------------------------------------------------------------------------ record and replay


def test_a_recording_with_rules_is_saved_loaded_and_replayed(model, decoder, tmp_path):
    inputs, options = prompts(), {"do_sample": True, "top_k": 0, "eos_token_id": list(range(30, 50))} | RULES["custom"]
    torch.manual_seed(6)
    with decoder.record() as trace:
        first = generate(model, inputs, decoder, **options)
    steps = [step.rows for step in trace.steps]
    assert steps[0] == (0, 1, 2, 3, 4) and len(steps[-1]) < 5, "rows must have ended at different steps"
    trace.save(tmp_path / "t.safetensors")
    loaded = Trace.load(tmp_path / "t.safetensors")
    with decoder.replay(loaded), decoder.record() as again:
        assert torch.equal(generate(model, inputs, decoder, **options), first)
    assert again.same_as(loaded)


def test_a_recording_serves_no_other_request(model, decoder):
    with decoder.record() as trace:
        generate(model, prompts(), decoder, eos_token_id=None)
    with decoder.replay(trace), pytest.raises(TraceMismatch, match="rows"):
        generate(model, prompts(2), decoder, eos_token_id=None)
    with decoder.replay(trace), pytest.raises(TraceMismatch):
        generate(model, prompts(), decoder, eos_token_id=None, max_new_tokens=NEW + 5)
    with decoder.replay(trace), pytest.raises(TraceMismatch):
        generate(model, prompts(), decoder, eos_token_id=None, max_new_tokens=2)
    assert torch.equal(generate(model, prompts(), decoder), generate(model, prompts())), "replay must have ended"


def test_only_the_next_call_is_recorded(model, decoder):
    """So that a replay of the recording fits one call."""
    with decoder.record() as trace:
        first = generate(model, prompts(), decoder)
        generate(model, prompts(2), decoder)
    with decoder.replay(trace):
        assert torch.equal(generate(model, prompts(), decoder), first)


# ------------------------------------------------------------------------------------------------ bad input


def with_logit(value):
    model = llama()
    with torch.no_grad():
        model.lm_head.weight[5, 0] = value
    return model


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "nan"), (float("inf"), "inf")])
@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"repetition_penalty": 1.2}], ids=str)
def test_logits_that_are_no_numbers_are_named(decoder, value, word, options):
    with pytest.raises(ValueError, match=word) as raised:
        generate(with_logit(value), prompts(), decoder, **options)
    assert "row" in str(raised.value) and "finite" in str(raised.value)


BAD = {
    "an all-padding row": ({"attention_mask": torch.tensor([[1] * 9, [0] * 9, [0] * 8 + [1]])}, r"\[1\]"),
    "max_new_tokens=0": ({"max_new_tokens": 0}, "max_new_tokens.*0"),
    "beyond the positions": ({"max_new_tokens": 300}, "300.*256"),
    "beams": ({"num_beams": 3}, "num_beams=3"),
    "attentions": ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
    "hidden states": ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_name_the_value(model, decoder, case):
    changes, words = BAD[case]
    ids = torch.arange(27).view(3, 9) % (VOCABULARY - 2) + 2
    inputs, options = {"input_ids": ids}, dict(changes)
    if "attention_mask" in options:
        inputs["attention_mask"] = options.pop("attention_mask")
    with pytest.raises(ValueError, match=f"(?is){words}"):
        generate(model, inputs, decoder, **options)


@pytest.mark.parametrize("token", [VOCABULARY, 5000, -1])
def test_ids_outside_the_vocabulary_are_named(model, decoder, token):
    inputs = prompts(2)
    inputs["input_ids"][0, 4] = token
    with pytest.raises(ValueError, match=rf"token id {token}\b.*{VOCABULARY}"):
        generate(model, inputs, decoder)


def test_an_empty_prompt_is_said_to_be_empty(model, decoder):
    empty = torch.zeros(1, 0, dtype=torch.long)
    with pytest.raises(ValueError, match="empty"):
        decoder(model, empty, generation_config=GenerationConfig(max_length=4))


def test_a_mask_of_another_shape_is_named(model, decoder):
    ids = prompts(2)["input_ids"]
    with pytest.raises(ValueError, match="attention_mask"):
        decoder(model, ids, generation_config=GenerationConfig(max_length=20), attention_mask=torch.ones(2, 3))


def test_a_cache_that_is_not_empty_is_refused(model, decoder):
    inputs = prompts(1)
    cache = model(**inputs, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"past_key_values holds 9 tokens"):
        decoder(model, inputs["input_ids"], generation_config=GenerationConfig(max_length=20), past_key_values=cache)


def test_a_draft_of_another_vocabulary_is_named(model):
    decoder = make("dyspec", draft=llama(vocab_size=VOCABULARY + 3))
    with pytest.raises(ValueError, match=rf"{VOCABULARY + 3}.*{VOCABULARY}"):
        generate(model, prompts(), decoder)


def test_a_draft_with_fewer_positions_than_are_asked_for_is_named():
    shape = {"vocab_size": VOCABULARY, "n_embd": 16, "n_head": 2, "bos_token_id": END, "eos_token_id": END}
    torch.manual_seed(0)
    target = GPT2LMHeadModel(GPT2Config(**shape, n_layer=2, n_positions=64, pad_token_id=0)).eval()
    draft = GPT2LMHeadModel(GPT2Config(**shape, n_layer=1, n_positions=16, pad_token_id=0)).eval()
    try:
        found = generate(target, prompts(), make("chain", draft=draft), eos_token_id=None)
    except ValueError as refusal:
        assert "16" in str(refusal) and "draft" in str(refusal)
    else:
        assert torch.equal(found, generate(target, prompts(), eos_token_id=None))


@pytest.mark.parametrize("size", [0, -4])
def test_a_tree_of_no_nodes_is_refused(model, draft, size):
    for name in ("dyspec", "chain", "kary_tree", "random_tree", "prompt_lookup"):
        with pytest.raises(ValueError, match=f"{size} nodes"):
            generate(model, prompts(), make(name, draft=draft, size=size))


@pytest.mark.parametrize("name", ["dyspec", "chain", "kary_tree", "random_tree"])
@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_draft_temperature_that_is_not_above_zero_is_named(model, draft, name, temperature):
    with pytest.raises(ValueError, match=rf"temperature.*{temperature}"):
        generate(model, prompts(), make(name, draft=draft, temperature=temperature), do_sample=True)


def test_kary_trees_need_a_branch(model, draft):
    with pytest.raises(ValueError, match=r"branches.*0"):
        generate(model, prompts(), make("kary_tree", draft=draft, branches=0))


@pytest.mark.parametrize(("field", "value"), [("fixed", (3, 2)), ("fixed", (1, -1)), ("longest", 0), ("probe", 0)])
def test_del_names_the_setting_that_does_not_fit(model, field, value):
    words = str(value).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=f"{field}={words}"):
        generate(model, prompts(), make("del", **{field: value}))


def test_one_layer_cannot_draft_for_itself():
    with pytest.raises(ValueError, match="1 layer"):
        generate(llama(layers=1), prompts(), make("del"))


def test_a_vocabulary_of_one_token():
    sizes = {"vocab_size": 1, "eos_token_id": None, "bos_token_id": None, "pad_token_id": 0}
    model, draft = llama(**sizes), llama(2, 1, **sizes)
    inputs = {"input_ids": torch.zeros(2, 3, dtype=torch.long), "attention_mask": torch.tensor([[1, 1, 1], [0, 1, 1]])}
    for name in (*NAMES, "chain", "kary_tree", "random_tree", "full", "lossless"):
        for sample in (False, True):
            out = generate(model, inputs, make(name, draft=draft), do_sample=sample)
            assert out.shape == (2, 3 + NEW) and int(out.abs().max()) == 0


# ------------------------------------------------------------------------------------------------ the packaged model


@pytest.fixture(scope="module")
def packaged():
    return load("zoo:code-target", "fp32")


TEXTS = [
    "def add(a, b):\n    return",
    "import os\n\n\nclass Path:\n    def __init__(self, name):\n        self.",
    "x = ",
]


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_packaged_model_with_its_tokenizer(packaged, side):
    model, tokenizer = packaged
    inputs = tokenizer(TEXTS, return_tensors="pt", padding=True)
    inputs.pop("token_type_ids", None)
    expected = model.generate(**inputs, max_new_tokens=16, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    tokenizer.padding_side = side
    try:
        padded = tokenizer(TEXTS, return_tensors="pt", padding=True)
        padded.pop("token_type_ids", None)
    finally:
        tokenizer.padding_side = "left"
    for name in ("del", "prompt_lookup"):
        out = model.generate(**padded, max_new_tokens=16, do_sample=False, custom_generate=make(name))
        assert torch.equal(out[:, padded["input_ids"].shape[1] :], expected)


STOPS = ["self", ", ", "("]


def test_stop_strings_as_a_criterion(packaged):
    model, tokenizer = packaged
    inputs = tokenizer(TEXTS, return_tensors="pt", padding=True)
    inputs.pop("token_type_ids", None)
    options = {"max_new_tokens": 24, "do_sample": False}
    free = model.generate(**inputs, **options)
    options["stopping_criteria"] = [StopStringCriteria(tokenizer, STOPS)]
    expected = model.generate(**inputs, **options)
    assert expected.shape != free.shape or not torch.equal(expected, free), "a stop string must have stopped a row"
    for name in ("del", "prompt_lookup"):
        assert torch.equal(model.generate(**inputs, custom_generate=make(name), **options), expected)


@pytest.mark.xfail(
    strict=True,
    raises=ValueError,
    reason="transformers 5.23 drops tokenizer= when custom_generate is callable; pass a StopStringCriteria instead",
)
def test_stop_strings_with_a_tokenizer(packaged):
    model, tokenizer = packaged
    inputs = tokenizer(TEXTS[:1], return_tensors="pt")
    inputs.pop("token_type_ids", None)
    options = {"max_new_tokens": 24, "do_sample": False, "stop_strings": STOPS, "tokenizer": tokenizer}
    expected = model.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, custom_generate=make("prompt_lookup"), **options), expected)
