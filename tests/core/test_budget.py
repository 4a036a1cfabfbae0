import pytest
from hypothesis import given
from hypothesis import strategies as st

from pertoken.core.budget import Budget

totals = st.integers(0, 10_000)
whole = st.integers(0, 20_000)
shares = st.floats(0, 1)
budgets = st.one_of(
    st.just(Budget.full()),
    whole.map(lambda n: Budget(tokens=n)),
    whole.map(lambda n: Budget(layers=n)),
    whole.map(lambda n: Budget(nodes=n)),
    shares.map(lambda f: Budget(fraction=f)),
)


@given(budgets, totals)
def test_count_is_within_what_there_is(budget, total):
    assert 0 <= budget.count(total) <= total


@given(totals)
def test_full_budget_spends_everything(total):
    assert Budget.full().is_full
    assert Budget.full().count(total) == total
    assert Budget(fraction=1).count(total) == total
    assert Budget(fraction=0).count(total) == 0


@given(st.sampled_from(["tokens", "layers", "nodes"]), whole, whole, totals)
def test_nested_whole_budgets_nest(unit, one, other, total):
    small, large = sorted((one, other))
    assert Budget(**{unit: small}).count(total) <= Budget(**{unit: large}).count(total)


@given(shares, shares, totals)
def test_nested_fractions_nest(one, other, total):
    small, large = sorted((one, other))
    assert Budget(fraction=small).count(total) <= Budget(fraction=large).count(total)


@given(budgets, totals, totals)
def test_more_to_spend_on_never_spends_less(budget, one, other):
    small, large = sorted((one, other))
    assert budget.count(small) <= budget.count(large)


@given(st.floats(0, 1, exclude_min=True), st.integers(1, 10_000))
def test_any_share_spends_something(share, total):
    assert Budget(fraction=share).count(total) >= 1


@pytest.mark.parametrize("fraction, total, expected", [(0.1, 30, 3), (0.7, 10, 7), (0.57, 100, 57), (0.07, 100, 7)])
def test_a_share_that_is_a_whole_number_is_not_rounded_up(fraction, total, expected):
    assert Budget(fraction=fraction).count(total) == expected


@pytest.mark.parametrize("unit, value", [("fraction", -0.1), ("fraction", 1.5), ("fraction", float("nan"))])
def test_fraction_outside_its_range_is_refused(unit, value):
    with pytest.raises(ValueError, match="outside"):
        Budget(**{unit: value})


@pytest.mark.parametrize("unit", ["tokens", "layers", "nodes"])
@pytest.mark.parametrize("value", [-1, 2.5, True, "8"])
def test_counts_must_be_whole_and_not_negative(unit, value):
    with pytest.raises(ValueError, match=unit):
        Budget(**{unit: value})


def test_two_units_are_refused():
    with pytest.raises(ValueError, match="one unit, got tokens, layers"):
        Budget(tokens=1, layers=1)


def test_a_budget_prints_its_unit():
    assert str(Budget.full()) == "full"
    assert str(Budget(nodes=16)) == "nodes=16"
    assert str(Budget(fraction=0.5)) == "fraction=0.5"
