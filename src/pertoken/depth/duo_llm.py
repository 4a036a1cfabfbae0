"""Duo-LLM: a router in every layer gives each token the big feed-forward block, a small one, or none.

Source: Alizadeh et al., "Duo-LLM: A Framework for Studying Adaptive Computation in Large Language Models", arXiv
2410.10846; there is no official code, and what the paper leaves open is marked below.

With h `[width]` what the feed-forward block of layer l reads, W_l `[option, width]` and FFN_x for x in {big, small} or
{big, small, skip}, FFN_skip = 0:

    g = W_l h        inference: FFN_x(h) with x = argmax g        training: sum_x softmax(tau g)_x FFN_x(h)
    loss = cross-entropy + alpha * (mean over tokens and layers of P_big - budget)^2

Attention runs for every token: every layer has all keys and values. A small block is a sixteenth of a big one. Training
(`pertoken zoo train code-duo`): first both blocks of every layer, each token and layer drawing one of the options at
random; then the routers alone, tau rising from 1 to 10 (the paper divides by tau, and raises it to harden choices).

Differs from the paper. The big blocks come from a trained model, and learn a low-rank change together with the small
ones. "big" is chosen where its logit is ahead of the others by more than a threshold, which is set so that in training
the share of big ones was the budget's; the paper's argmax is the threshold 0, and needs a router for each budget. The
mean in the loss is over a batch, not over each text, so that texts may differ in their share. Optimiser, alpha and tau
are not printed in the paper.

What a router could reach is searched for in `oracle`. It loses at batch 1, where finding out who goes where takes as
long as a small model's feed-forward block; attention is never saved; and where a model's head can read its middle
layers, first layers of as many operations may predict as well (see its claims).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from pertoken.core.card import Paper, method
from pertoken.core.policy import View
from pertoken.depth.fixed_modules import spread
from pertoken.depth.modules import ModulePolicy, ModuleView


@method(
    question="depth",
    shape="policy",
    exactness="approximate",
    paper=Paper("Duo-LLM: A Framework for Studying Adaptive Computation in Large Language Models", "2410.10846"),
    reads={"states"},
    writes={"layers"},
    baselines=("full", "fixed_modules", "random_modules"),
)
@dataclass(frozen=True)
class DuoLLM(ModulePolicy):
    """Trained routers choose a big or a small feed-forward block for each token and layer.

    budget: big blocks per token in the mean, as layers or a share of the depth. Without modules nothing was learnt:
    evenly spaced layers run their block, the others none.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"states"})

    @property
    def looks(self) -> bool:
        return self.duo is not None

    def choose(self, view: View) -> Tensor:
        if self.duo is None:
            return spread(view, self.budget)
        assert isinstance(view, ModuleView) and view.states is not None
        threshold = self.duo.threshold(self.budget.count(view.layers) / view.layers)
        return self.duo.choose(view.layer, view.states, threshold)[..., None]
