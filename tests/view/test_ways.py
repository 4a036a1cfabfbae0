"""Ways through a grid: stages that tokens took, and the finest token at each place."""

from __future__ import annotations

import torch

from pertoken.core.decision import Depth
from pertoken.core.trace import Trace
from pertoken.view.ways import finest, stages


def step(trace, row, column, taken, valid=None):
    taken = torch.tensor([taken], dtype=torch.bool)
    valid = torch.ones_like(taken) if valid is None else torch.tensor([valid], dtype=torch.bool)
    trace.record(f"depth.routes.{row}.{column}", Depth(valid, torch.stack([taken, torch.ones_like(taken)], -1)))


def test_stages_are_summed_over_columns_for_tokens_that_are_there():
    trace = Trace()
    step(trace, 0, 0, [1, 1, 0, 0])
    step(trace, 0, 1, [1, 0, 1, 0], [1, 1, 0, 1])
    step(trace, 1, 1, [1])
    fine, coarse = stages(trace)
    assert fine.tolist() == [[2, 1, 0, 0]] and coarse.tolist() == [[1]]


def test_the_finest_token_that_takes_a_stage_is_at_a_place():
    fine = torch.zeros(2, 12, dtype=torch.long)
    fine[0, 5] = 3
    coarse = torch.tensor([[0, 1], [2, 0]])
    place = finest([fine, coarse], [(3, 4), (1, 2)])
    assert place[0].tolist() == [[-1, -1, 13, 13], [-1, 5, 13, 13], [-1, -1, 13, 13]]
    assert place[1].tolist() == [[12, 12, -1, -1]] * 3
