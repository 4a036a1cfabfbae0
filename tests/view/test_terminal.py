import torch
from hypothesis import given, settings
from rich.console import Console

from pertoken.core.decision import Keep
from pertoken.core.trace import Trace
from pertoken.view.runs import cells
from pertoken.view.terminal import CHART_LINES, runs_table, steps_chart, text_view
from tests.view.traces import (
    CANVAS_ROWS,
    INSERTED_ROWS,
    ROWS,
    RUN,
    canvas,
    canvases,
    commit,
    guess,
    two_canvases,
    two_insertions,
    two_rows,
)


def shown(renderable, width=120, **console) -> str:
    printer = Console(width=width, **console)
    with printer.capture() as captured:
        printer.print(renderable)
    return captured.get()


def with_text(*output: str, prompt: str = "") -> Trace:
    trace = Trace({"rows": [{"prompt": [prompt], "output": list(output)}]})
    for token in range(len(output)):
        trace.record("decode.step", commit(guess(committed=[token])))
    return trace


def test_markup_in_text_is_shown_literally():
    assert "[bold]x[/bold] [/] :smile:" in shown(text_view(with_text("[bold]x", "[/bold]", " [/] :smile:")))


def test_prompt_and_output_of_all_rows_are_there():
    text = shown(text_view(two_rows(rows=ROWS, model="m")))
    assert "toy on m  9 tokens in 3 model steps, 5 of 9 guesses accepted" in text
    assert "row 0\ndef f<6>\n<7>\n<9>\n" in text and "row 1\nx<3>\n<1>\n<2>" in text


def test_kinds_have_a_legend_and_more_than_colour():
    text = shown(text_view(two_rows()), force_terminal=True, no_color=True, legacy_windows=False)
    legend = {line.split("m")[0] for line in text.splitlines() if "ab" in line}
    assert len(legend) == 5
    assert "   1   11%  accepted guess from earlier text" in shown(text_view(two_rows()))


def test_a_long_prompt_is_cut_at_its_start():
    text = shown(text_view(with_text("out", prompt="start\n" + "line\n" * 50 + "end")))
    assert "start" not in text and "endout" in text
    assert f"… {len('start') + 1 + 43 * 5} characters before" in text


def test_escape_sequences_do_not_reach_the_terminal():
    assert "\x1b" not in shown(text_view(with_text("\x1b[2J", prompt="\x1b]0;title\x07")))


def test_traces_without_anything():
    assert "no text and no decoding steps" in shown(text_view(Trace()))
    assert "no decisions" in shown(steps_chart(Trace()))


def test_other_decisions_are_counted():
    trace = Trace()
    for _ in range(2):
        trace.record("layer [3]", Keep(torch.tensor([[True, True]]), torch.tensor([[True, False]])))
    assert "layer [3] keep 2 2" in " ".join(shown(steps_chart(trace)).split())


def test_steps_chart_has_a_line_per_step():
    lines = shown(steps_chart(two_rows())).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["1", "██░░░░", "2", "of", "6", "4"],
        ["2", "██", "2", "of", "2", "3", "2"],
        ["3", "█", "1", "of", "1", "2"],
    ]


def test_many_steps_fit_the_chart():
    trace = Trace()
    for _ in range(500):
        trace.record("decode.step", commit(guess(range(90), path=[0], committed=[0, 1])))
    lines = shown(steps_chart(trace)).splitlines()
    assert len(lines) <= CHART_LINES + 1 and max(map(len, lines)) < 100
    assert lines[1].split()[0] == "1–16"


def test_no_guesses_need_no_chart():
    assert "No guesses were made in 2 steps" in shown(steps_chart(with_text("a", "b")))


def test_runs_table():
    runs = [RUN, {"name": "bare"}, RUN | {"label": "off", "identical": False}]
    lines = [line.split() for line in shown(runs_table(runs)).splitlines()]
    assert ["toy", "[bold]", "4.5", "1.50×", "3", "3.00", "2.50", "7", "yes"] in lines
    assert ["bare", *"-------"] in lines
    assert ["off", "4.5", "1.50×", "3", "3.00", "2.50", "7", "no"] in lines


def test_runs_table_fits_eighty_columns():
    text = shown(runs_table([RUN | {"label": "transformers generate", "tokens_per_second": 1234.5}]), width=80)
    assert "transformers generate 1,234.5 " in text and "identical" in text


def test_a_run_that_differs_says_how_much():
    assert cells(RUN | {"identical": False, "agreement": 0.934}).values[-1] == "no, 93 %"
    assert cells(RUN | {"identical": True, "agreement": 1.0}).values[-1] == "yes"


def test_a_canvas_is_drawn_with_its_text():
    trace = two_canvases(rows=CANVAS_ROWS, model="m")
    text = shown(text_view(trace))
    assert "7 positions in 3 model steps" in text and "a <b" in text and "row 1" in text
    lines = shown(steps_chart(trace)).splitlines()
    assert [line.rstrip() for line in lines[1:4]] == ["1 ░│█░░░", "2  │ ░█░", "3  │▒█ █"]


def test_insertions_are_drawn_in_the_finished_text():
    trace = two_insertions(rows=INSERTED_ROWS)
    text = shown(text_view(trace))
    assert "4 tokens inserted in 4 model steps" in text and "a x <y\nb" in text and "inserted first" in text
    lines = shown(steps_chart(trace)).splitlines()
    assert lines[0].rstrip() == "row 0, 5 tokens of the finished text from left to right, 2 of them given"
    assert [line.rstrip() for line in lines[1:5]] == ["1 ░ █ ░", "2 ░█▒ ░", "3 ░▒▒█░", "4 ░▒▒▒░"]
    assert "█ inserted" in lines[-1] and "committed" not in lines[-1]


def test_a_long_canvas_fits_the_terminal():
    trace = canvas([300] * 6, [[1 + (i * 7) % 500 for i in range(1000)]] * 6)
    lines = shown(steps_chart(trace), width=80).splitlines()
    assert max(map(len, lines)) <= 80 and len(lines) < 130 and "and 2 more rows" in lines


@settings(derandomize=True, max_examples=30, deadline=None)
@given(canvases())
def test_any_canvas_is_shown(made):
    assert shown(text_view(made[0])) and shown(steps_chart(made[0]))
