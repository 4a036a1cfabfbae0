"""Charts are well-formed SVG that shows every finite point where it belongs; estimates are what they say."""

from __future__ import annotations

from itertools import combinations, pairwise
from xml.etree import ElementTree

import numpy as np
import pytest

from pertoken.core.chart import Chart, Line
from pertoken.core.estimates import difference, interval, pass_at

SVG = "{http://www.w3.org/2000/svg}"


def drawn(chart):
    return ElementTree.fromstring(chart.svg())


def circles(root):
    return [(float(c.get("cx")), float(c.get("cy"))) for c in root.iter(f"{SVG}circle")]


def test_points_are_in_order_and_to_scale():
    line = Line("a", [(4, 0.5), (1, 0.0), (2, 1.0)], [(1, 0.0, 0.2), (2, 0.9, 1.0), (4, 0.4, 0.6)])
    for log in (False, True):
        root = drawn(Chart("t", "x", "y", [line], log=log, percent=True))
        (x1, y1), (x2, y2), (x4, y4) = circles(root)
        assert y1 > y4 > y2 and y1 - y4 == pytest.approx(y4 - y2, abs=0.2)
        ratio = (x4 - x2) / (x2 - x1)
        assert ratio == pytest.approx(1.0 if log else 2.0, abs=0.02)
        assert len(list(root.iter(f"{SVG}polygon"))) == 1
        texts = [t.text for t in root.iter(f"{SVG}text")]
        assert {"t", "x", "y", "a", "0 %", "100 %"} <= set(texts)


def test_what_is_not_finite_is_left_out_and_text_is_escaped():
    root = drawn(Chart("a < b & c", "x", "y", [Line("<i>", [(1, 2), (2, float("nan")), (3, 4)]), Line("none", [])]))
    assert len(circles(root)) == 2
    assert "<i>" in [t.text for t in root.iter(f"{SVG}text")]


def test_a_dashed_level_crosses_the_chart():
    root = drawn(Chart("t", "x", "y", [Line("a", [(1, 0), (9, 1)]), Line("level", [(1, 0.5)], dashed=True)]))
    dashed = next(p for p in root.iter(f"{SVG}polyline") if p.get("stroke-dasharray"))
    (x1, y1), (x2, y2) = (map(float, p.split(",")) for p in dashed.get("points", "").split())
    assert y1 == y2 and [x1, x2] == sorted(c[0] for c in circles(root))


def test_names_at_the_ends_do_not_cover_each_other():
    lines = [Line(f"line {i}", [(0, i), (1, 0.5 + i / 1000)]) for i in range(5)]
    root = drawn(Chart("t", "x", "y", lines))
    heights = sorted(float(t.get("y", "0")) for t in root.iter(f"{SVG}text") if (t.text or "").startswith("line "))
    assert len(heights) == 5 and min(b - a for a, b in pairwise(heights)) >= 12.9


def test_a_flat_line_and_a_single_point_are_drawn():
    assert len(circles(drawn(Chart("t", "x", "y", [Line("a", [(1, 2), (2, 2)])])))) == 2
    assert len(circles(drawn(Chart("t", "x", "y", [Line("a", [(1, 0)])], log=True)))) == 1


def test_the_interval_covers_the_mean_as_often_as_it_says():
    rng, covered = np.random.default_rng(0), 0
    for trial in range(200):
        values = rng.random(60) < 0.3
        low, high = interval(values.astype(float).tolist(), seed=trial)
        covered += low <= 0.3 <= high
    assert 0.88 <= covered / 200 <= 0.99
    assert interval([1.0]) == (1.0, 1.0)
    assert all(np.isnan(interval([])))


def test_a_paired_difference_is_narrower_than_an_unpaired_one():
    rng = np.random.default_rng(1)
    hard = rng.random(80)
    low, high = difference((hard + 0.1).tolist(), hard.tolist())
    assert low == pytest.approx(0.1) and high == pytest.approx(0.1)
    with pytest.raises(ValueError, match="as many on both sides"):
        difference([1.0], [1.0, 2.0])


@pytest.mark.parametrize(("passed", "samples"), [(0, 4), (1, 4), (3, 5), (5, 5)])
def test_pass_at_k_is_the_share_of_choices_with_a_pass(passed, samples):
    answers = [True] * passed + [False] * (samples - passed)
    for k in range(1, samples + 1):
        picks = list(combinations(answers, k))
        assert pass_at(k, passed, samples) == pytest.approx(sum(map(any, picks)) / len(picks))
    with pytest.raises(ValueError, match="needs at least"):
        pass_at(samples + 1, passed, samples)
