"""Canvas rules: padding that stays in place against rows that end."""

from __future__ import annotations

import pytest
import torch
from transformers import LogitsProcessorList

from pertoken.denoise.canvas import Canvas
from pertoken.denoise.ends import EndOfText, PaddingFill
from pertoken.denoise.loop import COMMIT, Denoise
from pertoken.denoise.schedule import Schedule
from pertoken.denoise.threshold import Threshold
from tests.denoise.conftest import END, MASK, alone, fill, prompts

EOS = torch.tensor([END])


def canvas_with(*rows):
    """Canvases of four positions behind a prompt of one token: a token, or None where undecided."""
    canvas = Canvas.of(torch.full((len(rows), 1), END), torch.ones(len(rows), 1), 4, 4, MASK)
    ids = torch.tensor([[END, *(MASK if token is None else token for token in row)] for row in rows])
    known = torch.tensor([[False, *(token is not None for token in row)] for row in rows])
    canvas.commit(known, ids)
    return canvas


def test_only_what_is_undecided_behind_the_first_decided_end_becomes_padding():
    canvas = canvas_with([None, END, 7, None], [5, None, None, END], [None] * 4, [END, END, None, 9])
    ends = PaddingFill(0).trim(canvas, EOS, canvas.masked, None)
    assert ends.tolist() == [3, 5, 5, 2]
    canvas.fill(ends, 0)
    assert canvas.ids[:, 1:].tolist() == [[MASK, END, 7, 0], [5, MASK, MASK, END], [MASK] * 4, [END, END, 0, 9]]
    assert canvas.masked[:, 1:].long().tolist() == [[1, 0, 0, 0], [0, 1, 1, 0], [1] * 4, [0] * 4]
    assert canvas.valid.all(), "padding is read like any other token"


def test_a_padding_token_ends_a_row_too():
    canvas = canvas_with([5, 0, None, END])
    assert PaddingFill(0).trim(canvas, EOS, canvas.masked, None).tolist() == [3]
    assert PaddingFill().trim(canvas, EOS, canvas.masked, None).tolist() == [5]


def likely(ids, scores):
    """Texts end somewhere: a processor that makes the end of text likely."""
    return scores + 5.0 * torch.nn.functional.one_hot(torch.tensor(END), scores.shape[-1])


OPTIONS = {"eos_token_id": END, "length": 32, "logits_processor": LogitsProcessorList([likely])}


@pytest.mark.parametrize("block", [8, None])
@pytest.mark.parametrize("commit", [Schedule(), Threshold(0.3)])
def test_padding_saves_steps_where_rows_end_and_does_not_depend_on_the_batch(model, commit, block):
    inputs = prompts(6, 10, 3, seed=4)
    plain, filled, cut = (Denoise(commit, canvas=rule, block=block) for rule in (None, PaddingFill(), EndOfText()))
    texts = [fill(model, inputs, decoder, **OPTIONS) for decoder in (plain, filled, cut)]
    assert any(END in row for row in texts[1].tolist()), "some row must end"
    assert filled.stats.row_steps < plain.stats.row_steps
    assert filled.stats.token_forwards > cut.stats.token_forwards
    for row in range(3):
        assert fill(model, alone(inputs, row), filled, **OPTIONS)[0].tolist() == texts[1][row].tolist()


def test_a_replay_fills_as_the_recording_did(model):
    inputs = prompts(6, 10, seed=4)
    decoder = Denoise(canvas=PaddingFill(), block=None)
    with decoder.record() as trace:
        out = fill(model, inputs, decoder, **OPTIONS)
    assert sum(int(step.decision.keep.sum()) for step in trace.at(COMMIT)) < 64
    with decoder.replay(trace):
        assert fill(model, inputs, decoder, **OPTIONS).equal(out)


def test_without_an_end_of_text_nothing_is_filled(model):
    decoders = [Denoise(canvas=rule, block=8) for rule in (None, PaddingFill())]
    outs = [fill(model, prompts(6), decoder) for decoder in decoders]
    assert outs[0].equal(outs[1]) and decoders[0].stats.steps == decoders[1].stats.steps


OTHER = 9


def test_any_of_several_ends_of_text_cuts_and_the_first_of_them_wins():
    canvas = canvas_with([None, OTHER, END, None], [5, None, None, END], [None] * 4, [7, OTHER, None, 8])
    both = torch.tensor([END, OTHER])
    assert EndOfText().trim(canvas, both, canvas.masked, None).tolist() == [3, 5, 5, 3]
    assert EndOfText().trim(canvas, EOS, canvas.masked, None).tolist() == [4, 5, 5, 5]
    assert PaddingFill(7).trim(canvas, both, canvas.masked, None).tolist() == [3, 5, 5, 2]


def test_the_surest_of_several_predicted_ends_cuts_unless_one_is_decided_now():
    canvas, both = canvas_with([None] * 4, [None, OTHER, None, None]), torch.tensor([END, OTHER])
    tokens = torch.tensor([[-1, 5, END, OTHER, 5], [-1, END, -1, 5, 5]])
    confidence = torch.tensor([[0, 0.9, 0.4, 0.6, 0.9], [0, 0.9, 0, 0.5, 0.5]], dtype=torch.float64)
    nothing, now = torch.zeros_like(canvas.masked), torch.zeros_like(canvas.masked)
    now[1, 2] = True
    rule = EndOfText("predicted")
    assert rule.trim(canvas, both, nothing, (tokens, confidence)).tolist() == [4, 2]
    assert rule.trim(canvas, both, now, (tokens, confidence)).tolist() == [4, 3]
    assert rule.trim(canvas, EOS, now, (tokens, confidence)).tolist() == [3, 2]


@pytest.mark.parametrize("rule", [None, EndOfText(), EndOfText("predicted"), PaddingFill()])
def test_a_model_may_have_several_ends_of_text(model, rule):
    """Each row of the batch ends with another token; both are ends, whichever is named first."""
    inputs, decoder = prompts(6, 10, 3, seed=4), Denoise(Threshold(0.3), canvas=rule, block=8)
    free = fill(model, inputs, Denoise(Threshold(0.3), block=8)).tolist()
    one, other = free[0][5], next(token for token in free[1][3:] if token not in free[0])
    found = [fill(model, inputs, decoder, eos_token_id=ends).tolist() for ends in ([one, other], [other, one])]
    alike = [[[one if token == other else token for token in row] for row in rows] for rows in found]
    assert alike[0] == alike[1], "the first end is only what a row is filled up with that was cut behind a guess"
    lengths = []
    for row in found[0]:
        ends = [place for place, token in enumerate(row) if token in (one, other)]
        lengths.append(ends[0] + 1 if ends else len(row))
        assert set(row[lengths[-1] :]) <= {0}
    assert lengths[0] < 16 and lengths[1] < 16 and decoder.stats.tokens == sum(lengths)
    assert rule == EndOfText("predicted") or found[0][0][lengths[0] - 1] != found[0][1][lengths[1] - 1]
