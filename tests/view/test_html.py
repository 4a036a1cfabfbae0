from html.parser import HTMLParser

import pytest
import torch
from hypothesis import given, settings

from pertoken.core.decision import Keep
from pertoken.core.trace import Trace
from pertoken.view.html import MOST_BARS, MOST_LINES, OPEN_ROWS, render, write
from pertoken.view.spans import printable
from tests.view.traces import (
    CANVAS_ROWS,
    INSERTED_ROWS,
    ROWS,
    RUN,
    canvas,
    canvases,
    commit,
    guess,
    traces,
    two_canvases,
    two_insertions,
    two_rows,
)

VOID = {"meta", "br", "hr", "img", "input", "link"}
EVIL = "<script>alert(1)</script>\"'&amp;<b title='x'>"


class Page(HTMLParser):
    """Checks that tags nest, and keeps attributes and the text inside elements of some class."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[tuple[str, str]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        assert len(found) == len(attrs), f"an attribute of <{tag}> is given twice"
        self.tags.append((tag, found))
        name = found.get("class") or ""
        self.texts.setdefault(name, []).append("")
        if tag not in VOID:
            self.open.append((tag, name))

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop()[0] == tag

    def handle_data(self, data):
        for _, name in self.open:
            self.texts[name][-1] += data

    def named(self, *names):
        return [attributes for tag, attributes in self.tags if tag in names]


def test_the_page_parses_and_needs_nothing_from_elsewhere():
    text = render([two_rows(rows=ROWS, model="m", runs=[RUN]), two_rows()])
    page = Page(text)
    for tag, attributes in page.tags:
        for name in ("src", "href", "action", "data", "srcset"):
            assert (attributes.get(name) or "#").startswith("#"), (tag, attributes)
    assert all(word not in text for word in ("http:", "https:", "url(", "@import"))
    assert len(page.named("script")) == 1 and len(page.named("style")) == 1


def test_text_is_exactly_the_output_row_by_row():
    page = Page(render([two_rows(rows=ROWS)]))
    assert page.texts["output"] == ["".join(row["output"]) for row in ROWS]
    assert page.texts["prompt"] == ["def f", "x"]


def test_markup_in_any_text_is_escaped():
    rows = [{"prompt": [EVIL], "output": [EVIL] * 6}, {"prompt": [EVIL], "output": [EVIL] * 3}]
    run = RUN | {"label": EVIL}
    trace = two_rows(rows=rows, model=EVIL, method=EVIL, runs=[run], vocabulary={"5": EVIL})
    text = render([trace])
    page = Page(text)
    assert "<script>alert" not in text and "&lt;script&gt;alert(1)" in text
    assert len(page.named("script")) == 1 and page.named("b") == [{}, {}]
    assert page.texts["output"][0] == EVIL * 6


def test_tokens_say_what_they_cost():
    page = Page(render([two_rows(rows=ROWS)]))
    tokens = [(tag["class"], tag.get("title")) for tag in page.named("span") if (tag.get("class") or "")[:2] == "t "]
    tokens = [(kind, title) for kind, title in tokens if title]
    assert [kind.split()[1] for kind, _ in tokens[:6]] == ["model", "ngram", "corrected", "plain", "model", "plain"]
    assert tokens[1][1] == ("step 1, token 2 of 3: accepted guess from earlier text (n-gram); 2 of 4 guesses accepted")
    assert tokens[3][1].endswith("with no guess in its place; nothing was guessed")
    assert tokens[7][1].endswith("2 of 2 guesses accepted; drafted through layer 2")


def test_figures_have_units_and_the_baseline_is_named():
    base = RUN | {"name": "full", "label": "full", "speedup": 1.0, "flops": 5_000_000_000, "tokens_per_second": 3.0}
    page = Page(render([two_rows(runs=[base, RUN, {"name": "bare"}])]))
    text = " ".join(" ".join(page.texts["bars"]).split())
    assert "full 3.0 toy [bold] 4.5 (1.50×)" in text
    assert "full 5.00 GFLOP toy [bold] 2.50 GFLOP (0.50×)" in text
    assert "× is relative to full" in " ".join(page.texts["soft"])


def test_a_comparison_is_shown_once_however_many_traces_carry_it():
    assert render([two_rows(runs=[RUN]), two_rows(runs=[RUN])]).count("Side by side") == 1
    assert render([two_rows(runs=[RUN]), two_rows(runs=[RUN | {"tokens": 7}])]).count("<h2>Side by side") == 2
    assert "Side by side" not in render([two_rows()])


def test_traces_without_anything_or_of_other_decisions():
    keep = Trace({"rows": [{"output": ["as it is"]}]})
    keep.record("layer 3", Keep(torch.tensor([[True]]), torch.tensor([[True]])))
    text = render([Trace(), keep])
    assert Page(text).texts["output"] == ["as it is"]
    assert "keep at layer 3 (1×)" in text


def test_a_long_run_has_a_bounded_number_of_bars_and_drawings():
    trace = Trace()
    for _ in range(1000):
        trace.record("decode.step", commit(guess([1, 2], path=[0], committed=[1, 3])), exit=1, length=2)
    page = Page(render([trace]))
    assert len([tag for tag in page.named("rect") if tag.get("class") == "whole"]) <= MOST_BARS
    assert len(page.named("details")) <= 3


def test_write_makes_the_directory(tmp_path):
    path = tmp_path / "new" / "deep" / "report.html"
    write([two_rows(rows=ROWS)], path)
    assert path.read_text(encoding="utf-8") == render([two_rows(rows=ROWS)])


def test_nothing_to_draw_is_an_error_that_writes_nothing(tmp_path):
    with pytest.raises(ValueError, match="no trace to draw; give at least one"):
        write([], tmp_path / "new" / "report.html")
    assert list(tmp_path.iterdir()) == []


@settings(derandomize=True, max_examples=40, deadline=None)
@given(traces())
def test_any_text_comes_back_out_of_the_page(trace):
    page = Page(render([trace]))
    if rows := trace.about.get("rows"):
        assert page.texts["output"] == [printable("".join(row["output"])) for row in rows]


def test_a_canvas_is_drawn_with_its_text_in_the_colours_of_its_steps():
    page = Page(render([two_canvases(rows=CANVAS_ROWS, model="m")]))
    assert page.texts["output"] == ["".join(row["output"]) for row in CANVAS_ROWS]
    tokens = [tag for tag in page.named("span") if tag.get("class") in ("t filled", "t filled end") and "style" in tag]
    assert [tag["style"] for tag in tokens] == [f"--t:{t}%" for t in (0, 100, 50, 100, 100, 0, 0)]
    assert tokens[0]["title"] == "position 0, a: committed at step 1 of 3, computed 1× after it"
    assert len([tag for tag in page.named("rect") if tag.get("class") == "mark"]) == 7
    assert "A diffusion model fills a canvas" in page.texts["lead"][0]
    assert "A decoder guesses tokens" not in page.texts["lead"][0]


def test_insertions_are_drawn_with_what_was_given():
    page = Page(render([two_insertions(rows=INSERTED_ROWS)]))
    assert page.texts["output"] == ["".join(row["output"]) for row in INSERTED_ROWS]
    tokens = [tag for tag in page.named("span") if (tag.get("class") or "").startswith("t ")]
    assert [tag["class"] for tag in tokens] == ["t prompt", *["t filled"] * 2, "t filled end", "t prompt", "t filled"]
    assert tokens[0]["title"] == "position 0, a: given"
    assert tokens[2]["title"] == "position 2, ␣<y: inserted at step 1 of 4, computed 3× after it"
    assert len([tag for tag in page.named("rect") if tag.get("class") == "mark"]) == 4
    assert "An insertion model starts from what is given" in page.texts["lead"][0]
    assert "A diffusion model" not in page.texts["lead"][0] and "committed" not in "".join(page.texts["legend keys"])


def test_a_report_of_both_kinds_explains_both():
    text = render([two_rows(rows=ROWS), two_canvases(rows=CANVAS_ROWS)])
    assert "A decoder guesses tokens" in text and "A diffusion model fills a canvas" in text


def test_a_long_canvas_is_binned_and_many_rows_are_folded():
    long = canvas([200] * 5, [[1 + (i * 7) % 500 for i in range(1000)]] * 5)
    page = Page(render([long]))
    assert len([tag for tag in page.named("rect") if tag.get("class") == "whole"]) <= 5 * MOST_LINES
    assert len([tag for tag in page.named("rect") if tag.get("class") == "mark"]) <= 5 * 1000
    assert len(page.named("details")) == 5 - OPEN_ROWS


@settings(derandomize=True, max_examples=30, deadline=None)
@given(canvases())
def test_any_canvas_makes_a_page_with_its_text(made):
    trace = made[0]
    page = Page(render([trace]))
    if rows := trace.about.get("rows"):
        assert page.texts["output"] == [printable("".join(row["output"])) for row in rows]
