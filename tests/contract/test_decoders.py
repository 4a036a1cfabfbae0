"""Laws of every registered decoder, on every family, with no word about any one of them."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import chisquare

from pertoken.core.attach import attach
from pertoken.core.fingerprint import fingerprint
from pertoken.core.trace import Trace
from pertoken.decode.full import Full
from tests.contract.conftest import DECODERS, FAMILIES, LOSSLESS, POLICIES, attachable, built, decoder_of

NEW = 24


def generate(model, ids, mask, decoder=None, **options):
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0} | options
    if decoder is not None:
        options["custom_generate"] = decoder
    return model.generate(ids, attention_mask=mask, **options)


def unpadded(ids, mask, row):
    kept = mask[row].bool()
    return ids[row : row + 1, kept], mask[row : row + 1, kept]


def strip(row, width):
    """The new tokens of a row up to its end of text."""
    new = row[width:].tolist()
    return new[: new.index(1) + 1] if 1 in new else new


@pytest.fixture(params=DECODERS)
def decoder(request, drafts):
    return decoder_of(request.param, drafts)


@pytest.fixture(params=LOSSLESS)
def exact(request, drafts):
    """A decoder that promises the output of plain generation."""
    return decoder_of(request.param, drafts)


def test_greedy_output_is_that_of_plain_generation(target, exact, prompts):
    ids, mask = prompts
    expected = generate(target, ids, mask)
    assert torch.equal(generate(target, ids, mask, exact), expected)


def test_each_row_is_what_it_is_alone_and_in_any_order(target, decoder, prompts):
    ids, mask = prompts
    together = generate(target, ids, mask, decoder)
    new = [strip(row, ids.shape[1]) for row in together]
    assert len({tuple(tokens) for tokens in new}) > 1, "rows must differ for this to say anything"
    for row in range(len(ids)):
        own_ids, own_mask = unpadded(ids, mask, row)
        assert strip(generate(target, own_ids, own_mask, decoder)[0], own_ids.shape[1]) == new[row]
    order = torch.tensor([3, 0, 4, 2, 1])
    permuted = generate(target, ids[order], mask[order], decoder)
    assert [strip(row, ids.shape[1]) for row in permuted] == [new[i] for i in order]


def test_right_padding_changes_nothing(target, decoder, prompts):
    ids, mask = prompts
    flipped_ids, flipped_mask = torch.zeros_like(ids), mask.flip(-1)
    for row in range(len(ids)):
        flipped_ids[row, flipped_mask[row].bool()] = ids[row, mask[row].bool()]
    left, right = generate(target, ids, mask, decoder), generate(target, flipped_ids, flipped_mask, decoder)
    assert torch.equal(left[:, ids.shape[1] :], right[:, ids.shape[1] :])


def test_recording_can_be_saved_and_replayed(target, decoder, prompts, tmp_path):
    ids, mask = prompts
    with decoder.record() as trace:
        first = generate(target, ids, mask, decoder)
    trace.save(tmp_path / "trace.safetensors")
    loaded = Trace.load(tmp_path / "trace.safetensors")
    assert loaded.same_as(trace) and len(trace.steps) > 1
    with decoder.replay(loaded), decoder.record() as again:
        assert torch.equal(generate(target, ids, mask, decoder), first)
    assert again.same_as(trace)
    assert decoder.stats.draft_calls == 0


def test_sampled_recording_replays_without_the_seed(target, exact, prompts):
    ids, mask = prompts
    torch.manual_seed(11)
    with exact.record() as trace:
        first = generate(target, ids, mask, exact, do_sample=True, top_k=0)
    torch.manual_seed(12)
    with exact.replay(trace):
        assert torch.equal(generate(target, ids, mask, exact, do_sample=True, top_k=0), first)


def test_model_is_left_as_it_was(target, decoder, prompts):
    before = fingerprint(target, deep=True)
    generate(target, *prompts, decoder)
    assert fingerprint(target, deep=True) == before

    def fail(ids, scores):
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        generate(target, *prompts, decoder, logits_processor=[fail])
    assert fingerprint(target, deep=True) == before


def test_counts_add_up(target, decoder, prompts):
    with decoder.record() as trace:
        generate(target, *prompts, decoder)
    stats = decoder.stats
    assert stats.steps == len(trace.steps)
    assert stats.tokens == sum(int(step.decision.count.sum()) for step in trace.steps)
    assert stats.drafted == sum(int(step.decision.spent().sum()) for step in trace.steps)
    assert stats.accepted == sum(int(step.decision.accepted.sum()) for step in trace.steps)
    assert stats.layer_loads >= stats.steps * 4


@pytest.mark.parametrize("policy", POLICIES)
def test_under_an_attached_policy_it_is_still_lossless(target, exact, prompts, policy):
    """The pair (policy, decoder): the decoder then speeds up the cheaper model, exactly, or the pair is refused."""
    ids, mask = prompts
    before = fingerprint(target)
    one = built(policy)
    attachable(target, one)
    with attach(target, one):
        try:
            expected = generate(target, ids, mask, Full(), max_new_tokens=10)
            found = generate(target, ids, mask, exact, max_new_tokens=10)
        except ValueError as refusal:
            assert "both decide" in str(refusal)
        else:
            assert torch.equal(found, expected)
    assert fingerprint(target) == before


@pytest.mark.parametrize("temperature", [0.6, 1.0])
@pytest.mark.parametrize("name", LOSSLESS)
def test_sampling_has_the_law_of_the_target(name, temperature):
    """Chi-square of three sampled tokens over a vocabulary of five against the exact law, and of no test that is
    vacuous: the same test at another temperature must fail."""
    from transformers import LlamaConfig, LlamaForCausalLM

    vocabulary, length, rows, rounds = 5, 3, 256, 20
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    models = []
    for seed, layers, masks in ((1, 4, 0), (2, 2, 0), (2, 2, 1)):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=vocabulary + masks,
            num_hidden_layers=layers,
            initializer_range=0.5,
            max_position_embeddings=64,
            bos_token_id=0,
            eos_token_id=None,
            pad_token_id=0,
            **sizes,
        )
        models.append(LlamaForCausalLM(config).eval())
        models[-1].lm_head.weight.data *= 0.4
    target, draft, filler = models
    filler.config.is_causal, filler.config.mask_token_id = False, vocabulary
    prompt = torch.tensor([[1, 2, 3, 1, 2]])

    def law(heat):
        every = torch.cartesian_prod(*[torch.arange(vocabulary)] * length)
        with torch.no_grad():
            logits = target(torch.cat([prompt.expand(len(every), -1), every], 1)).logits / heat
        p = logits.softmax(-1)[:, prompt.shape[1] - 1 : -1]
        return p.gather(-1, every[..., None]).squeeze(-1).prod(-1).double()

    decoder = decoder_of(name, {"causal": draft, "diffusion": filler})
    torch.manual_seed(20)
    counts = torch.zeros(vocabulary**length, dtype=torch.double)
    for _ in range(rounds):
        out = target.generate(
            prompt.expand(rows, -1),
            attention_mask=torch.ones(rows, prompt.shape[1], dtype=torch.long),
            max_new_tokens=length,
            do_sample=True,
            temperature=temperature,
            top_k=0,
            custom_generate=decoder,
        )
        code = (out[:, -length:] * torch.tensor([25, 5, 1])).sum(-1)
        counts += torch.bincount(code, minlength=len(counts))

    def p_value(expected):
        expected = expected * counts.sum()
        rare = expected < 5
        observed = torch.cat([counts[~rare], counts[rare].sum()[None]])
        wanted = torch.cat([expected[~rare], expected[rare].sum()[None]])
        return chisquare(observed.numpy(), (wanted * observed.sum() / wanted.sum()).numpy()).pvalue

    assert p_value(law(temperature)) > 1e-3
    assert p_value(law(temperature * 1.3)) < 1e-3


def test_every_family_is_covered():
    assert {"llama", "qwen3", "gpt2", "mistral", "gemma"} <= set(FAMILIES)
    assert len(DECODERS) >= 8
