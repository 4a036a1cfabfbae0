"""StepTime interpolates as promised, and measuring happens once. No test looks at how long anything takes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pertoken.models.adapter import adapter_for
from pertoken.models.stack import ModuleStack
from pertoken.models.timing import StepTime, step_time
from tests.contract.conftest import COMMON, FAMILIES

torch.set_num_threads(1)


@st.composite
def times(draw, least=1):
    widths = sorted(draw(st.sets(st.integers(1, 200), min_size=least, max_size=6)))
    rises = draw(st.lists(st.floats(0.0, 1.0), min_size=len(widths), max_size=len(widths)))
    first = draw(st.floats(0.01, 1.0))
    return StepTime(tuple(widths), tuple(first + sum(rises[1 : i + 1]) for i in range(len(widths))))


@settings(derandomize=True)
@given(times())
def test_measured_points_are_given_back(time):
    for width, seconds in zip(time.widths, time.seconds, strict=True):
        assert time(width) == pytest.approx(seconds, rel=1e-9)


@settings(derandomize=True)
@given(times(), st.floats(1, 400), st.floats(1, 400))
def test_more_tokens_never_take_less_time(time, one, other):
    low, high = sorted((one, other))
    assert time(low) <= time(high) * (1 + 1e-12)
    assert time.slope(one) >= 0


@settings(derandomize=True)
@given(times(2), st.data())
def test_between_and_beyond_the_points_it_is_a_straight_line(time, data):
    at = data.draw(st.integers(0, len(time.widths) - 2))
    low, high = time.widths[at], time.widths[at + 1]
    share = data.draw(st.floats(0, 1))
    line = time.seconds[at] * (1 - share) + time.seconds[at + 1] * share
    assert time(low + share * (high - low)) == pytest.approx(line, rel=1e-9, abs=1e-12)
    last = time.widths[-1]
    slope = (time.seconds[-1] - time.seconds[-2]) / (last - time.widths[-2])
    assert time(last + 10) == pytest.approx(time.seconds[-1] + 10 * slope, rel=1e-9)
    assert time.slope(last + 10) == pytest.approx(slope, abs=1e-12)


def test_a_noisy_fall_counts_as_flat():
    assert StepTime((1, 2, 4), (1.0, 0.5, 2.0)).slope(1) == 0.0


class Counting(ModuleStack):
    def __init__(self, model):
        super().__init__(adapter_for(model))
        self.kept, self.forwards = model, []

    def run(self, hidden, *args, **kwargs):
        self.forwards.append(hidden.shape[1])
        return super().run(hidden, *args, **kwargs)


def counting(**changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return Counting(LlamaForCausalLM(LlamaConfig(**(COMMON | changes), num_hidden_layers=2)).eval())


@pytest.mark.parametrize("widest", [1, 2, 5, 16, 17, 33, 64])
def test_measuring_happens_once_per_stack_and_rows(widest):
    stack = counting()
    first = step_time(stack, 2, widest)
    assert stack.forwards and min(first.seconds) > 0
    assert list(first.seconds) == sorted(first.seconds) and list(first.widths) == sorted(set(first.widths))
    measured = len(stack.forwards)
    assert step_time(stack, 2, widest) is first
    assert len(stack.forwards) == measured, f"measured again, {len(stack.forwards) - measured} forwards, for {widest}"
    step_time(stack, 3, widest)
    assert len(stack.forwards) > measured, "another number of rows is another measurement"


def test_measuring_wider_covers_the_width_asked_for():
    stack = counting()
    step_time(stack, 1, 2)
    assert step_time(stack, 1, 60).widths[-1] >= 32


@pytest.mark.parametrize("positions", [2, 3, 40, 64, 100])
def test_a_model_with_few_positions_can_be_measured_once(positions):
    stack = counting(max_position_embeddings=positions)
    first = step_time(stack, 1, 64)
    assert max(first.widths) < positions
    measured = len(stack.forwards)
    step_time(stack, 1, 64)
    assert len(stack.forwards) == measured


def test_learned_positions_are_not_overrun():
    assert step_time(Counting(FAMILIES["gpt2"](1).eval()), 1, 64).widths[-1] == 64
