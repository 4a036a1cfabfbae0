"""Labels and training of the Stop & Exit controller."""

import torch

from pertoken.depth.controller import EXIT, GO_ON, STOP
from pertoken.zoo.stopping import Stopping, labels
from tests.contract.conftest import FAMILIES


def test_labels_follow_the_first_right_head():
    right = torch.tensor(
        [[0, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 1, 0, 0, 1], [0, 1, 1, 1, 0]], dtype=torch.bool
    )  # three layers and the model, five tokens
    wanted = [
        [STOP, EXIT, GO_ON, GO_ON, GO_ON],
        [STOP, EXIT, EXIT, GO_ON, GO_ON],
        [STOP, EXIT, EXIT, GO_ON, EXIT],
    ]
    assert labels(right, (1, 2, 3)).tolist() == wanted


def test_classifier_learns_what_states_tell(tmp_path):
    torch.manual_seed(0)
    model = FAMILIES["llama"](4).eval().requires_grad_(False)
    ids = torch.randint(2, 61, (4, 24))
    for heads, steps in ((False, 0), (True, 20)):
        task = Stopping(layers=(1, 2, 3), own_heads=heads, head_steps=steps).task(model, None)
        optimizer, losses = torch.optim.Adam(task.module.parameters(), lr=1e-2), []
        for step in range(60 + steps):
            loss = task.loss(ids, step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < 0.9 * losses[steps]
        assert steps == 0 or losses[steps - 1] < 0.9 * losses[0]
        task.save(tmp_path, {})
