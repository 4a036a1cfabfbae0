import pytest
import torch
from hypothesis import given, settings

from pertoken.core.decision import Depth
from pertoken.core.trace import Trace
from pertoken.denoise import REFRESH
from pertoken.view.fills import fills, spent
from pertoken.view.grid import DECIDED, GAP, OPEN, PROMPT, grid, spelled, tone
from tests.view.traces import CANVAS_ROWS, INSERTED_ROWS, canvas, canvases, two_canvases, two_insertions, two_rows


def test_rows_have_their_own_prompt_steps_and_cut():
    first, second = fills(two_canvases(rows=CANVAS_ROWS))
    assert (first.prompt, first.length, first.steps) == (3, 4, 3) and (second.prompt, second.steps) == (1, 2)
    assert first.committed.tolist() == [1, 3, 2, 3] and second.committed.tolist() == [2, 1, 1, 0]
    assert first.again.tolist() == [1, 0, 0, 0] and second.again.tolist() == [0, 0, 0, 0]
    assert first.tokens == (10, 11, 12, 13) and second.tokens == (10, 11, 12, None)
    assert [piece for _, piece, _ in second.text] == ["&", "y", ""]


def test_a_text_that_is_not_there_is_told_by_ids():
    _, second = fills(two_canvases())
    assert second.text == [(0, "⟨10⟩", 2), (1, "⟨11⟩", 1), (2, "⟨12⟩", 1)]
    assert fills(canvas([1], [[1, 2]], tokens=False))[0].text == []


def test_spent_counts_rows_steps_and_work():
    told = spent(fills(two_canvases()))
    assert (told.steps, told.row_steps, told.committed) == (3, 5, 7)
    assert told.computed == 3 + (1 + 3 + 2 + 3) + 1 + 1 + (2 + 1 + 1 + 1)
    assert told.whole == 3 * 7 + 2 * 5


def test_other_traces_have_no_canvas():
    assert fills(two_rows()) == [] and fills(Trace()) == []


def test_layers_that_were_left_out_count_as_their_share():
    trace = canvas([1], [[1, 2]])
    step = trace.steps[2]
    assert step.site == REFRESH
    layers = torch.zeros(1, 3, 4, dtype=torch.bool)
    layers[..., 0] = True
    trace.steps[2] = type(step)(step.site, Depth(step.decision.valid, layers), step.rows, step.note)
    (fill,) = fills(trace)
    assert fill.computed.tolist() == [[1, 1, 1], [0.25, 0.25, 0.25]]


def test_borders_are_where_blocks_begin():
    (fill,) = fills(canvas([0], [[1, 2, 3, 4, 5, 6, 7, 8]]))
    assert fill.borders == [2, 4, 6]


def test_a_small_canvas_is_drawn_cell_by_cell():
    first, _ = fills(two_canvases(rows=CANVAS_ROWS))
    picture = grid(first, 100, 100)
    assert (picture.width, picture.start, picture.per) == (1 + GAP + 4, 1 + GAP, 1)
    assert [(line.first, line.last, len(line.marks)) for line in picture.lines] == [(1, 1, 1), (2, 2, 1), (3, 3, 2)]
    assert picture.lines[0].marks[0].title == "position 0: a at step 1"
    boxes = {(box.x - picture.start, box.y, box.width, box.height, box.kind) for box in picture.boxes}
    assert boxes == {
        (-1 - GAP, 0, 1, 1, PROMPT),
        (0, 0, 1, 1, OPEN),
        (0, 2, 1, 1, DECIDED),
        (1, 0, 1, 3, OPEN),
        (2, 0, 1, 2, OPEN),
        (3, 0, 1, 3, OPEN),
    }


def test_tones_run_from_first_to_last():
    assert [tone(step, 5) for step in (1, 3, 5)] == [0, 0.5, 1] and tone(1, 1) == 0


def test_a_place_is_spelled_by_text_id_or_end():
    first, second = fills(two_canvases(rows=CANVAS_ROWS))
    assert [spelled(first, place) for place in range(3)] == ["a", "␣<b", "↵"]
    assert spelled(second, 3) == "behind the end of text"
    assert spelled(fills(two_canvases())[0], 0) == "⟨10⟩"


@settings(derandomize=True, max_examples=60, deadline=None)
@given(canvases())
def test_boxes_cover_just_what_was_computed_and_marks_what_was_committed(made):
    trace, prompts, committed, work = made
    for fill in fills(trace):
        assert fill.committed.tolist() == committed[fill.number] and fill.prompt == prompts[fill.number]
        picture = grid(fill, 1000, 1000)
        covered = {
            (int(box.x - picture.start) + dx, box.y + dy + 1): box.kind
            for box in picture.boxes
            if box.kind != PROMPT
            for dx in range(box.width)
            for dy in range(box.height)
        }
        expected = {
            (place, step): DECIDED if step > committed[fill.number][place] else OPEN
            for place in range(fill.length)
            for step in range(1, fill.steps + 1)
            if work[fill.number, step, fill.prompt + place]
        }
        assert covered == expected
        worked = any(box.kind == PROMPT for box in picture.boxes)
        assert worked == bool(fill.computed[:, : fill.prompt].any())
        marks = {(int(mark.x - picture.start), line.first) for line in picture.lines for mark in line.marks}
        assert marks == {(place, step) for place, step in enumerate(committed[fill.number])}


@pytest.mark.parametrize(("columns", "lines"), [(1, 1), (3, 2), (5, 4)])
@settings(derandomize=True, max_examples=20, deadline=None)
@given(canvases())
def test_binned_pictures_stay_small_and_lose_no_commit(columns, lines, made):
    trace, *_ = made
    for fill in fills(trace):
        picture = grid(fill, columns, lines)
        assert len(picture.lines) <= lines and picture.width - picture.start <= columns
        size = min(picture.per, fill.length)
        shares = sum(mark.share for line in picture.lines for mark in line.marks)
        assert shares >= fill.length / size - 1e-6
        assert picture.lines[-1].last == fill.steps
        assert all(0 < box.share <= 1 and box.y + box.height <= len(picture.lines) for box in picture.boxes)


def test_insertions_stand_where_they_ended_up():
    first, second = fills(two_insertions())
    assert first.committed.tolist() == [0, 2, 1, 3, 0] and second.committed.tolist() == [1]
    assert first.tokens == (None, 31, 32, 33, None) and second.tokens == (41,)
    assert first.given.tolist() == [True, False, False, False, True] and not second.given.any()
    assert (first.steps, second.steps) == (4, 2) and first.stop == (0.03, 0.03, 0.03, 0.97)
    assert first.computed.tolist() == [[1, 0, 0, 0, 1], [1, 0, 1, 0, 1], [1, 1, 1, 0, 1], [1, 1, 1, 1, 1]]
    assert [piece for _, piece, _ in first.text] == ["⟨given⟩", "⟨31⟩", "⟨32⟩", "⟨33⟩", "⟨given⟩"]
    assert (spent([first, second]).committed, spent([first, second]).row_steps) == (4, 6)


def test_the_text_of_insertions_may_begin_with_cls():
    begun = [{"output": ["<cls>", *INSERTED_ROWS[0]["output"]]}, INSERTED_ROWS[1]]
    for rows in (INSERTED_ROWS, begun):
        first, _ = fills(two_insertions(rows=rows))
        assert first.text == [(0, "a", 0), (1, " x", 2), (2, " <y", 1), (3, "\n", 3), (4, "b", 0)]


def test_an_inserted_token_is_drawn_from_its_step_on_and_a_given_one_always():
    first, _ = fills(two_insertions(rows=INSERTED_ROWS))
    picture = grid(first, 100, 100)
    marks = [(mark.x, line.first, mark.title) for line in picture.lines for mark in line.marks]
    assert marks == [(2, 1, "position 2: ␣<y at step 1"), (1, 2, "position 1: ␣x at step 2"), (3, 3, marks[2][2])]
    boxes = {(box.x, box.y, box.width, box.height, box.kind) for box in picture.boxes}
    assert boxes == {(0, 0, 1, 4, PROMPT), (4, 0, 1, 4, PROMPT)} | {(c, y, 1, 4 - y, DECIDED) for c, y in BORN}
    assert picture.lines[1].title == "step 2 of 4: 1 inserted, 3 tokens read, P(stop) 0.03"
    assert picture.lines[3].title == "step 4 of 4: 0 inserted, 5 tokens read, P(stop) 0.97"


BORN = ((1, 2), (2, 1), (3, 3))
