"""R2R and its controls: two models, two caches, one text."""

from __future__ import annotations

import pytest
import torch

from pertoken.core.errors import BadRequest
from pertoken.decode.entropy_route import EntropyRoute
from pertoken.decode.r2r import R2R
from pertoken.decode.random_route import RandomRoute
from pertoken.decode.router import Router, Seen, threshold_for
from tests.contract.conftest import FAMILIES, family, one_thread, prompts  # noqa: F401

NEW = 16


def model_of(family, layers, seed):  # noqa: F811
    torch.manual_seed(seed)
    return FAMILIES[family](layers).eval()


@pytest.fixture(scope="module")
def pair(family):  # noqa: F811
    """A large model, and a small one that differs from it."""
    return model_of(family, 4, 1), model_of(family, 2, 2)


def generate(model, ids, mask, decoder=None, **options):
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None} | options
    extra = {} if decoder is None else {"custom_generate": decoder}
    return model.generate(ids, attention_mask=mask, **options, **extra)[:, ids.shape[1] :]


def router_of(small, seed=4):
    torch.manual_seed(seed)
    return Router(small, hidden=24, blocks=2, top=10).eval()


@torch.no_grad()
def naive(large, small, prompt, router, threshold, new):
    """One row, every token with two forwards over the whole text: the small model writes, the large one is asked."""
    tokens, asked = list(prompt), 0
    for _ in range(new):
        out = small(torch.tensor([tokens]), output_hidden_states=True)
        logits = out.logits[0, -1:]
        token = logits.argmax(-1)
        seen = Seen(out.hidden_states[-1][0, -1:], logits, token)
        if float(router(seen).sigmoid()) >= threshold:
            token = large(torch.tensor([tokens])).logits[0, -1:].argmax(-1)
            asked += 1
        tokens.append(int(token))
    return tokens[len(prompt) :], asked


def test_ragged_batches_are_the_definition_token_by_token(pair, prompts):  # noqa: F811
    (large, small), (ids, mask) = pair, prompts
    router = router_of(small)
    decoder = R2R(small, router=router, threshold=0.5)
    found, asked = generate(large, ids, mask, decoder), 0
    for row in range(len(ids)):
        wanted, count = naive(large, small, ids[row, mask[row].bool()].tolist(), router, 0.5, NEW)
        assert found[row].tolist() == wanted
        asked += count
    assert decoder.stats.asked == asked and 0 < asked < found.numel()
    assert decoder.stats.activated(1, 10) == pytest.approx(1 + 10 * asked / found.numel())


def test_limits_are_the_small_and_the_large_model(pair, prompts):  # noqa: F811
    """At a threshold above 1 the large model is never heard, at 0 always: both caches must then be right."""
    large, small = pair
    never, always = R2R(small, threshold=1.1), R2R(small, threshold=0.0)
    assert torch.equal(generate(large, *prompts, never), generate(small, *prompts))
    assert never.stats.asked == 0
    assert torch.equal(generate(large, *prompts, always), generate(large, *prompts))
    assert always.stats.asked == always.stats.tokens
    for one, other in ((RandomRoute(small, rate=0.0), small), (RandomRoute(small, rate=1.0), large)):
        assert torch.equal(generate(large, *prompts, one), generate(other, *prompts))
    assert torch.equal(generate(large, *prompts, EntropyRoute(small, threshold=99.0)), generate(small, *prompts))


def test_rows_that_end_early_leave_the_others_alone(pair, prompts):  # noqa: F811
    large, small = pair
    decoder = RandomRoute(small, rate=0.4)
    free = generate(large, *prompts, decoder)
    end = int(free[1, 3])
    ended = generate(large, *prompts, decoder, eos_token_id=end)
    for row, plain in zip(ended.tolist(), free.tolist(), strict=True):
        stop = plain.index(end) + 1 if end in plain else NEW
        assert row[:stop] == plain[:stop] and set(row[stop:]) <= {0}


def test_large_model_reads_only_what_it_is_asked_about(pair, prompts):  # noqa: F811
    large, small = pair
    decoder = RandomRoute(small, rate=0.3)
    generate(large, *prompts, decoder)
    stats = decoder.stats
    assert stats.steps < NEW and stats.small_tokens >= stats.tokens - stats.row_steps
    assert stats.asked <= stats.row_steps


@pytest.mark.parametrize("threshold", [0.0, 1.1])
def test_sampling_follows_the_law_of_whoever_writes(threshold):
    large, small = model_of("llama", 4, 1), model_of("llama", 2, 2)
    ids = torch.tensor([[5, 9, 3]]).expand(3000, -1)
    torch.manual_seed(0)
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 1, "temperature": 1.5}
    found = generate(large, ids, torch.ones_like(ids), R2R(small, threshold=threshold), **options)
    with torch.no_grad():
        laws = [model(ids[:1]).logits[0, -1].div(1.5).softmax(-1) for model in (large, small)]
    law, other = laws if threshold == 0 else laws[::-1]
    counts = torch.bincount(found[:, 0], minlength=61) / 3000
    assert float((counts - law).abs().sum()) < 0.15
    assert float((counts - other).abs().sum()) > 0.4


def test_router_comes_back_as_it_was_saved_and_knows_its_model(tmp_path):
    small, other = model_of("llama", 2, 2), model_of("llama", 2, 3)
    router = router_of(small).to(torch.bfloat16).float()
    router.about["threshold"] = 0.25
    router.save(tmp_path)
    found = Router.load(tmp_path, small)
    seen = Seen(torch.randn(4, 32), torch.randn(4, 61), torch.tensor([1, 2, 3, 4]))
    assert torch.equal(router(seen), found(seen)) and found.threshold == 0.25
    assert not any("embed" in name for name in found.state_dict())
    with pytest.raises(BadRequest, match="trained for the small model with signature"):
        Router.load(tmp_path, other)
    large, ids = model_of("llama", 4, 1), torch.tensor([[3, 4]])
    with pytest.raises(BadRequest, match="trained for the small model"):
        generate(large, ids, torch.ones_like(ids), R2R(other, router=found))


def test_threshold_finds_enough_with_fewest_questions():
    chances = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.3, 0.2])
    divergent = torch.tensor([1, 0, 1, 0, 0, 0], dtype=torch.bool)
    level = threshold_for(chances, divergent, recall=1.0)
    assert 0.6 < level <= 0.7
    assert 0.8 < threshold_for(chances, divergent, recall=0.5) <= 0.9


def test_refuses_models_that_do_not_go_together():
    large = model_of("llama", 2, 1)
    ids = torch.tensor([[3, 4]])
    from transformers import LlamaConfig, LlamaForCausalLM

    other = LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                         num_attention_heads=2, num_key_value_heads=1))  # fmt: skip
    for decoder, message in (
        (R2R(other), "vocabulary of 50"),
        (R2R(), "needs a small model"),
        (RandomRoute(large, rate=2.0), "rate=2.0"),
    ):
        with pytest.raises(BadRequest, match=message):
            generate(large, ids, torch.ones_like(ids), decoder)
