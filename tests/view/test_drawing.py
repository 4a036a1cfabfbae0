from collections import Counter
from itertools import pairwise

from hypothesis import given, settings

from pertoken.core.trace import Trace
from pertoken.view.drawing import ROW, segments, telling, tree_picture
from pertoken.view.spans import Bar, turns
from tests.view.traces import commit, guess, traces, two_rows


def test_segments_stack_up_to_what_was_drafted():
    bar = Bar(1, 1, 10, Counter(ngram=3, model=2), 6)
    assert [(s.kind, s.start, s.height) for s in segments(bar)] == [("model", 0, 2), ("ngram", 2, 3), ("refused", 5, 5)]
    assert segments(Bar(1, 1, 0, Counter(), 1)) == []


def test_the_committed_path_is_the_top_line():
    picture = tree_picture(turns(two_rows())[0], " f\n", {5: "five"})
    top = min(node.y for node in picture.nodes)
    line = sorted((node for node in picture.nodes if node.y == top), key=lambda node: node.x)
    assert [(node.text, node.kind) for node in line] == [
        ("␣f↵", "root"),
        ("#6", "model"),
        ("#7", "ngram"),
        ("#9", "corrected"),
    ]
    assert {node.text for node in picture.nodes if node.kind == "refused"} == {"five", "#8"}
    assert sum(link.kept for link in picture.links) == 3


def test_a_chain_of_a_thousand_is_drawn_on_one_line():
    trace = Trace()
    trace.record("decode.step", commit(guess(range(1000), path=range(1000), committed=range(1001))))
    assert tree_picture(turns(trace)[0], "", {}).height < 2 * ROW


def test_telling_turns_are_different_ones_with_guesses():
    found = telling(turns(two_rows()))
    assert [(turn.step, turn.row) for turn in found] == [(2, 1), (1, 0), (1, 1)]
    assert telling([]) == []


@settings(derandomize=True, max_examples=60)
@given(traces())
def test_boxes_never_overlap_and_stay_inside(trace):
    for turn in turns(trace):
        picture = tree_picture(turn, "x", {})
        own = len(turn.committed) - len(turn.path)
        assert len(picture.nodes) == len(turn.tokens) + own + 1 == len(picture.links) + 1
        places = sorted((node.y, node.x, node.width) for node in picture.nodes)
        for (y, x, width), (next_y, next_x, _) in pairwise(places):
            assert next_y - y >= ROW or next_x > x + width
        assert all(n.x > 0 and n.x + n.width < picture.width and 10 < n.y < picture.height - 10 for n in picture.nodes)
