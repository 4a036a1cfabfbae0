import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pertoken.bench import claims
from pertoken.bench.claims import Bench, Claim, Expected, Measurement, claims_of, jsonable

KEYS = ["method", "claim", "metric", "value", "baseline", "baseline_value", "ratio", "expected", "holds", "seed", "n"]


def record(value, baseline_value=2.0, expected="> 1", compare="ratio", **detail):
    one = Claim("toy", "it is fast", "tokens/s", expected, compare, lambda bench: None)
    return one.record(Measurement(value, "full", baseline_value, 7, detail), seed=3)


def test_a_record_has_the_documented_keys_in_order():
    found = record(3.0)
    assert list(found) == KEYS
    assert (found["ratio"], found["holds"], found["seed"], found["n"]) == (1.5, True, 3, 7)
    assert list(record(3.0, note="x")) == [*KEYS, "detail"]


@pytest.mark.parametrize(
    "expected, inside, outside",
    [("> 1", 1.01, 1), (">= 0.95", 0.95, 0.94), ("== 1", 1, 1.001), ("<= 1.02", 1.02, 1.03), ("< -2e-1", -0.3, -0.2)],
)
def test_bounds(expected, inside, outside):
    assert Expected.parse(expected).holds(inside)
    assert not Expected.parse(expected).holds(outside)
    assert not Expected.parse(expected).holds(math.nan)


@pytest.mark.parametrize("text", ["1.5", "about 2", ">", "=> 1", "> 1 or so", "", "> 1.2.3"])
def test_malformed_bounds_are_refused(text):
    with pytest.raises(ValueError, match="expected"):
        Expected.parse(text)


@given(st.floats(0.01, 100), st.floats(0.01, 100), st.floats(0, 10))
def test_ratio_and_value_are_compared_as_declared(value, baseline, bound):
    assert record(value, baseline, f">= {bound!r}")["holds"] == (value / baseline >= bound)
    assert record(value, baseline, f">= {bound!r}", "value")["holds"] == (value >= bound)


@pytest.mark.parametrize("value, baseline", [(math.nan, 1.0), (1.0, math.nan), (1.0, 0.0), (math.inf, math.inf)])
def test_a_ratio_that_is_no_number_does_not_hold(value, baseline):
    found = record(value, baseline, ">= 0")
    assert found["holds"] is False
    assert found["ratio"] is None
    json.dumps(found, allow_nan=False)


def test_a_value_that_is_no_number_does_not_hold():
    found = record(math.nan, expected="<= 5", compare="value")
    assert (found["value"], found["holds"]) == (None, False)


def test_details_become_json():
    odd = {"a": np.float32(0.5), "b": torch.tensor([1, 2]), 3: {math.inf}, "d": (None, True), "e": object}
    found = jsonable(odd)
    assert (found["a"], found["b"], found["3"], found["d"]) == (0.5, [1, 2], [None], [None, True])
    json.dumps(found, allow_nan=False)


def test_numbers_of_other_libraries_become_json():
    found = record(torch.tensor(3.0), np.float64(2))
    assert json.loads(json.dumps(found))["value"] == 3.0


def test_claims_keep_their_order_and_are_said_once(toy):
    @toy("second in the alphabet")
    def b(bench): ...

    @toy("first in the alphabet")
    def a(bench): ...

    assert [one.measure for one in claims_of("toy")] == [b, a]
    with pytest.raises(ValueError, match="already claims"):

        @toy("first in the alphabet")
        def c(bench): ...


def test_one_function_with_other_values_claims_other_things(toy):
    def measure(bench, size): ...

    toy("small")(partial(measure, size=1))
    toy("large")(partial(measure, size=2))
    toy("small")(partial(measure, size=1))  # as when its module is loaded again
    assert [one.claim for one in claims_of("toy")] == ["small", "large"]
    with pytest.raises(ValueError, match="already claims 'small'"):
        toy("small")(partial(measure, size=2))


def test_malformed_claims_are_refused(toy):
    with pytest.raises(ValueError, match="expected"):
        toy("x", expected="fast")
    with pytest.raises(ValueError, match="compare"):
        toy("x", compare="difference")


def test_claims_of_an_unknown_method_suggest_the_nearest(toy):
    with pytest.raises(ValueError, match="did you mean toy"):
        claims_of("toi")


def test_a_bench_of_many_methods_needs_no_card(toy, monkeypatch):
    monkeypatch.setitem(claims.BENCHES, "many", "spending")
    claims.claim("many", claim="all", metric="x", expected="> 1")(lambda bench: None)
    assert [one.claim for one in claims_of("many")] == ["all"]


def test_a_framework_module_is_no_claim_module(toy, monkeypatch):
    from pertoken.core import card

    card.method(question="decode", shape="decoder", exactness="lossless", paper=card.Paper("x"), name="docs")(
        type("D", (), {})
    )
    assert claims_of("docs") == []


def test_shared_things_are_made_once():
    made = []
    bench = Bench()
    for _ in range(2):
        assert bench.shared("model", lambda: made.append(1) or "model") == "model"
    assert made == [1]


def test_a_factory_that_fails_is_asked_again():
    bench = Bench()
    with pytest.raises(ZeroDivisionError):
        bench.shared("model", lambda: 1 / 0)
    assert bench.shared("model", lambda: 2) == 2
