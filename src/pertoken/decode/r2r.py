"""R2R: a small model writes, and a router asks the large one for the tokens that would send the text another way.

Source: Fu et al., "R2R: Efficiently Navigating Divergent Reasoning Paths with Small-Large Model Token Routing", arXiv
2505.21600; the algorithm as the released code has it, re-implemented.

At every place the small model chooses a token y (greedy or sampled). A router reads what it saw,

    z = W_c [h; E y; W_g g]      h: its last state, after the final norm; g: its 100 largest logits, as they are, sorted
    p = sigmoid(head(blocks(z)))                            E: its input embedding, frozen; blocks: see `decode.router`

and if p >= threshold the large model reads what it has not read yet, in one forward, and its token is taken instead.
Nothing is verified and nothing rolled back: tokens that differ without consequence are kept.

In the shared loop the tokens between two questions are a proposal whose tokens are all taken; the target's one forward
of the step is the question, for all rows of the batch at once, each at a place of its own. Both caches hold the
committed text and nothing else.

Differs from the paper: without a router, p is one minus the small model's probability of y, which needs no training.
Rows of a batch wait for each other between questions. It loses where the small model is wrong nearly everywhere: then
the large one alone does the same with fewer forwards.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pertoken.core.card import Dial, Paper, method
from pertoken.core.errors import BadRequest
from pertoken.decode.request import Request, Row
from pertoken.decode.router import Router, Seen
from pertoken.decode.speculation import Proposal, Session, Speculation, Stats
from pertoken.decode.tree import ROOT, Tree
from pertoken.decode.tree_decoder import check_vocabularies
from pertoken.decode.verify import Choice, Visit, Walk
from pertoken.models.context import Context
from pertoken.models.stack import stack_of

LONGEST = 64  # tokens after which the large model reads along, asked or not: bounds the block of a step


@dataclass
class RoutedStats(Stats):
    """asked: tokens that the large model chose; small_tokens: tokens that the small model read."""

    asked: int = 0
    small_tokens: int = 0

    @property
    def share(self) -> float:
        """Of the tokens, those that the large model chose."""
        return self.asked / max(self.tokens, 1)

    def activated(self, small: int, large: int) -> float:
        """Parameters activated per token written: the small model's for each, the large one's for those it chose, given
        the parameters of both. Reading along is not counted, as in the paper; `token_forwards` has it."""
        return small + self.share * large


class Route(ABC):
    """Which tokens of the small model are questioned."""

    @abstractmethod
    def questions(self, rows: Sequence[Row], seen: Seen) -> Tensor:
        """`[row]` bool; rows: as they stand before the token."""


@dataclass(frozen=True)
class Routing(Speculation):
    """Base of decoders in which a small model writes and the model itself answers questions."""

    draft: nn.Module | None = None
    stats: RoutedStats = field(default_factory=RoutedStats, init=False, repr=False, compare=False)

    @abstractmethod
    def route(self, small: Any) -> Route:
        """The rule of one request; raises `BadRequest` if it does not fit the small model."""

    def session(self, request: Request, target: Context, scope: ExitStack) -> Session:
        if self.draft is None:
            raise BadRequest(f"{type(self).__name__} needs a small model that writes; give it as the first argument")
        check_vocabularies(self.draft, target)
        stack = stack_of(self.draft)
        need = max(len(row.tokens) for row in request.rows) + request.max_new
        if need > stack.adapter.positions:
            raise BadRequest(
                f"the small model has {stack.adapter.positions} positions, prompt and output may need {need}; lower "
                "max_new_tokens or take one made for longer texts"
            )
        given = [len(row.tokens) for row in request.rows]
        context = Context(stack, len(request.rows), need + 8, given)
        return RoutedSession(self.route(self.draft), request, context, self.stats)


class RoutedSession(Session, Choice):
    """Lets the small model write until every row has a question, has ended, or is long enough."""

    def __init__(self, route: Route, request: Request, small: Context, stats: RoutedStats):
        self.route, self.request, self.small, self.stats, self.choice = route, request, small, stats, self
        self.last: dict[int, int | None] = {}  # by row number: the token behind its chain, None: ask for it

    def propose(self) -> Proposal:
        rows = self.request.active
        chains: list[list[int]] = [[] for _ in rows]
        self.last = {}
        unread = [row.tokens[known:] for row, known in zip(rows, self.small.known, strict=True)]
        while True:
            self.stats.small_tokens += sum(map(len, unread))
            hidden = self.small.feed(unread)
            self.draft_calls += 1
            going = [i for i, tokens in enumerate(unread) if tokens]
            tokens, asked = self._written(
                [self.request.supposed(rows[i], chains[i]) for i in going], hidden[torch.tensor(going)]
            )
            unread = [[] for _ in rows]
            for i, token, question in zip(going, tokens, asked, strict=True):
                row, chain = rows[i], chains[i]
                full = len(chain) + 1 >= min(self.request.room(row), LONGEST)
                if question or full or token in self.request.ends:
                    self.last[row.number] = None if question else token
                else:
                    chain.append(token)
                    unread[i] = [token]
            if not any(unread):
                break
        trees = []
        for chain in chains:
            tree = Tree()
            for place, token in enumerate(chain):
                tree.add(token, place - 1 if place else ROOT, 1.0, 0)
            trees.append(tree)
        return Proposal(trees, [{} for _ in trees], note={"asked": sum(last is None for last in self.last.values())})

    def _written(self, rows: list[Row], hidden: Tensor) -> tuple[list[int], list[bool]]:
        """What the small model writes next, and whether that is questioned."""
        stack = self.small.stack
        logits = stack.logits(hidden)
        scores = self.request.scored(rows, logits)
        if self.request.sampling:
            tokens = torch.multinomial(scores.softmax(-1), 1)[:, 0]
        else:
            tokens = scores.argmax(-1)
        seen = Seen(stack.adapter.norm(hidden), logits, tokens)
        return tokens.tolist(), self.route.questions(rows, seen).tolist()

    def choose(self, visits: Sequence[Visit], scores: Tensor, logits: Tensor) -> list[int]:
        """The chain's tokens, and behind them the small model's last one or the large one's."""
        if self.request.sampling:
            answers = torch.multinomial(scores.softmax(-1), 1)[:, 0].tolist()
        else:
            answers = scores.argmax(-1).tolist()
        chosen = []
        for visit, answer in zip(visits, answers, strict=True):
            children = visit.tree.children.get(visit.node, [])
            last = visit.tree.tokens[children[0]] if children else self.last[visit.row.number]
            self.stats.asked += last is None
            chosen.append(answer if last is None else last)
        return chosen

    def observe(self, proposal: Proposal, walks: list[Walk], logits: Tensor, states: list[Tensor]) -> None:
        """Nothing to learn."""

    def select(self, rows: list[int]) -> None:
        self.small.select(rows)


@dataclass(frozen=True)
class Learned(Route):
    """Questions from this probability on; router: None for one minus the small model's own."""

    router: Router | None
    threshold: float

    def questions(self, rows: Sequence[Row], seen: Seen) -> Tensor:
        if self.router is None:
            chance = 1 - seen.logits.float().softmax(-1).gather(-1, seen.tokens[:, None])[:, 0]
        else:
            chance = self.router(seen).sigmoid()
        return chance >= self.threshold


@method(
    question="decode",
    shape="decoder",
    exactness="approximate",
    paper=Paper(
        "R2R: Efficiently Navigating Divergent Reasoning Paths with Small-Large Model Token Routing", "2505.21600"
    ),
    reads={"logits", "states"},
    writes={"tokens"},
    needs={"draft"},
    baselines=("full", "entropy_route", "random_route"),
    dial=Dial("threshold", (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)),
)
@dataclass(frozen=True)
class R2R(Routing):
    """A small model writes; tokens that a router takes for divergent are the large model's.

    draft: the small model; router: a `Router` trained for it, or the directory or zoo:NAME of one (None: its doubt in
    its own token); threshold: probability from which the large model is asked, None: the router's own (0.5 without
    one).
    """

    router: Router | str | None = None
    threshold: float | None = None
    small: ClassVar[dict[str, Any]] = {"threshold": 0.6}

    def route(self, small: Any) -> Route:
        router = Router.load(self.router, small) if isinstance(self.router, str) else self.router
        if router is not None:
            router.check(small)
        level = self.threshold
        if level is None:
            level = 0.5 if router is None else router.threshold
        return Learned(router, level)
