"""What was read and kept: hand-made traces, and real ones of a tiny model beside counts with loops."""

from __future__ import annotations

import math
from typing import Any, ClassVar, cast

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pertoken.attend import eviction, selection
from pertoken.attend.h2o import H2O
from pertoken.attend.random_keys import RandomKeys
from pertoken.attend.snapkv import SnapKV
from pertoken.attend.tokenselect import TokenSelect
from pertoken.core.attach import attach
from pertoken.core.budget import Budget
from pertoken.core.decision import Select
from pertoken.core.trace import Trace
from pertoken.decode.full import Full
from pertoken.view.heat import by_layer, by_step
from pertoken.view.html import OPEN_ROWS, render
from pertoken.view.reading import MOST_COLUMNS, MOST_LINES, MOST_TOKENS, title
from pertoken.view.reads import KEPT, READ, SITES, Reads, reads
from pertoken.view.spans import marked
from pertoken.view.terminal import steps_chart, text_view
from tests.view.test_html import EVIL, Page
from tests.view.test_terminal import shown
from tests.view.traces import two_canvases, two_rows

torch.set_num_threads(1)
NAN = math.nan
TEXTS = [{"prompt": ["a", "b", "c", "d"], "output": ["e", "f", "g"]}, {"prompt": ["<x", "\n"], "output": ["z"]}]
PAIR = (1, 1)


def select(valid, runs, length=1) -> Select:
    """valid `[batch, query]`; runs `[batch, group, run]` lists of columns."""
    most = max(len(chosen) for row in runs for group in row for chosen in group)
    index = [[[[*chosen, *[-1] * (most - len(chosen))] for chosen in group] for group in row] for row in runs]
    return Select(torch.tensor(valid).bool(), torch.tensor(index), torch.full((len(valid),), length))


def record(site, *forwards, **about) -> Trace:
    """Each forward a list of decisions, one per layer."""
    trace = Trace({"method": "toy"} | about)
    for forward in forwards:
        for layer, decision in enumerate(forward):
            trace.record(f"{site}{layer}", decision)
    return trace


def read_trace(**about) -> Trace:
    """Row 0: prompt of 4 in runs of 2, then columns 4 and 5. Row 1: two columns of padding, prompt of 2. Two layers,
    the second of two groups."""
    valid = [[1, 1, 1, 1], [0, 0, 1, 1]]
    one = select(valid, [[[[0, 1], [0, 2, 3]]], [[[2, 3], []]]], 2)
    two = select(valid, [[[[0, 1], [1, 2, 3]], [[0, 1], [0, 1, 2, 3]]], [[[2, 3], []]] * 2], 2)
    first = [
        select([[1], [1]], [[[[0, 4]]], [[[2, 4]]]]),
        select([[1], [1]], [[[[1, 3, 4]], [[1, 4]]], [[[3, 4]]] * 2]),
    ]
    last = [select([[1], [1]], [[[[0, 4, 5]]], [[[5]]]]), select([[1], [1]], [[[[5]], [[1, 5]]], [[[5]]] * 2])]
    return record(SITES[READ], [one, two], first, last, **about)


def kept_trace(**about) -> Trace:
    """Row 0: prompt of 4, row 1: of 2 behind padding; each head keeps 2."""
    prompt = select([[1], [1]], [[[[0, 3]], [[1, 3]]], [[[2, 3]], [[2, 3]]]])
    first = select([[1], [1]], [[[[0, 4]], [[3, 4]]], [[[2, 4]], [[3, 4]]]])
    return record(SITES[KEPT], [prompt], [first], **about)


def same(tensor, expected) -> bool:
    return torch.allclose(tensor, torch.tensor(expected, dtype=tensor.dtype), atol=1e-6, equal_nan=True)


def test_sites_are_those_of_the_mechanisms():
    assert SITES[READ] == f"{selection.SITE}." and SITES[KEPT] == f"{eviction.SITE}."


def test_rows_are_read_without_their_padding():
    first, second = reads(read_trace())
    assert (first.number, first.verb, first.prompt, first.length, first.layers) == (0, READ, 4, 6, (0, 1))
    assert (second.number, second.prompt, second.length) == (1, 2, 4)
    assert first.before.tolist() == [4, 5] and second.before.tolist() == [2, 3]
    assert same(first.share, [[0.5, 0.5, 0, 0.25, 0, 0], [0.5, 0.25, 0, 0, 0.5, 0]])
    assert same(second.share, [[0.5, 0.5, 0, 0], [0, 0, 0, 0]])
    assert same(first.by_layer, [[1, 0, 0, 0, 1, 0], [0, 0.75, 0, 0.25, 0, 0]])
    assert same(first.often, [0.5, 0.375, 0, 0.125, 0.5, 0]) and first.could.tolist() == [2, 2, 2, 2, 1, 0]
    assert same(first.keys, [1.25, 1.25]) and first.part == pytest.approx(2.5 / 9)


def test_the_prompt_counts_queries_of_later_runs():
    first, second = reads(read_trace())
    assert same(first.by_prompt, [0.75, 0.5, NAN, NAN, NAN, NAN]) and second.by_prompt.isnan().all()


def test_a_row_ends_with_its_text():
    first, second = reads(read_trace(rows=TEXTS))
    assert first.before.tolist() == [4, 5] and first.length == 6 and len(first.pieces) == 7
    assert second.before.tolist() == [2] and second.length == 3 and second.pieces == ["<x", "\n", "z"]


def test_requests_follow_each_other():
    trace = read_trace(rows=[*TEXTS, *TEXTS])
    trace.steps += read_trace().steps
    found = reads(trace)
    assert [row.number for row in found] == [0, 1, 2, 3]
    assert torch.equal(found[0].share, found[2].share) and found[3].pieces == found[1].pieces


def test_tokens_that_were_taken_back_are_not_drawn():
    trace = read_trace()
    trace.record(f"{SITES[READ]}0", select([[1], [1]], [[[[0, 4]]], [[[2, 4]]]]))
    assert reads(trace) == []
    assert "select at attend.keys.0 (4×)" in render([trace])


def test_other_traces_hold_no_reads():
    assert reads(Trace()) == [] and reads(two_rows()) == [] and reads(two_canvases()) == []


def test_what_was_kept_is_what_the_next_token_reads():
    first, second = reads(kept_trace())
    assert (first.verb, first.prompt, first.before.tolist()) == (KEPT, 4, [4, 5])
    assert same(first.share, [[0.5, 0.5, 0, 1, 0], [0.5, 0, 0, 0.5, 1]]) and same(first.keys, [2, 2])
    assert second.before.tolist() == [2, 3] and same(second.share, [[1, 1, 0], [0.5, 0.5, 1]])
    assert first.by_prompt.isnan().all()


def test_padding_of_an_eviction_follows_from_the_texts():
    """A first token that was never kept looks like padding, unless the text says that it is there."""
    gone = select([[1], [1]], [[[[1, 3]]], [[[3]]]])
    bare, told = record(SITES[KEPT], [gone]), record(SITES[KEPT], [gone], rows=TEXTS)
    assert [row.length for row in reads(bare)] == [3, 1] and [row.length for row in reads(told)] == [4, 2]
    assert same(reads(told)[1].share, [[0, 1]])


def test_a_second_request_of_an_eviction_begins_where_keys_are_back():
    trace = kept_trace()
    trace.steps += kept_trace().steps
    assert [row.before.tolist() for row in reads(trace)] == [[4, 5], [2, 3]] * 2


# --- real traces -------------------------------------------------------------------------------------------------


def llama():
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


class Batch:
    lengths: ClassVar = (11, 6)
    new = 5

    def __init__(self, rows=(0, 1)):
        generator = torch.Generator().manual_seed(3)
        ids = torch.randint(2, 61, (2, 11), generator=generator)
        mask = torch.arange(11) >= (11 - torch.tensor(self.lengths))[:, None]
        ids = ids * mask
        keep = 11 - max(self.lengths[row] for row in rows)
        self.inputs = {"input_ids": ids[list(rows), keep:], "attention_mask": mask[list(rows), keep:].long()}

    def trace(self, policy, **settings) -> Trace:
        trace, model = Trace({"method": "real"}), cast(Any, llama())
        with attach(model, policy, trace=trace):
            model.generate(**self.inputs, max_new_tokens=self.new, do_sample=False, **settings)
        return trace


POLICIES = {
    "random_keys": RandomKeys(**RandomKeys.small),
    "tokenselect": TokenSelect(**TokenSelect.small),
    "h2o": H2O(**H2O.small),
    "snapkv": SnapKV(**SnapKV.small),
}
every = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)


@every
def test_counts_are_those_of_loops(policy):
    trace = Batch().trace(policy)
    found = reads(trace)
    decisions = [step.decision for step in trace.steps if isinstance(step.decision, Select)]
    single = [decision for decision in decisions if decision.valid.shape[1] == 1]
    assert [row.prompt for row in found] == [11, 6]
    for row in found:
        left = 11 - Batch.lengths[row.number]
        for step in range(row.steps):
            for column in range(row.length):
                counted = 0.0
                for decision in single[2 * step : 2 * step + 2]:
                    groups = decision.index[row.number, :, 0].tolist()
                    counted += sum(left + column in group for group in groups) / len(groups) / 2
                expected = counted if column < row.before[step] else 0.0
                assert float(row.share[step, column]) == pytest.approx(expected)


@every
def test_a_row_is_read_as_it_is_alone(policy):
    together = reads(Batch().trace(policy))
    for number in (0, 1):
        (alone,) = reads(Batch((number,)).trace(policy))
        row = together[number]
        assert torch.equal(row.before, alone.before) and torch.allclose(row.share, alone.share)
        assert torch.allclose(row.by_layer, alone.by_layer)
        assert torch.allclose(row.by_prompt, alone.by_prompt, equal_nan=True)


def test_a_policy_that_reads_all_reads_all():
    for row in reads(Batch().trace(RandomKeys(Budget.full()))):
        assert row.part == 1 and row.keys.tolist() == row.before.tolist() and row.prompt == Batch.lengths[row.number]
        assert row.by_prompt[row.by_prompt.isfinite()].eq(1).all()


def test_memory_of_an_eviction_stays_at_its_budget():
    long, _ = reads(Batch().trace(H2O(Budget(tokens=6))))
    assert long.keys.tolist() == [6] * Batch.new and long.before.tolist() == list(range(11, 16))


def test_a_decoder_of_one_token_at_a_time_is_read_too():
    found = reads(Batch().trace(POLICIES["random_keys"], custom_generate=Full()))
    assert [row.prompt for row in found] == [10, 5]
    assert [row.before.tolist() for row in found] == [list(range(10, 15)), list(range(5, 10))]


def test_a_trace_from_a_file_says_the_same(tmp_path):
    trace = Batch().trace(POLICIES["tokenselect"])
    trace.save(tmp_path / "trace.safetensors")
    (first, _), (again, _) = reads(trace), reads(Trace.load(tmp_path / "trace.safetensors"))
    assert torch.equal(first.share, again.share)


# --- drawn -------------------------------------------------------------------------------------------------------


def needle(length: int, place: int, steps: int = 20) -> Reads:
    """A row of which one token is read at every step, and no other."""
    before = torch.arange(length - steps, length)
    share = torch.zeros(steps, length)
    share[:, place] = 1
    each = torch.zeros(1, length)
    each[0, place] = 1
    pieces = [f" w{column}" for column in range(length + 1)]
    return Reads(0, READ, length - steps, before, share, (0,), each, torch.full((length,), NAN), pieces)


def test_a_picture_has_a_cell_for_each_token_and_step():
    first, _ = reads(read_trace())
    heat = by_step(first, 100, 100)
    assert torch.allclose(heat.tones**2, first.share) and heat.there == [4, 5] and heat.border == 4
    assert heat.ground == "M0 0H4V1H5V2H0z"
    assert [line.title for line in heat.lines] == ["step 1 of 2: 1.2 of 4 keys read", "step 2 of 2: 1.2 of 5 keys read"]
    layers = by_layer(first, 100)
    assert [(line.first, line.keys) for line in layers.lines] == [(0, 1.5), (1, 1.0)]


def test_a_needle_is_seen_in_a_binned_picture():
    row = needle(5000, 1234, steps=300)
    heat = by_step(row, MOST_COLUMNS, MOST_LINES)
    assert heat.width <= MOST_COLUMNS and len(heat.lines) <= MOST_LINES and heat.lines[-1].last == 300
    column = 1234 // heat.per
    assert heat.tones.nonzero()[:, 1].unique().tolist() == [column]
    assert heat.paths == [(0.25, f"M{column} 0h1v{len(heat.lines)}h-1z")]


def test_tokens_say_how_often_they_were_read():
    first, _ = reads(read_trace(rows=TEXTS))
    expected = "token 1, b: read 38 % over 2 steps; most in layer 1, 75 %; by later tokens of the prompt 50 %"
    assert title(first, 1) == expected
    assert title(first, 6) == "token 6, g: nothing came after it that could read it"
    assert title(first, 5, 2).endswith("; at its own step 1.2 of 5 keys read")


def test_the_page_shows_the_text_the_pictures_and_the_figures():
    text = render([read_trace(rows=TEXTS, model="m")])
    page = Page(text)
    assert page.texts["given"] == ["abcd", "<x\n"] and page.texts["output"] == ["efg", "z"]
    tokens = [tag for tag in page.named("span") if (tag.get("class") or "").startswith("t read")]
    assert [tag.get("style") for tag in tokens[:3]] == ["--t:72%", "--t:62%", None]
    assert [tag["class"] for tag in tokens[:5]] == ["t read"] * 4 + ["t read own"]
    assert "A policy chooses which keys" in page.texts["lead"][0] and "A decoder guesses" not in page.texts["lead"][0]
    steps = {tag["data-step"] for tag in page.named("span") if "data-step" in tag}
    assert steps == {"1", "2"} == {tag["data-step"] for tag in page.named("g") if "data-step" in tag}
    assert "<dd>1.2</dd>" in text and "<dd>32 %</dd>" in text  # 3.5 keys in 3 steps, of 4 + 5 + 2


def test_what_was_kept_has_its_own_words():
    text = render([kept_trace(rows=TEXTS), read_trace()])
    page = Page(text)
    assert "A policy gives keys up for good" in page.texts["lead"][0] and "keys kept per step" in text
    assert "most keys kept" in text and "a dot is a token" in text


def test_markup_in_the_text_is_escaped():
    rows = [{"prompt": [EVIL] * 4, "output": [EVIL] * 3}, {"prompt": [EVIL] * 2, "output": [EVIL]}]
    text = render([read_trace(rows=rows, method=EVIL)])
    page = Page(text)
    assert "<script>alert" not in text and page.texts["given"][0] == EVIL * 4 and len(page.named("script")) == 1
    assert marked(EVIL) in {str(tag.get("title")).split(": ")[0].partition(", ")[2] for tag in page.named("span")}


def long_trace(rows: int, length: int, steps: int) -> Trace:
    """Rows of one layer: the prompt reads itself, then each token the first, 7 others and itself."""
    trace = Trace({"method": "long"})
    generator = torch.Generator().manual_seed(0)
    whole, lengths = torch.arange(length).expand(rows, 1, 1, -1), torch.full((rows,), length)
    trace.record(f"{SITES[READ]}0", Select(torch.ones(rows, length).bool(), whole, lengths))
    for step in range(steps):
        last = length + step
        others = torch.randint(1, length, (rows, 1, 1, 7), generator=generator).sort(-1).values
        index = torch.cat([torch.zeros(rows, 1, 1, 1).long(), others, torch.full((rows, 1, 1, 1), last)], -1)
        trace.record(f"{SITES[READ]}0", Select(torch.ones(rows, 1).bool(), index, torch.ones(rows).long()))
    pieces = [{"prompt": ["word "] * length, "output": ["out "] * (steps + 1)}] * rows
    trace.about["rows"] = pieces
    return trace


def test_long_texts_make_small_pages():
    trace = long_trace(5, MOST_TOKENS + 200, 150)
    text = render([trace])
    page = Page(text)
    assert page.texts["given"][0] == "word " * (MOST_TOKENS + 200)
    assert len(page.named("details")) == 5 - OPEN_ROWS
    assert len(page.named("span")) < 5 * 3000 and len(text) < 2_000_000
    assert len(page.named("g")) <= 5 * (2 * MOST_LINES + 3)


def test_the_terminal_shows_text_and_grid():
    trace = read_trace(rows=TEXTS, model="m")
    text = shown(text_view(trace))
    assert "toy on m  2 steps, 1.2 keys read per step, 32 % of all keys" in text
    assert "abcdefg" in text and "<x\nz" in text and "read never" in text
    lines = [line.rstrip() for line in shown(steps_chart(trace)).splitlines()]
    assert lines[:3] == ["row 0, 4 tokens of the prompt | 2 generated, from left to right", *GRID]


GRID = ["1 ▓▓ ▒│   1.2 of 4", "2 ▓▒  │▓  1.2 of 5"]


def test_the_terminal_shows_what_was_read_of_a_long_text():
    trace = long_trace(6, 3000, 10)
    text = shown(text_view(trace), width=80)
    assert " tokens … " in text and len(text) < 30_000 and "and 2 more rows" in text
    chart = shown(steps_chart(trace), width=80).splitlines()
    assert max(map(len, chart)) <= 80 and len(chart) < 130
