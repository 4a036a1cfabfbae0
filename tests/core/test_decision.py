import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pertoken.core.decision import KINDS, Assign, Commit, Decision, Depth, Keep, Select, Weight
from tests.core.strategies import decisions

COUNTED = list(KINDS.values())


def poisoned(decision: Decision) -> Decision:
    """The decision with everything on padding turned round."""
    changed = {}
    for name, tensor in decision.tensors().items():
        if name in ("valid", "committed", "count"):
            continue
        other = ~tensor if tensor.dtype == torch.bool else tensor + 3
        mask = decision.valid.view(*decision.valid.shape, *[1] * (tensor.ndim - 2))
        changed[name] = torch.where(mask, tensor, other)
    return dataclasses.replace(decision, **changed)


@pytest.mark.parametrize("kind", [kind for kind in COUNTED if kind is not Select])  # its keys lie on no token axis
@given(data=st.data())
def test_spent_ignores_padding(kind, data):
    decision = data.draw(decisions(kind))
    torch.testing.assert_close(decision.spent(), poisoned(decision).spent())


@pytest.mark.parametrize("kind", COUNTED)
@given(data=st.data())
def test_spent_has_one_number_per_row_and_rows_commute_with_it(kind, data):
    decision = data.draw(decisions(kind))
    batch = len(decision.valid)
    assert decision.spent().shape == (batch,)
    order = torch.tensor(data.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=6)))
    picked = decision.rows(order)
    assert type(picked) is type(decision)
    assert all(torch.equal(tensor, decision.tensors()[name][order]) for name, tensor in picked.tensors().items())
    torch.testing.assert_close(picked.spent(), decision.spent()[order])


def test_what_each_kind_spends():
    valid = torch.tensor([[True, True, True, False]])
    assert Keep(valid, torch.tensor([[True, False, True, True]])).spent().tolist() == [2]
    assert Assign(valid, torch.tensor([[4, 4, -1, 7]])).spent().tolist() == [1]
    assert Depth(valid, torch.ones(1, 4, 3, dtype=torch.bool)).spent().tolist() == [9]
    assert Weight(valid, torch.tensor([[0.5, 0.25, 0.0, float("nan")]])).spent().tolist() == [0.75]
    index = torch.tensor([[[[0, -1], [0, 1]]]])  # two runs of two queries: the second has one real query
    assert Select(valid, index, torch.tensor([2])).spent().tolist() == [2 * 1 + 1 * 2]


def test_decisions_are_frozen():
    decision = Keep(torch.ones(1, 2, dtype=torch.bool), torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(dataclasses.FrozenInstanceError):
        decision.keep = decision.valid


def test_every_kind_is_listed_under_its_name():
    assert {kind.kind for kind in KINDS.values()} == set(KINDS)
    assert set(KINDS) == {"keep", "assign", "depth", "exit", "weight", "select", "commit"}


@pytest.mark.parametrize("valid", [torch.ones(1, 3), torch.ones(3, dtype=torch.bool)])
def test_valid_must_be_bool_over_batch_and_token(valid):
    with pytest.raises(ValueError, match="valid must be a bool tensor"):
        Keep(valid, torch.ones(1, 3, dtype=torch.bool))


TRUE = torch.ones(2, 3, dtype=torch.bool)
BAD = {
    "keep of another length": lambda: Keep(TRUE, torch.ones(2, 4, dtype=torch.bool)),
    "keep that is not bool": lambda: Keep(TRUE, torch.ones(2, 3)),
    "group that is float": lambda: Assign(TRUE, torch.ones(2, 3)),
    "weight that is whole": lambda: Weight(TRUE, torch.ones(2, 3, dtype=torch.long)),
    "layers without a layer axis": lambda: Depth(TRUE, TRUE),
    "layers that are not bool": lambda: Depth(TRUE, torch.ones(2, 3, 4)),
    "small of another shape": lambda: Depth(TRUE, TRUE[..., None], TRUE),
    "another batch": lambda: Keep(torch.ones(3, 3, dtype=torch.bool), TRUE),
}


@pytest.mark.parametrize("make", BAD.values(), ids=BAD.keys())
def test_malformed_decisions_are_refused(make):
    with pytest.raises(ValueError, match=r"keep|assign|weight|depth|select"):
        make()


WHOLE = torch.zeros(2, 1, 1, 4, dtype=torch.long)


@pytest.mark.parametrize(
    ("index", "length"),
    [
        (WHOLE.int(), WHOLE[:, 0, 0, 0]),
        (WHOLE[0], WHOLE[:, 0, 0, 0]),
        (WHOLE, torch.ones(2)),
        (WHOLE[:1], WHOLE[0, 0, 0]),
    ],
    ids=["not int64", "no group axis", "length that is float", "another batch"],
)
def test_malformed_select_is_refused(index, length):
    with pytest.raises(ValueError, match="select"):
        Select(TRUE, index, length)


def commit(**changed: torch.Tensor) -> Commit:
    fields = {
        "tokens": torch.zeros(2, 3, dtype=torch.long),
        "parents": torch.full((2, 3), -1),
        "value": torch.zeros(2, 3),
        "source": torch.zeros(2, 3, dtype=torch.long),
        "accepted": torch.zeros(2, 3, dtype=torch.bool),
        "committed": torch.zeros(2, 4, dtype=torch.long),
        "count": torch.ones(2, dtype=torch.long),
    }
    return Commit(TRUE, **(fields | changed))


def test_a_commit_spends_its_nodes():
    assert commit().spent().tolist() == [3, 3]


@pytest.mark.parametrize(
    "name, tensor",
    [("tokens", torch.zeros(2, 5, dtype=torch.long)), ("accepted", torch.zeros(2, 3)), ("value", torch.zeros(1, 3))],
)
def test_malformed_commits_are_refused(name, tensor):
    with pytest.raises(ValueError, match=f"commit.{name}"):
        commit(**{name: tensor})
