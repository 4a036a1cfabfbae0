"""Growing trees: one best-first loop over all rows; a shape says which place comes next and where to stop.

A *place* is a spot below a node (or the root) where one more guess could be drawn. It has a value: the estimated
probability that verification gets there. Best-first growth takes the place of highest priority, draws the next token of
its distribution, and opens two places: the next sibling and the first child. A place below a node that no drafter has
read yet is *unread*: its value is known before its distribution, so the model runs only for places that are taken, and
for several of them in one forward. Whether to draw is decided from values alone, never from the token that would come:
every drawn token stays (what keeps rejection sampling exact).

Under a grammar (`guide`), a place where only one token may come gets that one, at no loss, and distributions are
limited to what may come: the drawn children are then samples of the limited distribution, which is the law that they
are verified with.
"""

from __future__ import annotations

import heapq
import itertools
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pertoken.decode.drafter import ModelDrafter, Place
from pertoken.decode.grammar.processor import GrammarProcessor
from pertoken.decode.grammar.provider import TokenMask
from pertoken.decode.ngram import NGramIndex, Trust
from pertoken.decode.request import Row
from pertoken.decode.tree import ROOT, Tree
from pertoken.models.timing import StepTime

SIBLINGS = 32  # draws prepared per node; a node never gets more children
HOPE = 0.8  # tokens expected per reached place before its distribution is known, for the economy only
MODEL, NGRAM, GRAMMAR = 0, 1, 3  # of core.decision.SOURCES


class Shape(ABC):
    """Which place a tree takes next. Frozen; shared by all rows."""

    size: int

    @abstractmethod
    def priority(self, reach: float, chance: float, depth: int, rank: int) -> float | None:
        """Priority of drawing the `rank`-th child at `depth`, None to refuse it.

        reach: estimated probability that verification gets to this place; chance: the draw's own probability if it may
        be used (greedy decoding, where the children need not be samples), else 1.
        """

    def together(self, priority: float) -> float:
        """Unread places with at least this priority are read in the same forward as the best one."""
        return priority


@dataclass(frozen=True)
class Economy:
    """When growing pays: a node or a draft forward is worth it while it adds tokens faster than the step makes them
    now.

    verify and draft give seconds by the tokens of all rows together, measured on the machine; padding: what a padding
    token costs, in real ones; what the loop itself takes, in seconds: overhead per step, call per draft forward (its
    masks and draws), ragged and ragged_call what a row beyond the first adds to a step that has guesses and to a draft
    forward, node per node drawn.
    """

    verify: StepTime
    draft: StepTime | None
    padding: float = 1.0
    overhead: float = 1e-3
    ragged: float = 2e-4
    call: float = 3e-4
    ragged_call: float = 1.3e-4
    node: float = 3e-5

    def step(self, rows: int) -> float:
        """Seconds of a step without a guess."""
        return self.verify(rows) + self.overhead

    def tokens(self, rows: int, widens: bool) -> float:
        """What one more node adds to the block, in real tokens: it brings padding or takes the place of some."""
        return 1 + self.padding * (rows - 1 if widens else -1)

    def read_cost(self, rows: int, places: float) -> float:
        """Seconds of a draft forward over this many places of all rows."""
        return self.call + self.ragged_call * (rows - 1) + (self.draft(places) if self.draft is not None else 0.0)


@dataclass(frozen=True)
class Draws:
    """Children of one node in the order they would be drawn: tokens and the probability of each (not renormalised)."""

    tokens: list[int]
    chances: list[float]


def draw(
    logits: Tensor, temperature: float, sampler: str, count: int, taken: Sequence[int]
) -> tuple[list[Draws], Tensor]:
    """The first `count` children of each distribution `[place, vocabulary]`, and its log-probabilities in float32.

    sampler: "top" takes the most likely tokens; "gumbel" samples without replacement, by sorting log-probabilities plus
    Gumbel noise, which has the law of drawing one by one from the renormalised rest. `taken[place]` is a token that is
    there already (-1: none).
    """
    log_p = (logits.float() / temperature).log_softmax(-1)
    open_ = log_p
    if any(t >= 0 for t in taken):
        open_ = log_p.clone()
        for place, token in enumerate(taken):
            if token >= 0:
                open_[place, token] = -torch.inf
    count = min(count, open_.shape[-1])
    if sampler == "gumbel":
        keys = open_ - torch.empty_like(open_).exponential_().log_()
        tokens = keys.topk(count, -1).indices
        chances = open_.gather(-1, tokens)
    else:
        chances, tokens = open_.topk(count, -1)
    drawn = []
    for ids, p in zip(tokens.tolist(), chances.exp().tolist(), strict=True):
        usable = next((i for i, value in enumerate(p) if value <= 0.0), len(p))
        drawn.append(Draws(ids[:usable], p[:usable]))
    return drawn, log_p


@dataclass(order=True)
class _Entry:
    rank_key: float
    number: int
    row: int = field(compare=False)
    parent: int = field(compare=False)
    reach: float = field(compare=False)
    rank: int = field(compare=False)  # which child of the node's draws; -1: the node is unread
    share: float = field(compare=False, default=1.0)  # the draw's probability among what is left at its place


@dataclass
class Grown:
    """The trees of one step and the distributions that verification needs: `laws[row][node]` `[vocabulary]`."""

    trees: list[Tree]
    laws: list[dict[int, Tensor]]
    matches: list[dict[int, int]]


class Growth:
    """Grows the trees of one step over all rows."""

    def __init__(
        self,
        shape: Shape,
        drafter: ModelDrafter | None,
        *,
        temperature: float,
        sample: bool,
        ngrams: list[NGramIndex] | None = None,
        trust: Trust | None = None,
        floor: float = 0.0,
        economy: Economy | None = None,
    ):
        self.guide: GrammarProcessor | None = None
        self.shape, self.drafter, self.temperature, self.sample = shape, drafter, temperature, sample
        self.sampler = "gumbel" if sample else "top"
        self.ngrams, self.trust, self.floor, self.economy = ngrams, trust or Trust(), floor, economy

    def grow(self, rows: Sequence[Row], rooms: Sequence[int]) -> Grown:
        """Trees for these rows; a row's tree is never deeper than its `rooms` entry."""
        if self.drafter is not None:
            self.drafter.begin()
        step = _Step(self, rows, rooms)
        step.open_roots()
        if not step.gains():  # the n-grams' guesses together cost more than they bring: start again without them
            step = _Step(self, rows, rooms)
            step.open_roots(guessing=False)
        return step.grown()


class _Step:
    """The state of one step's growth."""

    def __init__(self, growth: Growth, rows: Sequence[Row], rooms: Sequence[int]):
        self.rules, self.rows, self.rooms = growth, rows, rooms
        count = len(rows)
        self.trees = [Tree() for _ in rows]
        self.laws: list[dict[int, Tensor]] = [{} for _ in rows]
        self.matches: list[dict[int, int]] = [{} for _ in rows]
        self.draws: list[dict[int, Draws]] = [{} for _ in rows]
        self.taken: list[dict[int, int]] = [{} for _ in rows]
        self.taken_chance: list[dict[int, float]] = [{} for _ in rows]
        self.heaps: list[list[_Entry]] = [[] for _ in rows]
        self.states: list[dict[int, TokenMask | None]] = [{} for _ in rows]
        self.numbers = itertools.count()
        self.gained, self.block, self.widest = float(count), float(count), 0
        self.plain = growth.economy.step(count) if growth.economy is not None else 0.0
        self.seconds = self.plain
        self.root_logits: Tensor | None = None

    def open_roots(self, guessing: bool = True) -> None:
        """Open the places below every root; with n-gram guesses or without."""
        for number, row in enumerate(self.rows):
            self._open(number, ROOT, 1.0, 0, row.tokens, guessing)

    def gains(self) -> bool:
        """Whether the step makes tokens at least as fast as one without guesses."""
        return self.gained * self.plain >= len(self.rows) * self.seconds

    def grown(self) -> Grown:
        """The trees, once nothing more is worth drawing."""
        while wanted := [entry for row in range(len(self.rows)) for entry in self._draw_until_reading(row)]:
            self._read(wanted)
        return Grown(self.trees, self.laws, self.matches)

    def _push(self, row: int, parent: int, reach: float, rank: int) -> None:
        depth = 1 if parent == ROOT else self.trees[row].depths[parent] + 1
        if depth > self.rooms[row] or reach <= 0.0:
            return
        share = 1.0
        if rank >= 0:
            draws = self.draws[row][parent]
            if rank >= len(draws.tokens):
                return
            left = 1.0 - sum(draws.chances[:rank]) - self.taken_chance[row].get(parent, 0.0)
            share = min(draws.chances[rank] / max(left, 1e-9), 1.0)
        chance = 1.0 if self.rules.sample else share
        if reach * chance < self.rules.floor:
            return
        priority = self.rules.shape.priority(reach, chance, depth, max(rank, 0))
        if priority is not None:
            heapq.heappush(self.heaps[row], _Entry(-priority, next(self.numbers), row, parent, reach, rank, share))

    def _open(self, row: int, node: int, reach: float, depth: int, suffix: list[int], guessing: bool = True) -> None:
        """Open the places below a new node (or the root), an n-gram guess first if there is one to trust."""
        tree, rules = self.trees[row], self.rules
        if rules.guide is not None:
            state = self._state(row, node)
            if state is None or state.finished:
                return
            forced = rules.guide.forced(state)
            if forced is not None:
                if depth < self.rooms[row] and len(tree) < rules.shape.size:
                    self._count(row, reach)
                    child = tree.add(forced, node, reach, GRAMMAR, sure=True)
                    self._open(row, child, reach, depth + 1, [*suffix, forced], guessing)
                return
        if guessing and rules.ngrams is not None and depth < self.rooms[row] and len(tree) < rules.shape.size:
            index = rules.ngrams[row]
            guess = index.guess(tuple(suffix[-index.longest :]))
            if guess is not None:
                token, length = guess
                rate = rules.trust.rate(length)
                fits = rules.guide is None or self._may(row, node, token)
                if fits and reach * rate >= rules.floor and self._pays(row, reach * rate):
                    self._count(row, reach * rate)
                    child = tree.add(token, node, reach * rate, NGRAM, sure=True)
                    self.matches[row][child] = length
                    self.taken[row][node] = token
                    self._open(row, child, reach * rate, depth + 1, [*suffix[-index.longest :], token])
                    reach *= 1.0 - rate
        if rules.drafter is not None:
            self._push(row, node, reach, -1)

    def _state(self, row: int, node: int) -> TokenMask | None:
        """What the grammar knows at a node; None if the text up to there is not in it."""
        known, guide = self.states[row], self.rules.guide
        assert guide is not None
        if node not in known:
            if node == ROOT:
                known[node] = guide.at(self.rows[row].number, self.rows[row].output)
            else:
                above = self._state(row, self.trees[row].parents[node])
                known[node] = None if above is None else above.after(self.trees[row].tokens[node])
        return known[node]

    def _may(self, row: int, node: int, token: int) -> bool:
        """Whether the grammar lets a token come behind a node."""
        state = self._state(row, node)
        return state is not None and state.after(token) is not None

    def _node_cost(self, row: int) -> float:
        """Seconds that one more node on this row adds to a step that has guesses."""
        economy = self.rules.economy
        assert economy is not None
        more = economy.tokens(len(self.rows), len(self.trees[row]) >= self.widest)
        return economy.node + economy.verify.slope(self.block) * more

    def _count(self, row: int, value: float) -> None:
        """Take a node into account that `row` is about to get."""
        economy = self.rules.economy
        self.gained += value
        if economy is not None:
            self.seconds += self._node_cost(row) + (self._first_cost() if not self.widest else 0.0)
            self.block += economy.tokens(len(self.rows), len(self.trees[row]) >= self.widest)
        self.widest = max(self.widest, len(self.trees[row]) + 1)

    def _first_cost(self) -> float:
        """Seconds that the first guess of a step costs all rows together."""
        return self.rules.economy.ragged * (len(self.rows) - 1) if self.rules.economy is not None else 0.0

    def _pays(self, row: int, value: float) -> bool:
        """Whether one more node on this row is expected to add tokens faster than the step makes them as it stands."""
        return self.rules.economy is None or value * self.seconds > self.gained * self._node_cost(row)

    def _add(self, entry: _Entry) -> None:
        """Draw the entry's token, open its sibling and its children."""
        row, tree = entry.row, self.trees[entry.row]
        if len(tree) >= self.rules.shape.size:
            return
        value = entry.reach * entry.share
        if not self._pays(row, entry.reach * HOPE if self.rules.sample else value):
            return
        token = self.draws[row][entry.parent].tokens[entry.rank]
        self._count(row, value)
        node = tree.add(token, entry.parent, value, MODEL)
        self._push(row, entry.parent, entry.reach - value, entry.rank + 1)
        self._open(row, node, value, tree.depths[node], self._suffix(row, node))

    def _suffix(self, row: int, node: int) -> list[int]:
        if self.rules.ngrams is None:
            return []
        tree = self.trees[row]
        path = [tree.tokens[n] for n in tree.path(node)]
        longest = self.rules.ngrams[row].longest
        return [*self.rows[row].tokens[-longest:], *path][-longest:]

    def _draw_until_reading(self, row: int) -> list[_Entry]:
        """Draw at a row's places until the best one left is unread; take that one and those nearly as good, to be read.

        A draw that is nearly as good as the best unread place comes first: it needs no forward, and the place that it
        opens can be read in the same one. What a row does depends on no other row.
        """
        while heap := self.heaps[row]:
            if heap[0].rank >= 0:
                self._add(heapq.heappop(heap))
                continue
            bar = -self.rules.shape.together(-heap[0].rank_key)
            near = min((e for e in heap if e.rank >= 0 and e.rank_key < bar), default=None)
            if near is not None:
                heap.remove(near)
                heapq.heapify(heap)
                self._add(near)
                continue
            batch = sorted(e for e in heap if e.rank < 0 and e.rank_key <= bar)
            batch = batch[: self.rules.shape.size - len(self.trees[row])]
            if not batch:
                heap.clear()
                break
            taken = {e.number for e in batch}
            self.heaps[row] = [e for e in heap if e.number not in taken]
            heapq.heapify(self.heaps[row])
            return batch
        return []

    def _read(self, chosen: list[_Entry]) -> None:
        """Read these places in one forward and open their first draws, if that pays."""
        rules, size = self.rules, self.rules.shape.size
        if not self._reading_pays(chosen):
            return
        places = [(e.row, e.parent) for e in chosen]
        taken = [self.taken[row].get(node, -1) for row, node in places]
        logits = self._logits(places)
        if rules.guide is not None:
            logits = logits.float()
            rules.guide.limit([self._state(row, node) for row, node in places], logits)
        drawn, laws = draw(logits, rules.temperature, rules.sampler, min(size, SIBLINGS), taken)
        for index, (entry, draws) in enumerate(zip(chosen, drawn, strict=True)):
            self.draws[entry.row][entry.parent] = draws
            if rules.sample:
                self.laws[entry.row][entry.parent] = laws[index].exp()
            if taken[index] >= 0:
                self.taken_chance[entry.row][entry.parent] = math.exp(float(laws[index, taken[index]]))
            self._push(entry.row, entry.parent, entry.reach, 0)

    def _logits(self, places: list[Place]) -> Tensor:
        """Logits after these places; the roots of all rows are read in one forward, once a step."""
        drafter = self.rules.drafter
        assert drafter is not None
        if self.root_logits is None:
            self.root_logits = drafter.roots(self.rows)
        deeper = [p for p in places if p[1] != ROOT]
        if not deeper:
            return self.root_logits[[row for row, _ in places]]
        logits = drafter.expand(self.rows, self.trees, deeper)
        if len(deeper) == len(places):
            return logits
        order = iter(logits)
        return torch.stack([self.root_logits[row] if node == ROOT else next(order) for row, node in places])

    def _reading_pays(self, entries: list[_Entry]) -> bool:
        economy = self.rules.economy
        if economy is None or economy.draft is None:
            return True
        per_row = Counter(e.row for e in entries)
        padding = len(self.rows) * max(per_row.values()) - len(entries)
        places = len(entries) + economy.padding * padding
        reading = economy.read_cost(len(self.rows), places)
        nodes = economy.node * len(entries) + economy.verify.slope(self.block) * places
        nodes += 0.0 if self.widest else self._first_cost()
        if sum(e.reach for e in entries) * HOPE * self.seconds <= self.gained * (reading + nodes):
            return False
        self.seconds += reading
        return True
