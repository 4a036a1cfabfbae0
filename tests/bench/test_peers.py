"""diffusers' LLaDA2Pipeline on our models: where the settings agree it commits what our loop commits."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from pertoken.bench.peers import llada2
from pertoken.core.errors import BadRequest
from pertoken.denoise.loop import Denoise
from pertoken.denoise.threshold import Threshold
from tests.denoise.conftest import MASK, bidirectional, fill, prompts

pytestmark = pytest.mark.skipif(find_spec("diffusers") is None, reason="diffusers is not installed")
torch.set_num_threads(1)
BLOCK = 8


@pytest.fixture(scope="module", params=[0, 1], ids=["aligned", "shifted"])
def model(request):
    torch.manual_seed(0)
    model = bidirectional("llama")
    model.config.prediction_shift = request.param
    return model


def ours(model, inputs, length, decoder, **options):
    return fill(model, inputs, decoder, length, **options)


@pytest.mark.parametrize("lengths", [(7,), (8,), (7, 3, 12)], ids=str)
def test_one_token_per_step_is_the_schedule(model, lengths):
    inputs = prompts(*lengths)
    run = llada2(model, BLOCK, threshold=2.0)(inputs, BLOCK)
    assert run.tokens.tolist() == ours(model, inputs, BLOCK, Denoise(block=BLOCK)).tolist()
    assert run.forwards == BLOCK and run.counted == BLOCK * len(lengths) and run.seconds > 0


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_several_tokens_per_step(model, steps):
    inputs = prompts(7, 3, 12)
    run = llada2(model, BLOCK, steps, threshold=2.0)(inputs, BLOCK)
    assert run.tokens.tolist() == ours(model, inputs, BLOCK, Denoise(block=BLOCK, steps=steps)).tolist()
    assert run.forwards == steps


@pytest.mark.parametrize("tau", [0.1, 0.3])
def test_a_threshold_row_by_row(model, tau):
    """Alone: in a batch its steps go on until the slowest row is done. It notices one forward late that a block is."""
    early = 0
    for seed in range(3):
        inputs, decoder = prompts(9, seed=seed), Denoise(Threshold(tau), block=BLOCK)
        run = llada2(model, BLOCK, threshold=tau)(inputs, BLOCK)
        assert run.tokens.tolist() == ours(model, inputs, BLOCK, decoder).tolist()
        early += decoder.stats.steps < BLOCK
        assert run.forwards == decoder.stats.steps + (decoder.stats.steps < BLOCK)
    assert early


def test_whole_shows_the_blocks_that_follow_as_our_loop_does(model):
    inputs = prompts(7, 3, 12)
    whole = llada2(model, BLOCK, threshold=2.0, whole=True)(inputs, 3 * BLOCK)
    assert whole.tokens.tolist() == ours(model, inputs, 3 * BLOCK, Denoise(block=BLOCK)).tolist()
    plain = llada2(model, BLOCK, threshold=2.0)(inputs, 3 * BLOCK)
    assert plain.tokens[:, BLOCK:].tolist() != whole.tokens[:, BLOCK:].tolist()


def test_by_itself_it_does_not_see_them(model):
    """So that it is our loop on a canvas of one block, again and again."""
    inputs, found = prompts(7, 3, 12), []
    run = llada2(model, BLOCK, threshold=2.0)(inputs, 3 * BLOCK)
    for _ in range(3):
        found.append(ours(model, inputs, BLOCK, Denoise(block=BLOCK)))
        inputs = {
            "input_ids": torch.cat([inputs["input_ids"], found[-1]], 1),
            "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, BLOCK), value=1),
        }
    assert run.tokens.tolist() == torch.cat(found, 1).tolist()
    assert run.forwards == 3 * BLOCK


def test_it_stops_at_the_end_of_text_even_if_prompts_hold_it(model):
    inputs, length = prompts(12, 9), 4 * BLOCK
    free = llada2(model, BLOCK, threshold=2.0, whole=True)(inputs, length)
    end = int(free.tokens[0, 3])
    inputs["input_ids"][:, -2] = end
    plain = ours(model, inputs, length, Denoise(block=BLOCK), eos_token_id=end, pad_token_id=end)
    run = llada2(model, BLOCK, threshold=2.0, whole=True)(inputs, length, end)
    alone = llada2(model, BLOCK, threshold=2.0, whole=True)({k: v[:1] for k, v in inputs.items()}, length, end)
    assert run.tokens.tolist() == plain.tolist()
    assert run.counted == int(sum((row != end).cumprod(0).sum() + (row == end).any() for row in plain))
    assert alone.tokens[0].tolist() == plain[0].tolist()
    if end in plain[0]:
        assert alone.forwards < length


def test_no_mask_token_is_left(model):
    for steps in (1, 3, 8):
        assert not (llada2(model, BLOCK, steps, threshold=0.5)(prompts(7, 3), 2 * BLOCK).tokens == MASK).any()


def test_what_it_cannot_run_is_named(model):
    with pytest.raises(BadRequest, match="block=8 does not divide 12"):
        llada2(model, BLOCK)(prompts(5), 12)
    causal = bidirectional("llama")
    causal.config.is_causal = True
    with pytest.raises(BadRequest, match="no masked-diffusion model"):
        llada2(causal)
