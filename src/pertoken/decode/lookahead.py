"""Pause and look ahead: where a rule says so, several next tokens are tried, and the one that goes on best is taken.

A decoder of the shared loop that has its own way of choosing. At a place where the rule pauses, the `beams` most likely
tokens c are each continued greedily by up to `length` tokens; the one of largest mean log-probability

    score(c) = ( log p(c | x) + sum_i log p(r_i | x, c, r_<i) ) / (n_c + 1)

is committed, n_c the tokens of its continuation r, which ends early where generation would (end of text, a stopping
criterion, the longest output). Probabilities are those of the processed scores, and processors see the text as if it
had gone on so. Everywhere else the most likely token is taken.

The continuations are branches of one token tree below the place, so that a step of all candidates of all paused rows is
one forward that reads each new token once and copies no cache; a row that pauses waits until the others pause too or
have come to the end of their guesses. With `reuse` the continuation of the token taken becomes the next step's guess,
which the loop verifies in one forward, place by place, pausing where the rule says so: the same tokens as without, in
fewer forwards, because a pause that costs `length` forwards leaves as many tokens to be accepted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor
from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor

from pertoken.core.errors import BadRequest
from pertoken.decode.drafter import TreeReader
from pertoken.decode.request import Request, Row
from pertoken.decode.speculation import Proposal, Session, Speculation, Stats
from pertoken.decode.tree import ROOT, Tree, ancestor_mask
from pertoken.decode.verify import Choice, Visit, Walk
from pertoken.models.context import Context


@dataclass
class PauseStats(Stats):
    """As `Stats`. pauses: places where decoding paused; changed: those where another token than the most likely one was
    taken."""

    pauses: int = 0
    changed: int = 0


class Rule(ABC):
    """Where decoding pauses."""

    @abstractmethod
    def pauses(self, rows: Sequence[Row], logits: Tensor) -> list[bool]:
        """Whether each row pauses before its next token; logits `[row, vocabulary]` as the model gave them."""


@dataclass
class Branch:
    """One candidate and its continuation. visit: index of the paused place; rank: 0 for the most likely candidate;
    total: sum of log-probabilities; chances: probability of each token; node: its last token's place in the tree."""

    visit: int
    rank: int
    row: Row
    node: int
    tokens: list[int]
    chances: list[float]
    total: float
    ended: bool = False

    @property
    def score(self) -> float:
        return self.total / len(self.tokens)


@dataclass(frozen=True)
class Lookahead(Speculation, ABC):
    """Base of decoders that pause. beams: candidates tried; length: most tokens that each is continued by; reuse: let
    the continuation of the token taken be the next guess (no change of the output)."""

    beams: int = field(default=3, kw_only=True)
    length: int = field(default=5, kw_only=True)
    reuse: bool = field(default=True, kw_only=True)
    stats: PauseStats = field(default_factory=PauseStats, init=False, repr=False, compare=False)

    @abstractmethod
    def rule(self, target: Context) -> Rule:
        """Where to pause in this model's output."""

    def session(self, request: Request, target: Context, scope: ExitStack) -> Session:
        if self.beams < 1 or self.length < 0:
            raise BadRequest(f"beams={self.beams}, length={self.length}: give at least 1 candidate and a length from 0")
        if request.sampling:
            raise BadRequest(
                "do_sample=True: decoding with a lookahead takes the best token and draws none; give do_sample=False"
            )
        if any(isinstance(p, UnbatchedClassifierFreeGuidanceLogitsProcessor) for p in request.processors):
            raise BadRequest(
                f"guidance_scale={request.config.guidance_scale} keeps a cache of one text and cannot score tokens that"
                " are only tried; leave it out, or decode without a lookahead"
            )
        return LookaheadSession(self, self.rule(target), request, target)


class LookaheadSession(Session, Choice):
    """Chooses tokens, and guesses what the last lookahead has found already."""

    def __init__(self, settings: Lookahead, rule: Rule, request: Request, target: Context):
        self.settings, self.rule, self.request, self.target = settings, rule, request, target
        self.choice = self
        self.trees: list[Tree] = []
        self.paused: set[tuple[int, int]] = set()
        self.note: list[dict[str, object]] = []
        self.ahead: dict[int, tuple[int, Branch]] = {}

    def propose(self) -> Proposal:
        self.trees, self.note, self.paused = [Tree() for _ in self.request.active], [], set()
        if self.settings.reuse:
            for row, tree in zip(self.request.active, self.trees, strict=True):
                self._guess(row, tree)
        return Proposal(self.trees, [{} for _ in self.trees], note={"paused": self.note})

    def _guess(self, row: Row, tree: Tree) -> None:
        """The rest of the row's last continuation, if the row has kept to it."""
        begin, branch = self.ahead.get(row.number, (0, None))
        since = row.tokens[begin:]
        if branch is None or branch.tokens[: len(since)] != since:
            return
        reach, node = 1.0, ROOT
        for token, chance in list(zip(branch.tokens, branch.chances, strict=True))[len(since) :]:
            if len(tree) < self.request.room(row) - 1:
                reach *= chance
                node = tree.add(token, node, reach)

    def postponed(self, visits: Sequence[Visit], logits: Tensor) -> list[bool]:
        """Paused rows wait for each other: they look ahead in the same forwards."""
        stops = self.rule.pauses([visit.row for visit in visits], logits)
        self.paused.update((v.row.number, v.row.generated) for v, stop in zip(visits, stops, strict=True) if stop)
        return stops

    def choose(self, visits: Sequence[Visit], scores: Tensor, logits: Tensor) -> list[int]:
        tokens = scores.argmax(-1).tolist()
        paused = [i for i, v in enumerate(visits) if (v.row.number, v.row.generated) in self.paused]
        if paused:
            for i, branch in self._best([visits[i] for i in paused], scores[paused]).items():
                row, best = visits[paused[i]].row, tokens[paused[i]]
                tokens[paused[i]] = branch.tokens[0]
                self.ahead[row.number] = (len(row.tokens), branch)
                self.settings.stats.pauses += 1
                self.settings.stats.changed += branch.tokens[0] != best
                self.note.append({"row": row.number, "at": row.generated, "tokens": branch.tokens, "rank": branch.rank})
        return tokens

    def _best(self, visits: Sequence[Visit], scores: Tensor) -> dict[int, Branch]:
        """The best branch of each of these places; scores `[place, vocabulary]`."""
        places = {row.number: i for i, row in enumerate(self.request.active)}
        at = [places[visit.row.number] for visit in visits]
        trees = [Tree() for _ in self.trees]
        columns: list[dict[int, int]] = [{} for _ in self.trees]
        roots = [0 for _ in self.trees]
        for place, visit in zip(at, visits, strict=True):  # below the place; its column is the trees' new root
            columns[place][ROOT] = visit.node + 1
            roots[place] = len(visit.row.tokens) - 1
        width = max(map(len, self.trees))
        reader = TreeReader(self.target)
        reader.start(columns, np.stack([ancestor_mask(tree.parents, width) for tree in self.trees]))
        branches = self._candidates(visits, [trees[place] for place in at], scores)
        for _ in range(self.settings.length):
            live = [branch for branch in branches if not branch.ended]
            if not live:
                break
            queues: list[list[int]] = [[] for _ in trees]
            slots = []
            for branch in live:
                queue = queues[at[branch.visit]]
                slots.append(len(queue))
                queue.append(branch.node)
            hidden = reader.read(roots, trees, queues)
            found = self.target.stack.logits(hidden[[at[branch.visit] for branch in live], slots])
            self._extend(live, [trees[at[branch.visit]] for branch in live], found)
        self.own_forwards += reader.calls
        self.own_tokens += reader.tokens
        self.draft_calls += reader.calls
        best: dict[int, Branch] = {}
        for branch in branches:
            if branch.visit not in best or branch.score > best[branch.visit].score:
                best[branch.visit] = branch
        return best

    def _candidates(self, visits: Sequence[Visit], trees: list[Tree], scores: Tensor) -> list[Branch]:
        log_p, tokens = scores.log_softmax(-1).topk(min(self.settings.beams, scores.shape[-1]), -1)
        branches = []
        for rank, (ids, values) in enumerate(zip(tokens.T.tolist(), log_p.T.tolist(), strict=True)):
            for i, (token, value) in enumerate(zip(ids, values, strict=True)):
                if rank == 0 or value > -np.inf:  # what a processor forbids is no candidate
                    node = trees[i].add(token, ROOT)
                    chance = float(np.exp(value))
                    branches.append(Branch(i, rank, visits[i].row, node, [token], [chance], value))
        self._end(branches)
        return branches

    def _extend(self, live: list[Branch], trees: list[Tree], logits: Tensor) -> None:
        """Continue each branch by its most likely token; logits `[branch, vocabulary]`."""
        scores = logits.float()
        if self.request.processors:
            scores = scores.clone()
            for group in self._ranks(live):
                scores[group] = self.request.scored([self._supposed(live[i]) for i in group], logits[group])
        best, tokens = scores.log_softmax(-1).max(-1)
        for branch, tree, value, token in zip(live, trees, best.tolist(), tokens.tolist(), strict=True):
            branch.node = tree.add(token, branch.node)
            branch.tokens.append(token)
            branch.chances.append(float(np.exp(value)))
            branch.total += value
        self._end(live)

    def _end(self, branches: list[Branch]) -> None:
        """Mark the branches whose last token ends generation."""
        for group in self._ranks(branches):
            stops = self.request.stops([self._supposed(branches[i]) for i in group])
            for i, stop in zip(group, stops, strict=True):
                branches[i].ended = stop

    def _supposed(self, branch: Branch) -> Row:
        return self.request.supposed(branch.row, branch.tokens)

    @staticmethod
    def _ranks(branches: list[Branch]) -> list[list[int]]:
        """Indices in groups in which no row occurs twice."""
        groups: dict[int, list[int]] = {}
        for i, branch in enumerate(branches):
            groups.setdefault(branch.rank, []).append(i)
        return list(groups.values())

    def observe(self, proposal: Proposal, walks: list[Walk], logits: Tensor, states: list[Tensor]) -> None:
        """Nothing to learn."""

    def select(self, rows: list[int]) -> None:
        """What is kept is kept by the rows' numbers."""
