"""Small blocks and routers learn; the model's own weights stay."""

import pytest
import torch

from pertoken.core.attach import attach
from pertoken.core.budget import Budget
from pertoken.core.fingerprint import fingerprint
from pertoken.core.trace import Trace
from pertoken.depth.duo import Duo
from pertoken.depth.duo_llm import DuoLLM
from pertoken.zoo.duo import Routing
from tests.contract.conftest import FAMILIES


@pytest.mark.parametrize(("family", "options"), [("llama", ("big", "small")), ("gpt2", ("big", "small", "skip"))])
def test_blocks_learn_and_then_routers_that_keep_the_budget(family, options, tmp_path):
    torch.manual_seed(0)
    model = FAMILIES[family](4).eval().requires_grad_(False)
    before, ids = fingerprint(model, deep=True), torch.randint(2, 61, (4, 24))
    task = Routing(steps=80, first=40, inner=8, rank=2, options=options).task(model, None)
    optimizer, losses = torch.optim.Adam(task.module.parameters(), lr=2e-2), []
    kept = {}
    for step in range(80):
        loss = task.loss(ids, step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if step in (0, 40):
            kept[step] = {name for name, weight in task.module.named_parameters() if weight.grad is not None}
        optimizer.step()
        losses.append(float(loss.detach()))
    assert kept[40] == {"routers"} and kept[0] == dict(task.module.named_parameters()).keys() - {"routers"}
    assert sum(losses[30:40]) < 0.9 * sum(losses[:10]) and losses[-1] < losses[40]
    assert fingerprint(model, deep=True) == before
    task.save(tmp_path, {"steps": 80})
    trace, duo = Trace(), Duo.load(tmp_path)
    with attach(model, DuoLLM(Budget(fraction=0.5), modules=duo), trace=trace), torch.no_grad():
        model(ids)
    share = sum(int(step.decision.spent().sum()) for step in trace.steps) / (4 * ids.numel())
    assert share == pytest.approx(0.5, abs=0.15) and duo.about["recipe"] == {"steps": 80}
