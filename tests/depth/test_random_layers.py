"""Random layers, of all tokens or of those generated."""

import torch

from pertoken.core.attach import attach
from pertoken.core.budget import Budget
from pertoken.core.policy import View
from pertoken.core.trace import Trace
from pertoken.depth.random_layers import RandomLayers
from tests.contract.conftest import FAMILIES


def test_a_prompt_can_be_spared():
    valid = torch.tensor([[True, True, True], [False, True, True]])
    places = torch.tensor([[0, 1, 2], [0, 0, 1]])
    view = View(valid=valid, layers=5, positions=places, prompt=torch.tensor([2, 1]))
    policy = RandomLayers(Budget(layers=2), seed=3)
    chosen = policy.decide(view).layers[0, 0]
    spared = RandomLayers(Budget(layers=2), seed=3, prompt=False).decide(view).layers
    for row in range(2):
        for token in range(3):
            given = bool(places[row, token] < view.prompt[row])
            assert torch.equal(spared[row, token], torch.ones(5, dtype=torch.bool) if given else chosen)
    assert int(chosen.sum()) == 2 and bool(chosen[0])


def test_generation_runs_fewer_layers_behind_a_whole_prompt():
    torch.manual_seed(0)
    model, trace = FAMILIES["llama"](4).eval(), Trace()
    ids = torch.randint(2, 61, (2, 6))
    with attach(model, RandomLayers(Budget(layers=2), prompt=False), trace=trace):
        model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    spent = [step.decision.spent().tolist() for step in trace.steps]
    assert spent == [[24, 24], [2, 2], [2, 2], [2, 2]]
