import pytest
import torch
from hypothesis import given, settings

from pertoken.core.decision import Keep
from pertoken.core.trace import Trace
from pertoken.view.spans import bars, marked, passages, printable, totals, turns, vocabulary
from tests.view.traces import NGRAM, ROWS, commit, guess, traces, two_rows


def kinds(trace):
    return [[span.kind for span in passage.spans] for passage in passages(trace)]


def one_step(*rows):
    trace = Trace()
    trace.record("decode.step", commit(*rows))
    return trace


CASES = {
    "an empty tree": (guess(committed=[1]), ["plain"]),
    "refused at the first node": (guess([1, 2], committed=[3]), ["corrected"]),
    "refused below an accepted node": (guess([1, 2], path=[0], committed=[1, 3]), ["model", "corrected"]),
    "all accepted": (guess([1, 2], path=[0, 1], committed=[1, 2, 3]), ["model", "model", "plain"]),
    "stopped on an accepted node": (guess([1, 2], path=[0], committed=[1]), ["model"]),
    "n-grams": (guess([1], sources=[NGRAM], path=[0], committed=[1, 2]), ["ngram", "plain"]),
    "a leaf beside longer guesses": (guess([1, 2, 3], [-1, -1, 1], path=[0], committed=[1, 4]), ["model", "plain"]),
}


@pytest.mark.parametrize(("row", "expected"), CASES.values(), ids=CASES.keys())
def test_kinds_of_one_step(row, expected):
    assert kinds(one_step(row)) == [expected]


def test_padding_of_a_narrow_row_is_no_guess():
    trace = one_step(guess([1, 2, 3], path=[0, 1, 2], committed=[1, 2, 3, 4]), guess(committed=[5]))
    assert kinds(trace) == [["model", "model", "model", "plain"], ["plain"]]
    assert [len(turn.tokens) for turn in turns(trace)] == [3, 0]


def test_ragged_rows_keep_their_own_tokens():
    first, second = passages(two_rows(rows=ROWS))
    assert kinds(two_rows()) == [
        ["model", "ngram", "corrected", "plain", "model", "plain"],
        ["corrected", "exit", "exit"],
    ]
    assert [span.token for span in first.spans] == [6, 7, 9, 10, 11, 12]
    assert [span.turn.step for span in second.spans if span.turn] == [1, 2, 2]
    assert [span.place for span in first.spans] == [1, 2, 3, 1, 1, 2]
    assert [passage.text for passage in (first, second)] == ["".join(row["output"]) for row in ROWS]


def test_exit_layer_belongs_to_rows_that_drafted():
    assert [turn.exit for turn in turns(two_rows())] == [None, None, None, 2, None]


def test_rows_are_numbered_by_the_batch_even_when_the_first_stops_first():
    trace = one_step(guess(committed=[1]), guess(committed=[2]))
    trace.record("decode.step", commit(guess([4], path=[0], committed=[4, 5])), (1,))
    assert [[span.token for span in passage.spans] for passage in passages(trace)] == [[1], [2, 4, 5]]


def test_output_that_was_not_recorded_stays_readable():
    rows = [{"prompt": [], "output": ["a", "b"]}]
    trace = Trace({"rows": rows})
    trace.record("layers", Keep(torch.tensor([[True]]), torch.tensor([[True]])))
    (passage,) = passages(trace)
    assert passage.text == "ab" and {span.kind for span in passage.spans} == {"unknown"}
    assert turns(trace) == [] and bars(trace, 5) == [] and totals(trace).steps == 0


def test_without_text_a_token_is_its_id():
    assert [span.label for span in passages(two_rows())[1].spans] == ["⟨3⟩", "⟨1⟩", "⟨2⟩"]


def test_totals():
    sums = totals(two_rows())
    assert (sums.steps, sums.tokens, sums.drafted, sums.accepted) == (3, 9, 9, 5)
    assert sums.layers == pytest.approx((2 * 6 + 2 * 8 + 6) / 9)
    assert totals(one_step(guess(committed=[1]))).layers is None


def test_many_steps_are_summed_into_few_bars():
    trace = Trace()
    for _ in range(10):
        trace.record("decode.step", commit(guess([1, 2], sources=[NGRAM, NGRAM], path=[0], committed=[1, 3])), exit=4)
    found = bars(trace, 4)
    assert [bar.name for bar in found] == ["1–3", "4–6", "7–9", "10"]
    assert [(bar.drafted, bar.accepted["ngram"], bar.tokens) for bar in found] == [(6, 3, 6)] * 3 + [(2, 1, 2)]
    assert {bar.exit for bar in found} == {4}


def test_vocabulary_adds_guesses_that_were_not_taken():
    assert vocabulary(two_rows(rows=ROWS, vocabulary={"5": "five"})) == {
        **{token: f"<{token}>\n" for token in (6, 7, 9, 10, 11, 12, 3, 1, 2)},
        5: "five",
    }


def test_control_characters_are_shown_not_sent():
    assert printable("a\x1b[31m\x00\n\t\x7f") == "a␛[31m␀\n\t␡"
    assert marked(" \n\t") == "␣↵⇥"


@settings(derandomize=True, max_examples=60)
@given(traces())
def test_every_committed_token_is_one_span_and_the_text_is_the_output(trace):
    found = passages(trace)
    sums = totals(trace)
    assert (
        sum(len(passage.spans) for passage in found)
        == sums.tokens
        == sum(int(s.decision.count.sum()) for s in trace.steps)
    )
    assert sums.accepted == sum(int(step.decision.accepted.sum()) for step in trace.steps)
    for passage in found:
        committed = [t for turn in turns(trace) if turn.row == passage.number for t in turn.committed]
        assert [span.token for span in passage.spans] == committed
        if rows := trace.about.get("rows"):
            assert passage.text == "".join(rows[passage.number]["output"])
    for limit in (1, 2, 100):
        grouped = bars(trace, limit)
        assert len(grouped) <= limit
        assert sum(bar.drafted for bar in grouped) == sums.drafted
        assert sum(bar.tokens for bar in grouped) == sums.tokens
