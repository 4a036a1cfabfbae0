"""How deep tokens ran: hand-made traces, real ones of a tiny model, and how they are drawn."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pertoken.core.attach import attach
from pertoken.core.budget import Budget
from pertoken.core.decision import Depth, Exit
from pertoken.core.trace import Trace
from pertoken.decode.full import Full
from pertoken.depth.fixed_exit import FixedExit
from pertoken.depth.skipdecode import SkipDecode
from pertoken.view.depths import depths, spans
from pertoken.view.html import render
from pertoken.view.terminal import text_view
from tests.view.test_html import EVIL
from tests.view.test_terminal import shown

torch.set_num_threads(1)
ONE = torch.ones(1, 1, dtype=torch.bool)
TEXTS = [{"prompt": ["a", "b"], "output": ["c", "<d", "\n"]}]


def depth(rows, tokens, layers):
    runs = torch.tensor(layers, dtype=torch.bool).expand(rows, tokens, -1)
    return Depth(torch.ones(rows, tokens, dtype=torch.bool), runs)


def exits(texts=TEXTS) -> Trace:
    """Prompt of two, then a token that left after 1 of 3 layers and one that stopped after 2."""
    trace = Trace({"method": "stop_exit", "rows": texts})
    trace.record("depth.exits.1", Exit(torch.ones(1, 2, dtype=torch.bool), torch.tensor([[3, 3]])))
    trace.record("depth.exits.2", Exit(torch.ones(1, 2, dtype=torch.bool), torch.tensor([[3, 3]])))
    for left in ((1, 1), (3, -2)):
        for ran, value in enumerate(left, 1):
            trace.record(f"depth.exits.{ran}", Exit(ONE, torch.tensor([[value]])))
    return trace


def test_tokens_have_the_layers_of_the_forward_that_they_came_out_of():
    (row,) = depths(exits())
    assert row.layers == ((0, 1, 2), (0,), (0, 1)) and row.stopped == (False, False, True)
    assert [row.told(i) for i in range(3)] == [
        "ran 3 of 3 layers",
        "ran 1 of 3 layers: 0",
        "ran 2 of 3 layers: 0–1; ended the text",
    ]
    trace = Trace({"rows": [{"prompt": ["a", "b"], "output": ["c", "d"]}]})
    for layers in ((1, 0, 1), (1, 0, 0), (1, 1, 1)):  # a decoder reads all of the prompt but its last token first
        trace.record("depth.layers", depth(1, 1, layers))
    assert depths(trace)[0].layers == ((0, 2), (0,))
    assert spans((0, 3, 4, 5, 7)) == "0, 3–5, 7" and spans(()) == "none"


def test_modules_chosen_layer_by_layer_or_at_once_are_read_alike():
    chosen, texts = ((1, 0, 1), (0, 1, 1), (1, 1, 1)), [{"prompt": ["a"], "output": ["b", "c", "d"]}]
    one_by_one, at_once = Trace({"rows": texts}), Trace({"rows": texts})
    for layers in chosen:
        at_once.record("depth.modules", depth(1, 1, layers))
        for layer, own in enumerate(layers):
            one_by_one.record(f"depth.modules.{layer}", depth(1, 1, (own,)))
    (row,), (other,) = depths(one_by_one), depths(at_once)
    assert row.layers == other.layers == ((0, 2), (1, 2), (0, 1, 2)) and row.depth == other.depth == 3


def test_traces_without_fixed_places_are_not_read():
    tree = Trace()
    for tokens in (3, 1, 2):
        tree.record("depth.layers", depth(1, tokens, (1, 1)))
    shrinking = Trace()
    for rows, tokens in ((2, 3), (2, 1), (1, 1)):
        shrinking.record("depth.layers", depth(rows, tokens, (1, 1)))
    assert depths(tree) == depths(shrinking) == depths(Trace()) == []


@pytest.mark.parametrize("decoder", [None, Full()], ids=["generate", "full"])
@pytest.mark.parametrize("policy", [SkipDecode(reference=4), FixedExit(Budget(layers=1))], ids=["skip", "exit"])
def test_a_real_run_is_read_row_by_row(policy, decoder):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        eos_token_id=None,
    )
    model, trace = LlamaForCausalLM(config).eval(), Trace()
    ids, mask = torch.randint(1, 50, (2, 5)), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    with attach(model, policy, trace=trace):
        options = {} if decoder is None else {"custom_generate": decoder}
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0, **options)
    trace.about["rows"] = [{"prompt": ["p"] * n, "output": ["o"] * 6} for n in (3, 5)]
    found = depths(trace)
    assert [row.counts for row in found] == [found[0].counts] * 2
    if isinstance(policy, FixedExit):
        assert found[0].counts == [4] + [1] * 5
    else:
        counts = found[0].counts
        assert counts == sorted(counts, reverse=True) and counts[-1] < counts[1] < counts[0] == 4
        assert all(own is not None and own[0] == 0 for own in found[0].layers)


def test_depths_are_drawn():
    page = render([exits()])
    assert "layers per token" in page and "2.00 of 3" in page and "&lt;d" in page and "ran 1 of 3 layers: 0" in page
    assert "--t:33%" in page and "No decoding steps were recorded" not in page
    text = shown(text_view(exits()))
    assert "2.00 of 3 layers per token" in text and "few layers" in text and "<d" in text
    assert "<script>alert" not in render([exits([{"prompt": [EVIL], "output": [EVIL] * 3}])])


def test_text_need_not_be_there():
    (row,) = depths(exits([]))
    assert row.counts == [3, 1, 2]
    assert "·" in render([exits([])]) and "·" in shown(text_view(exits([])))
