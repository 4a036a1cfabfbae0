"""Stop & Exit: after a layer, a token leaves with what it has, or stops a completion that is going to be wrong.

Source: Sun et al., "When Neural Code Completion Models Size up the Situation: Attaining Cheaper and Faster Completion
through Dynamic Model Inference", arXiv 2401.09964 (SEC); the algorithm as the released code has it, re-implemented.

One linear classifier C `[3, width]`, shared by all layers, reads the un-normed hidden state h of the newest token after
each layer that it is asked after:

    p = softmax(C h)        0 stop, 1 exit, 2 go on
    stop if argmax p = 0 and p[0] > stop;   exit if argmax p = 1 and p[1] > exit;   else the next layer

A token that leaves after l layers is read by a head W_l of its own (`Controller.heads`, the paper's) or by the model's
norm and head: the latter adds no parameters, where W_l adds width * vocabulary for every layer (3.4 times the backbone
for GPT-2), and is all that is needed on models trained with early-exit losses. The prompt, and with it the first new
token, runs all layers. A token that stops ends the text.

Keys: a layer holds, for a token that left before it, keys and values of the state that it left with ("carried").

Training (`pertoken zoo train code-stop`): labels by teacher forcing. With f the first layer count whose head has the
true next token, or none: at l layers stop if none, exit if f <= l, else go on. Cross-entropy weighed with l.

Differs from the release: any batch, each row for itself; sampling; each token of a block, so that it can draft and be
verified; a token that stops still writes its keys. It loses where the head costs more than the layers that are saved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pertoken.core.card import Dial, Paper, method
from pertoken.core.errors import BadRequest
from pertoken.depth.controller import EXIT, STOP, Controller
from pertoken.depth.exits import ExitPolicy, ExitView


@method(
    question="depth",
    shape="policy",
    exactness="approximate",
    paper=Paper(
        "When Neural Code Completion Models Size up the Situation: Attaining Cheaper and Faster Completion through "
        "Dynamic Model Inference",
        "2401.09964",
    ),
    reads={"states"},
    writes={"layers"},
    baselines=("full", "fixed_exit", "random_exit"),
    dial=Dial("exit", (0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99), {"stop": None}),
)
@dataclass(frozen=True)
class StopExit(ExitPolicy):
    """A trained classifier lets tokens leave early and stops completions that will be wrong.

    controller: a `Controller`, or the directory or zoo:NAME of one; without one only the budget acts, the most layers
    that a token runs. exit, stop: probabilities above which the classifier is followed, None: never.
    """

    controller: Controller | str | None = None
    exit: float | None = 0.9
    stop: float | None = 0.7

    def __post_init__(self) -> None:
        for name, value in (("exit", self.exit), ("stop", self.stop)):
            if value is not None and not 0 <= value <= 1:
                raise BadRequest(f"{name}={value} is a probability in [0, 1], or None for never")
        if isinstance(self.controller, str):
            object.__setattr__(self, "controller", Controller.load(self.controller))

    @property
    def classifier(self) -> Controller | None:
        """The controller, once it is loaded."""
        assert not isinstance(self.controller, str)
        return self.controller

    @property
    def stops(self) -> bool:
        return self.stop is not None and self.controller is not None

    def check(self, model: Any) -> None:
        if self.classifier is not None:
            self.classifier.check(model)
            self.classifier.to(next(model.parameters()).device)

    def heads(self) -> dict[int, nn.Module]:
        found = {} if self.classifier is None else dict(self.classifier.heads.items())
        return {int(ran): head for ran, head in found.items()}

    def asks(self, ran: int, layers: int) -> bool:
        return self.classifier is not None and ran in self.classifier.layers

    def after(self, view: ExitView) -> Tensor:
        assert self.classifier is not None and view.states is not None and view.left is not None
        chance, choice = self.classifier(view.states).float().softmax(-1).max(-1)
        found = torch.zeros_like(view.left)
        if self.exit is not None:
            found = found.masked_fill((choice == EXIT) & (chance > self.exit), 1)
        if self.stop is not None:
            found = found.masked_fill((choice == STOP) & (chance > self.stop), -1)
        return found
