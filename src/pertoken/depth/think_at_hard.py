"""Think-at-Hard: tokens that a small network finds hard are thought over once more, before the next one is written.

Source: Fu et al., "Think-at-Hard: Selective Latent Iterations to Improve Reasoning Language Models", arXiv 2511.08577
(TaH); the algorithm as the paper and its release have it, re-implemented.

With tokens i, passes d = 1..D and E the embeddings:

    x_i^(1) = E[t_i],  z_i^(d) = model(x_i^(d)),  Z_i = z_i^(1) + .. + z_i^(d)       logits of pass d, and their sum
    c_i = sigmoid(decider(h_i^(d), Z_i));  token i runs pass d + 1 iff c_i > threshold and d < D
    x_i^(d+1) = sum over v in the `top` largest of Z_i of softmax(Z_i over those)_v E_v

The token's prediction is read from its last Z_i. Query (i, d) sees the keys (j, k) with j <= i and k <= d; positions
are those of the token in every pass. Low-rank weights act in every pass but the first, so that pass 1 is the model
itself: a token that runs one pass is predicted bit for bit as without the method.

The decider (`deciders.NeuralDecider`) reads the un-normed states of a few layers and the `top` largest logits. Without
one, places are spread evenly: token p of a row runs again iff floor((p + 1) s) > floor(p s), s = 1 - budget, in every
pass alike.

Training (`pertoken zoo train reasoning-think`): with a reference model, the token at i is hard if the reference's
greedy token is not t_(i+1); the whole model and the low-rank weights on next-token cross-entropy with the hard tokens
running again, then the decider alone on binary cross-entropy against those labels. With more than two passes,
`oracle_passes` maps ranks of the reference's cross-entropy to passes.

Differs from the release: the cumulative logits go to the decider as to the soft embedding, and the last layer's state,
where it looks at that, without the final norm; any batch, each row for itself; transformers' own generation with its
samplers and beams; low-rank weights are gated, not switched; a threshold by the share of tokens (`threshold=None`).

It loses where the model is unsure because the text is, not because it lacks depth: another pass costs a whole one and
settles nothing. All logits of a prompt are computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pertoken.core.card import Paper, method
from pertoken.core.errors import BadRequest
from pertoken.depth.deciders import Decider, NeuralDecider
from pertoken.depth.passes import PassPolicy, PassView


def oracle_passes(losses: Tensor, shares: tuple[float, ...]) -> Tensor:
    """Passes per token from the reference's cross-entropies `[...]`: the hardest `shares[-1]` get as many passes as
    there are shares, and so on down; shares add to 1."""
    if any(share < 0 for share in shares) or abs(sum(shares) - 1) > 1e-6:
        raise BadRequest(f"shares={shares} must be at least 0 and add to 1, the first for one pass")
    rank = losses.flatten().argsort().argsort().double() / max(losses.numel(), 1)
    bounds = torch.tensor(shares, dtype=torch.double, device=losses.device).cumsum(0)[:-1]
    return (1 + (rank[:, None] >= bounds - 1e-9).sum(-1)).view(losses.shape)


@method(
    question="depth",
    shape="policy",
    exactness="approximate",
    paper=Paper(
        "Think-at-Hard: Selective Latent Iterations to Improve Reasoning Language Models",
        "2511.08577",
    ),
    reads={"states", "logits"},
    writes={"layers", "passes", "keys read"},
    baselines=("full",),
)
@dataclass(frozen=True)
class ThinkAtHard(PassPolicy):
    """Hard tokens run all layers again on the embedding that they expect, with keys of both passes in view.

    decider: a `Decider`, or the directory or zoo:NAME of a trained one; without one the places are spread evenly by the
    budget. threshold: the chance above which a token runs again, None: the one at which the decider lets 1 - budget of
    its held-out text go on.
    """

    decider: Decider | str | None = None
    threshold: float | None = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise BadRequest(f"threshold={self.threshold} is a probability in [0, 1], or None for the budget's")
        if isinstance(self.decider, str):
            object.__setattr__(self, "decider", NeuralDecider.load(self.decider))

    @property
    def judge(self) -> Decider | None:
        """The decider, once it is loaded."""
        assert not isinstance(self.decider, str)
        return self.decider

    @property
    def watched(self) -> tuple[int, ...]:
        return () if self.judge is None else self.judge.layers

    def check(self, model: Any) -> None:
        if self.judge is not None:
            self.judge.check(model)
            self.level()

    def level(self) -> float:
        """The chance above which a token runs again."""
        if self.threshold is not None:
            return self.threshold
        share = self.budget.fraction
        if not isinstance(self.judge, NeuralDecider) or share is None:
            raise BadRequest("threshold=None asks a trained decider for the threshold of a budget; give both")
        return self.judge.threshold(share)

    def again(self, view: PassView) -> Tensor:
        assert view.asked is not None
        if self.judge is not None:
            return self.judge.chances(view) > self.level()
        share = 1 - (self.budget.fraction if self.budget.fraction is not None else 1.0)
        places = view.valid.cumsum(-1) - 1 if view.positions is None else view.positions
        places = places.expand_as(view.asked)[view.asked].double()
        return ((places + 1) * share + 1e-9).floor() > (places * share + 1e-9).floor()
