"""R2R and its controls: two models, two caches, one text."""

from __future__ import annotations

import pytest
import torch

from pertoken.core.errors import BadRequest
from pertoken.decode.entropy_route import EntropyRoute
from pertoken.decode.r2r import R2R
from pertoken.decode.random_route import RandomRoute
from pertoken.decode.router import Router, Seen, threshold_for
from pertoken.decode.router_training import Lessons, lessons, other_structure, train_router
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


@pytest.mark.parametrize(
    ("one", "other", "differs"),
    [
        ("    total = a + b\n", "    result = x + y\n", False),
        ("x = f(1, 'a')\n", 'y = g(22, "b c")\n', False),
        ("return a + b\n", "return a - b\n", True),
        ("if a:\n", "while a:\n", True),
        ("f(a, (b\n", "f(c, (d\n", False),
        ("f(a, (b\n", "f(c, d\n", True),
    ],
)
def test_structure_is_what_names_and_constants_leave(one, other, differs):
    assert other_structure(one, other) is differs


class Letters:
    """A tokenizer of one letter per token; 0 pads, 1 is a newline."""

    def __len__(self):
        return 61

    def decode(self, tokens):
        return "".join("\n" if t == 1 else chr(40 + t) for t in tokens)

    def __call__(self, texts, **options):
        rows = [[ord(c) - 40 for c in text] for text in texts]
        width = max(map(len, rows))
        return {
            "input_ids": torch.tensor([[0] * (width - len(row)) + row for row in rows]),
            "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
        }


def test_lessons_are_those_of_following_each_token_by_itself():
    large, small, tokenizer = model_of("llama", 4, 1), model_of("llama", 2, 2), Letters()
    compared = []

    def judge(one, other):
        compared.append((one, other))
        return one[-1] != other[-1]

    texts = ["ABC", "XYZAB", "Q", "BABA"]
    found = lessons(large, small, tokenizer, texts, judge, new=6, follow=5, batch=3)
    assert found.divergent.shape == (24,) and not bool((found.divergent & ~found.mismatch).any())
    wanted = []
    with torch.no_grad():
        for row, text in enumerate(texts):
            ids = [ord(c) - 40 for c in text]
            for place in range(6):
                out = small(torch.tensor([ids]), output_hidden_states=True)
                assert torch.allclose(found.seen.state[6 * row + place], out.hidden_states[-1][0, -1], atol=1e-4)
                token, theirs = int(out.logits[0, -1].argmax()), int(large(torch.tensor([ids])).logits[0, -1].argmax())
                assert int(found.seen.tokens[6 * row + place]) == token
                wanted.append(token != theirs)
                ids.append(theirs)
    assert found.mismatch.tolist() == wanted and len(compared) == sum(wanted)
    for one, other in compared:
        assert "\n" not in one[:-1] and "\n" not in other[:-1] and one != other


def test_a_router_learns_what_can_be_told_and_finds_enough():
    small = model_of("llama", 2, 2)
    generator = torch.Generator().manual_seed(0)
    state = torch.randn(2000, 32, generator=generator)
    divergent = state[:, 0] + 0.3 * torch.randn(2000, generator=generator) > 1.2
    logits = torch.randn(2000, 61, generator=generator)
    found = Lessons(Seen(state, logits, torch.zeros(2000, dtype=torch.long)), divergent, divergent)
    router = train_router(small, found, hidden=32, blocks=1, lr=3e-3, batch=256, epochs=12)
    with torch.no_grad():
        chances = router(found.seen).sigmoid()
    asked = chances >= router.threshold
    assert float(asked[divergent].float().mean()) > 0.85 and float(asked.float().mean()) < 0.5
    with pytest.raises(BadRequest, match="too few are divergent"):
        train_router(small, Lessons(found.seen, divergent, torch.zeros_like(divergent)))
