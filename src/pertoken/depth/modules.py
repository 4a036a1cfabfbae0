"""Big or small modules: which feed-forward block each token runs in each layer, or none of them.

The third way into ragged depth (see `ragged`). Attention runs for every token, so that every layer holds every token's
keys and values and any cache is right. What is chosen is the feed-forward block: the model's own ("big"), a smaller one
that was trained beside it (`duo.Duo`), or none ("skip": nothing is added to the residual stream). Tokens are gathered
by their choice, each block computes its own, and the results are scattered back.

A policy either knows the choices of all layers before the forward (one `Depth` for the forward), or looks at the states
that each block reads and chooses layer by layer (one `Depth` of a single layer for each, at the site
"depth.modules.LAYER"). In a `Depth`, `layers` says who runs the big block and `small` who runs the small one.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from pertoken.core.attach import Attachment
from pertoken.core.budget import Budget
from pertoken.core.decision import Depth
from pertoken.core.errors import BadRequest
from pertoken.core.policy import Policy, View
from pertoken.depth.duo import BIG, SMALL, Duo
from pertoken.depth.ragged import by_choice
from pertoken.models.adapter import adapter_for

SITE = "depth.modules"


@dataclass(frozen=True)
class ModuleView(View):
    """What is seen before the feed-forward block of layer `layer`. states `[batch, token, width]`: what it reads."""

    layer: int = 0
    states: Tensor | None = None


@dataclass(frozen=True)
class ModulePolicy(Policy):
    """Base of policies that choose feed-forward blocks.

    budget: big blocks per token, in layers or as a share of the depth; the full budget switches the method off.
    modules: a `Duo`, or the directory or zoo:NAME of one; without, a token that does not run the big block runs none.
    """

    budget: Budget = Budget(fraction=0.5)
    modules: Duo | str | None = field(default=None, kw_only=True)
    reads: ClassVar[frozenset[str]] = frozenset()
    writes: ClassVar[frozenset[str]] = frozenset({"layers"})

    def __post_init__(self) -> None:
        if isinstance(self.modules, str):
            object.__setattr__(self, "modules", Duo.load(self.modules))

    @property
    def duo(self) -> Duo | None:
        """The modules, once they are loaded."""
        assert not isinstance(self.modules, str)
        return self.modules

    @property
    def looks(self) -> bool:
        """Whether it chooses layer by layer, by the states there."""
        return False

    @abstractmethod
    def choose(self, view: View) -> Tensor:
        """`[batch, token, layer]` of `BIG`, `SMALL` and `SKIP`: for all layers, or for the view's if it `looks`."""

    def decide(self, view: View) -> Depth:
        choice = self.choose(view)
        return Depth(view.valid, choice == BIG, None if self.duo is None else choice == SMALL)

    def is_full(self, layers: int) -> bool:
        """Whether every token runs the big block everywhere."""
        return self.budget.count(layers) >= layers

    def install(self, model: Any, attachment: Attachment) -> None:
        adapter, duo = adapter_for(model), self.duo
        depth = adapter.depth
        if duo is not None:
            duo.check(model)
        if self.is_full(depth) and not attachment.replaying:
            return
        if duo is not None:
            duo.to(adapter.device)
            duo.install(model, attachment)

        def begin(view: View) -> None:
            whole = attachment.coming == SITE if attachment.replaying else not self.looks
            attachment.state[SITE] = (view, attachment.decide(SITE, view) if whole else None)

        def around(index: int) -> Callable[..., Tensor]:
            def run(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
                if SITE not in attachment.state:
                    return forward(x)
                view, decision = attachment.state[SITE]
                at = index
                if decision is None:
                    here = ModuleView(view.valid, depth, {}, view.tree, view.positions, view.prompt, index, x)
                    at, decision = 0, attachment.decide(f"{SITE}.{index}", here)
                assert isinstance(decision, Depth)
                choices: list[tuple[Tensor, Callable[[Tensor], Tensor]]] = [(decision.layers[..., at], forward)]
                if decision.small is not None:
                    if duo is None:
                        raise BadRequest(
                            "this recording has tokens in small modules; give the modules it was made with"
                        )
                    choices.append((decision.small[..., at], duo.small[index]))
                return by_choice(x, view.valid, choices)

            return run

        attachment.on_forward(begin)
        attachment.announce(adapter.base, depth)
        for index in range(depth):
            attachment.wrap(adapter.feed_forward(index), around(index))


@dataclass(frozen=True, eq=False)
class GivenModules(ModulePolicy):
    """The choices are given: `route` `[batch or 1, token or 1, layer]` of `BIG`, `SMALL` and `SKIP`, or what returns it
    for a view."""

    route: Tensor | Callable[[View], Tensor] = field(kw_only=True)

    def is_full(self, layers: int) -> bool:
        return self.budget.is_full

    def choose(self, view: View) -> Tensor:
        route = self.route(view) if callable(self.route) else self.route
        return route.to(view.valid.device).expand(*view.valid.shape, -1)
