"""Models of another build under the loop: transformers' DiffusionGemma, against its own sampler."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import (
    DiffusionGemmaConfig,
    DiffusionGemmaForBlockDiffusion,
    DiffusionGemmaTextConfig,
    GenerationConfig,
)
from transformers.models.diffusion_gemma import generation_diffusion_gemma as theirs
from transformers.models.gemma4.configuration_gemma4 import Gemma4VisionConfig

from pertoken.core.errors import BadRequest
from pertoken.denoise.dkv_cache import DKVCache
from pertoken.denoise.dual_cache import DualCache
from pertoken.denoise.ends import EndOfText
from pertoken.denoise.entropy_bound import EntropyBound
from pertoken.denoise.factor import Factor
from pertoken.denoise.loop import COMMIT, REFRESH, Denoise
from pertoken.denoise.noise import noise
from pertoken.denoise.random_commit import RandomCommit
from pertoken.denoise.schedule import Schedule
from pertoken.denoise.threshold import Threshold
from pertoken.models import load
from tests.denoise.conftest import alone, prompts

torch.set_num_threads(1)
BLOCK, VOCABULARY, WINDOW, END = 8, 61, 6, 1


def gemma(**text):
    """A random model whose window is shorter than the prompts, so that sliding layers forget. Its layers do little,
    lest self-conditioning blow a difference in the last bit up to another token within a few steps."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "global_head_dim": 16,
        "num_global_key_value_heads": 1,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "max_position_embeddings": 128,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 16,
        "pad_token_id": 0,
        "eos_token_id": END,
    }
    vision = Gemma4VisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
    )
    config = DiffusionGemmaConfig(
        text_config=DiffusionGemmaTextConfig(**sizes | text),
        vision_config=vision,
        canvas_length=BLOCK,
        image_token_id=60,
    )
    model = DiffusionGemmaForBlockDiffusion(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.5 if "embed_tokens" in name else 0.1, generator=generator)
    model.generation_config = theirs.DiffusionGemmaGenerationConfig(
        pad_token_id=0, max_denoising_steps=10, confidence_threshold=1.5, t_min=0.4, t_max=0.8
    )
    return model


@pytest.fixture(scope="module")
def model():
    return gemma()


def asked(length=3 * BLOCK, **options):
    return GenerationConfig(**{"max_new_tokens": length, "do_sample": False, "pad_token_id": 0} | options)


def filled(model, inputs, decoder, **options):
    out = decoder(model, **inputs, generation_config=asked(**options))
    return out[:, inputs["input_ids"].shape[1] :]


def forwards(trace, rows):
    """Steps that each row took."""
    return [sum(row in step.rows for step in trace.at(COMMIT)) for row in range(rows)]


def sampled_by_transformers(monkeypatch, model, inputs, gamma, length=3 * BLOCK, **options):
    """Its own `generate`, with our noise in the place of random tokens and the argmax in the place of samples."""
    state = {"block": -1, "step": 0}
    prepare = type(model)._prepare_denoiser_inputs

    def prepared(self, *args, **kwargs):
        state["block"], state["step"] = state["block"] + 1, 0
        return prepare(self, *args, **kwargs)

    def drawn(self, batch_size, device):
        full = torch.full((batch_size,), state["block"])
        where = SimpleNamespace(
            ids=full, block=full, block_step=torch.full_like(full, state["step"]), columns=torch.arange(99), size=BLOCK
        )
        state["step"] += 1
        return noise(where, VOCABULARY, None)

    monkeypatch.setattr(type(model), "_prepare_denoiser_inputs", prepared)
    monkeypatch.setattr(theirs.EntropyBoundSampler, "initialize_canvas", drawn)
    monkeypatch.setattr(torch, "multinomial", lambda chances, num_samples: chances.argmax(-1, keepdim=True))
    out = model.generate(
        **inputs,
        max_new_tokens=length,
        sampler_config=theirs.EntropyBoundSamplerConfig(entropy_bound=gamma),
        **options,
    )
    new = out.sequences[:, inputs["input_ids"].shape[1] :]
    return new, out.tokens_per_forward


@pytest.mark.parametrize("gamma", [0.05, 1.0, 4.0])
@pytest.mark.parametrize("lengths", [(9,), (12, 4, 9)], ids=["one row", "ragged"])
def test_revising_with_an_entropy_bound_is_transformers_own_sampler(monkeypatch, model, gamma, lengths):
    inputs, decoder = prompts(*lengths), Denoise(EntropyBound(gamma), block=BLOCK, revise=True)
    with decoder.record() as trace:
        ours = filled(model, inputs, decoder)
    expected, per_forward = sampled_by_transformers(monkeypatch, model, inputs, gamma)
    assert ours.tolist() == expected.tolist()
    steps = forwards(trace, len(lengths))
    assert [round(3 * BLOCK / n, 4) for n in steps] == [round(x, 4) for x in per_forward.tolist()]
    if gamma == 4.0:
        assert 3 * 2 <= min(steps) < 3 * 10, "some blocks must end by themselves"


def test_its_end_of_text_ends_rows_as_in_transformers(monkeypatch, model):
    inputs = prompts(12, 4, 9)
    decoder = Denoise(EntropyBound(1.0), canvas=EndOfText(), block=BLOCK, revise=True)
    plain = filled(model, inputs, Denoise(EntropyBound(1.0), block=BLOCK, revise=True))
    end = int(plain[0, BLOCK // 2])  # whatever is there
    ours = filled(model, inputs, decoder, eos_token_id=end)
    expected, _ = sampled_by_transformers(monkeypatch, model, inputs, 1.0, eos_token_id=end)
    expected = torch.nn.functional.pad(expected, (0, ours.shape[1] - expected.shape[1]))
    assert ours.tolist() == expected.tolist() and (ours == 0).any()


COMMITS = {
    "schedule": Schedule(),
    "threshold": Threshold(0.5),
    "factor": Factor(1.9),
    "entropy_bound": EntropyBound(2.0),
    "random_commit": RandomCommit(2),
}


@pytest.mark.parametrize("revise", [False, True], ids=["final", "revise"])
@pytest.mark.parametrize("commit", COMMITS)
def test_a_row_does_not_depend_on_its_batch(model, commit, revise):
    inputs, decoder = prompts(7, 3, 12), Denoise(COMMITS[commit], block=BLOCK, revise=revise)
    with decoder.record() as trace:
        together = filled(model, inputs, decoder)
    if commit not in ("schedule", "random_commit"):
        assert len(set(forwards(trace, 3))) > 1, "rows must have got different decisions"
    for row in range(3):
        assert filled(model, alone(inputs, row), decoder)[0].tolist() == together[row].tolist()


@torch.inference_mode()
def naive(model, prompt, commit, blocks):
    """One row of final commits by the model's own forward: no cache kept, a new one for every step."""
    ids = prompt.tolist()
    for block in range(blocks):
        held, signal, step = [None] * BLOCK, None, 0
        while None in held:
            where = SimpleNamespace(
                ids=prompt,
                block=torch.tensor([block]),
                block_step=torch.tensor([step]),
                columns=torch.arange(99),
                size=BLOCK,
            )
            drawn = noise(where, VOCABULARY, None)[0].tolist()
            canvas = [new if old is None else old for old, new in zip(held, drawn, strict=True)]
            out = model(
                input_ids=torch.tensor([ids]), decoder_input_ids=torch.tensor([canvas]), self_conditioning_logits=signal
            )
            scores = out.logits[0] / (0.4 + 0.4 * max(10 - step, 1) / 10)
            signal, step = scores[None], step + 1
            commit(held, scores)
        ids += held
    return ids[len(prompt) :]


def by_threshold(held, scores):
    chances, tokens = scores.double().softmax(-1).max(-1)
    open_ = [place for place, token in enumerate(held) if token is None]
    best = max(open_, key=lambda place: float(chances[place]))
    for place in open_:
        if chances[place] >= 0.5 or place == best:
            held[place] = int(tokens[place])


def test_final_commits_against_a_naive_twin(model):
    inputs = prompts(9, 4)
    ours = filled(model, inputs, Denoise(Threshold(0.5), block=BLOCK))
    for row in range(2):
        assert naive(model, alone(inputs, row)["input_ids"][0], by_threshold, 3) == ours[row].tolist()


def test_every_position_is_encoded_once_and_only_blocks_are_decoded(model):
    inputs, decoder = prompts(9, 4), Denoise(Threshold(0.5), block=BLOCK)
    with decoder.record() as trace:
        filled(model, inputs, decoder)
    total = torch.zeros(2, 9 + 3 * BLOCK, dtype=torch.long)
    for step in trace.at(REFRESH):
        total[list(step.rows)] += step.decision.keep
    assert (total[0, :9] == 1).all() and total[1, :5].eq(0).all() and total[1, 5:9].eq(1).all()
    assert decoder.stats.token_forwards == 9 + 4 + 2 * 2 * BLOCK + BLOCK * decoder.stats.row_steps


def test_as_many_steps_as_asked_for(model):
    decoder = Denoise(Schedule(), block=BLOCK, steps=6)
    filled(model, prompts(5), decoder)
    assert decoder.stats.steps == 6


def test_sampling_follows_its_seed(model):
    inputs, decoder, outs = prompts(6, 10), Denoise(EntropyBound(1.0), block=BLOCK), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(filled(model, inputs, decoder, do_sample=True))
    assert outs[0].equal(outs[1]) and not outs[0].equal(outs[2])
    torch.manual_seed(1)
    own = theirs.DiffusionGemmaGenerationConfig(max_new_tokens=3 * BLOCK)  # it cannot say whether to sample: it does
    assert decoder(model, **inputs, generation_config=own).sequences[:, 10:].equal(outs[0])


def test_noise_is_uniform_and_differs_by_row_block_and_step():
    rows, steps, size = 40, 50, 16
    where = SimpleNamespace(
        ids=torch.zeros(1), numbers=list(range(rows)), block=torch.zeros(rows, dtype=torch.long), size=size,
        columns=torch.arange(size),
    )  # fmt: skip
    drawn = torch.stack(
        [noise(SimpleNamespace(**vars(where), block_step=where.block + s), 50, 7) for s in range(steps)]
    )
    counts = torch.bincount(drawn.flatten(), minlength=50).double()
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 49 + 5 * (2 * 49) ** 0.5
    for one, other in ((drawn[1:], drawn[:-1]), (drawn[:, 1:], drawn[:, :-1]), (drawn[..., 1:], drawn[..., :-1])):
        assert abs(float((one == other).double().mean()) - 1 / 50) < 0.005


@pytest.mark.parametrize(
    ("decoder", "options", "says"),
    [
        ({"refresh": DKVCache()}, {}, "DKVCache has nothing to refresh"),
        ({"refresh": DualCache()}, {}, "DualCache has nothing to refresh"),
        ({"block": 32}, {"length": 32}, "blocks of 8 positions, not 32; give block=8"),
        ({"canvas": EndOfText("predicted")}, {}, "reads outputs of all blocks"),
        ({"sliding": 4}, {}, "leave out sliding"),
        ({"mask_token": 3}, {}, "no mask token"),
        ({}, {"length": 256}, "the model has 128"),
        ({}, {"length": 20}, "does not divide"),
    ],
)
def test_what_has_no_meaning_is_refused(model, decoder, options, says):
    with pytest.raises(BadRequest, match=says):
        filled(model, prompts(5), Denoise(**{"block": BLOCK} | decoder), **options)


def test_images_and_two_way_encoders_are_refused(model):
    inputs = prompts(5)
    inputs["input_ids"][0, 2] = 60
    with pytest.raises(BadRequest, match="image tokens"):
        filled(model, inputs, Denoise(block=BLOCK))
    with pytest.raises(BadRequest, match="both ways"):
        filled(gemma(use_bidirectional_attention="all"), prompts(5), Denoise(block=BLOCK))


def test_a_masked_model_does_not_revise():
    from tests.denoise.conftest import bidirectional, fill

    with pytest.raises(BadRequest, match="is final; leave out revise"):
        fill(bidirectional("llama"), prompts(5), Denoise(block=8, revise=True))


def test_it_is_loaded_from_a_directory(model, tmp_path):
    from tests.models.test_checkpoints import tokenizer_files

    model.save_pretrained(tmp_path)
    tokenizer_files(tmp_path, "llada")
    again, _ = load(str(tmp_path), "fp32")
    inputs, decoder = prompts(5), Denoise(Threshold(0.5), block=BLOCK)
    assert filled(again, inputs, decoder).equal(filled(model, inputs, decoder))


def test_half_precision_and_eager_attention(model):
    half = gemma().to(torch.bfloat16)
    out = filled(half, prompts(9, 4), Denoise(EntropyBound(1.0), block=BLOCK, revise=True))
    assert out.shape == (2, 3 * BLOCK)
    slow = gemma()
    slow.set_attn_implementation("eager")
    decoder = Denoise(Threshold(0.5), block=BLOCK)
    assert filled(slow, prompts(9, 4), decoder).equal(filled(model, prompts(9, 4), decoder))
