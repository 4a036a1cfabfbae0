"""The one loop of every decoder: propose -> constrain -> verify -> commit, over token trees and ragged rows.

A decoder is a frozen dataclass that says how guesses are made (`session`); the loop does the rest: it reads the prompt,
verifies all rows' trees in one forward of the target, commits token by token, compacts the cache once, and lets
finished rows go. With any proposer the output is what plain generation gives: the same tokens when greedy, the same law
when sampling.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from pertoken.core.decision import Commit
from pertoken.core.errors import BadRequest
from pertoken.core.trace import Player, Recorded, TraceMismatch
from pertoken.decode.growth import GRAMMAR
from pertoken.decode.request import Request, Row, callers_streamer
from pertoken.decode.tree import Tree, TreeBatch
from pertoken.decode.verify import Choice, Greedy, Sampling, Visit, Walk, verify
from pertoken.models.adapter import Adapter, adapter_for
from pertoken.models.context import Context
from pertoken.models.stack import stack_of

SITE = "decode.step"


@dataclass
class Stats:
    """Counts of the last call. steps: target forwards that committed tokens; forwards: these, and whole forwards of the
    target that a session ran itself; token_forwards: tokens read in them, without padding and the prompt; layer_loads:
    layers run, summed over forwards of the target's own layers (a draft through the first E layers counts E); seconds:
    wall clock; forced: accepted guesses that a grammar left no choice about, each a step that was not taken."""

    steps: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    forced: int = 0
    row_steps: int = 0
    draft_calls: int = 0
    layer_loads: int = 0
    forwards: int = 0
    token_forwards: int = 0
    seconds: float = 0.0
    draft_seconds: float = 0.0


@dataclass
class Proposal:
    """Guesses of one step. laws: for each row, the distribution `[vocabulary]` that a node's drawn children come from.

    `partial` holds work that the target's own layers have done on the first tokens of the block (see `Partial`); note
    goes into the trace.
    """

    trees: list[Tree]
    laws: list[dict[int, Tensor]]
    partial: Partial | None = None
    note: dict[str, Any] = field(default_factory=dict)


@dataclass
class Partial:
    """The target's first `layers` layers, already run on the first `tokens` tokens of the block (root included).

    states: the outputs of those layers on those tokens, `[row, token, width]` each; their keys and values are in the
    cache.
    """

    layers: int
    tokens: int
    states: list[Tensor]


class Session(ABC):
    """A proposer at work on one request.

    choice: how tokens are chosen, None for the loop's own ways; own_forwards, own_tokens: whole forwards of the target
    that the session has run itself, and tokens read in them.
    """

    draft_calls: int = 0
    wants_states: bool = False
    choice: Choice | None = None
    own_forwards: int = 0
    own_tokens: int = 0

    def prefilled(self, states: list[Tensor], lengths: list[int]) -> None:
        """The prompt was read: with `wants_states`, the outputs of all layers on its last chunk and each row's length
        there."""
        return None

    @abstractmethod
    def propose(self) -> Proposal:
        """Guesses for every active row; a tree is no deeper than `request.room(row) - 1`."""

    @abstractmethod
    def observe(self, proposal: Proposal, walks: list[Walk], logits: Tensor, states: list[Tensor]) -> None:
        """Learn what became of the guesses. logits `[row, 1 + node, vocabulary]`; states: outputs of all target layers
        if `wants_states`."""

    @abstractmethod
    def select(self, rows: list[int]) -> None:
        """Keep only these rows (indices into the rows before)."""


@dataclass(frozen=True)
class Speculation(Recorded, ABC):
    """Base of every decoder: a callable for `model.generate(..., custom_generate=decoder)`.

    A recording holds one `Commit` per step, the trees and what became of them. Its replay drafts nothing.
    """

    stats: Stats = field(default_factory=Stats, init=False, repr=False, compare=False)

    @abstractmethod
    def session(self, request: Request, target: Context, scope: ExitStack) -> Session:
        """Start proposing for a request. Register on `scope` what must be undone when the request ends."""

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: GenerationConfig | None = None,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Generate; called by transformers with everything prepared. Raises `BadRequest` before any work is done.

        The named arguments are those of transformers' own modes: it would take any other name out of the model's.
        """
        past_key_values = model_kwargs.get("past_key_values")
        if past_key_values is not None and past_key_values.get_seq_length() > 0:
            raise BadRequest(
                f"past_key_values holds {past_key_values.get_seq_length()} tokens; a speculative decoder keeps its own "
                "cache: pass the whole prompt as input_ids"
            )
        config = generation_config or model.generation_config
        adapter = adapter_for(model)
        _check_unread(model, adapter, input_ids, model_kwargs)
        streamer = streamer or callers_streamer()
        request = Request(
            adapter,
            input_ids,
            model_kwargs.get("attention_mask"),
            config,
            logits_processor,
            stopping_criteria,
            streamer,
        )
        with torch.inference_mode(), ExitStack() as scope:
            self._run(model, request, scope)
        return request.result()  # outside: what comes back must be ordinary tensors

    def _run(self, model: Any, request: Request, scope: ExitStack) -> None:
        started = time.perf_counter()
        stats = self.stats
        stats.__init__()  # type: ignore[misc]
        trace, player = self._tape.taken()
        longest = max(len(row.tokens) for row in request.rows)
        given = [len(row.tokens) for row in request.rows]
        target = Context(stack_of(model), len(request.rows), longest + min(request.max_new, 256) + 80, given)
        session = self.session(request, target, scope) if player is None else Replay(player, request, target)
        choice = session.choice or (Sampling() if request.sampling else Greedy())
        if any(len(row.tokens) > 1 for row in request.rows):
            states: list[Tensor] | None = [] if session.wants_states else None
            target.feed([row.tokens[:-1] for row in request.rows], states)
            if states is not None:
                session.prefilled(states, target.tail_lengths)
        while request.active:
            before = time.perf_counter()
            proposal = session.propose()
            proposed = time.perf_counter()
            batch = TreeBatch.of(proposal.trees, target.device)
            logits, states = _target_logits(target, request.active, batch, proposal.partial, session.wants_states)
            walks = verify(request, proposal.trees, proposal.laws, logits, choice)
            session.observe(proposal, walks, logits, states)
            target.keep([[0, *(node + 1 for node in walk.path[: len(walk.committed) - 1])] for walk in walks])
            request.stream()
            layers = target.stack.adapter.depth
            extra = proposal.partial.layers * proposal.partial.tokens if proposal.partial else 0
            _count(stats, proposal.trees, walks, layers + extra)
            stats.draft_seconds += proposed - before
            if trace is not None:
                note = {"seconds": time.perf_counter() - before, "draft_seconds": proposed - before, **proposal.note}
                rows = tuple(row.number for row in request.active)
                trace.record(SITE, commit_of(batch, walks), rows, layer_loads=layers + extra, **note)
            stay = request.drop_finished()
            if stay:
                target.select(stay)
                session.select(stay)
        stats.draft_calls = session.draft_calls
        stats.forwards += session.own_forwards
        stats.token_forwards += session.own_tokens
        stats.layer_loads += session.own_forwards * target.stack.adapter.depth
        stats.seconds = time.perf_counter() - started
        if player is not None and not player.finished:
            raise TraceMismatch(
                "the recording goes on after every row has stopped; replay with the same stopping rules"
            )


def _check_unread(model: nn.Module, adapter: Adapter, ids: Tensor, given: dict[str, Any]) -> None:
    """Raise `BadRequest` for what plain generation would follow and this loop does not read."""
    if given.get("inputs_embeds") is not None:
        raise BadRequest("inputs_embeds is not read by a speculative decoder; give the prompt as input_ids")
    positions, mask = given.get("position_ids"), given.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    if positions is not None and not torch.equal(positions * mask, (mask.cumsum(-1) - 1) * mask):
        raise BadRequest(
            "position_ids other than 0, 1, 2, ... of each row are not read by a speculative decoder; leave them out"
        )
    for name, module in (("model", model), ("model without its head", adapter.base)):
        if module._forward_hooks or module._forward_pre_hooks:
            raise BadRequest(
                f"the {name} ({type(module).__name__}) has a forward hook, and a speculative decoder runs its layers "
                "one by one, so the hook would not act; hook the embedding, layers, norm or head instead"
            )


def _target_logits(
    target: Context, rows: Sequence[Row], batch: TreeBatch, partial: Partial | None, keep_states: bool
) -> tuple[Tensor, list[Tensor]]:
    """Logits `[row, 1 + node, vocabulary]` of the root and every node, in one forward; and all layers' outputs if
    asked."""
    stack, cache, device = target.stack, target.cache, target.device
    last = torch.tensor([len(row.tokens) - 1 for row in rows], device=device)
    roots = torch.tensor([row.tokens[-1] for row in rows], device=device)
    ids = torch.cat([roots[:, None], batch.tokens], 1)
    positions = last[:, None] + torch.nn.functional.pad(batch.depths, (1, 0))
    valid = torch.nn.functional.pad(batch.valid, (1, 0), value=True)
    positions = torch.where(valid, positions, last[:, None])
    allow = batch.allow
    states: list[Tensor] | None = [] if keep_states else None
    base, depth = cache.base, stack.adapter.depth
    if partial is None:
        hidden = stack.forward(ids, positions, cache, base, allow, valid, states=states)
    else:
        done = partial.tokens
        rest = allow[:, done:] if allow is not None else None
        early: list[Tensor] = []
        stack.forward(
            ids[:, done:],
            positions[:, done:],
            cache,
            base + done,
            rest,
            valid[:, done:],
            last=partial.layers,
            states=early,
        )
        joined = [torch.cat(pair, 1) for pair in zip(partial.states, early, strict=True)]
        cache.open(base, positions)
        stack.announce(valid, cache, tree=True, positions=positions)
        later: list[Tensor] = []
        hidden = stack.run(joined[-1], positions, cache, stack.masks(cache, allow), partial.layers, depth, later)
        states = [*joined, *later]
    return stack.logits(hidden), states or []


def _count(stats: Stats, trees: Sequence[Tree], walks: Sequence[Walk], layers: int) -> None:
    stats.steps += 1
    stats.forwards += 1
    stats.token_forwards += len(trees) + sum(map(len, trees))
    stats.layer_loads += layers
    stats.row_steps += len(walks)
    stats.tokens += sum(len(walk.committed) for walk in walks)
    stats.accepted += sum(len(walk.path) for walk in walks)
    stats.forced += sum(t.sources[node] == GRAMMAR for t, walk in zip(trees, walks, strict=True) for node in walk.path)
    stats.drafted += sum(map(len, trees))


def commit_of(batch: TreeBatch, walks: Sequence[Walk]) -> Commit:
    """The step as a decision, for the trace."""
    rows, width = len(walks), batch.width
    slots = max(len(walk.committed) for walk in walks)
    value, source = torch.zeros(rows, width), torch.zeros(rows, width, dtype=torch.long)
    parents = torch.full((rows, width), -1)
    accepted = torch.zeros(rows, width, dtype=torch.bool)
    committed = torch.zeros(rows, slots, dtype=torch.long)
    for row, (tree, walk) in enumerate(zip(batch.trees, walks, strict=True)):
        size = len(tree)
        value[row, :size] = torch.tensor(tree.values)
        source[row, :size] = torch.tensor(tree.sources, dtype=torch.long)
        parents[row, :size] = torch.tensor(tree.parents, dtype=torch.long)
        accepted[row, walk.path] = True
        committed[row, : len(walk.committed)] = torch.tensor(walk.committed)
    return Commit(
        valid=batch.valid.cpu(),
        tokens=batch.tokens.cpu(),
        parents=parents,
        value=value,
        source=source,
        accepted=accepted,
        committed=committed,
        count=torch.tensor([len(walk.committed) for walk in walks]),
    )


class Replay(Session, Choice):
    """Serves trees and choices from a recording; refuses a recording that does not fit."""

    def __init__(self, player: Player, request: Request, target: Context):
        self.player, self.request, self.choice = player, request, self
        self.step: Any = None
        self.taken: dict[int, int] = {}

    def propose(self) -> Proposal:
        self.step = self.player.take(SITE, Commit)
        numbers = tuple(row.number for row in self.request.active)
        if self.step.rows != numbers:
            raise TraceMismatch(f"the recording has rows {self.step.rows} at this step, the request {numbers}")
        self.taken = dict.fromkeys(numbers, 0)
        decision, trees = self.step.decision, []
        for row in range(len(numbers)):
            tree = Tree()
            for node in range(int(decision.valid[row].sum())):
                values = (decision.tokens, decision.parents, decision.value, decision.source)
                token, parent, value, source = (v[row, node].item() for v in values)
                tree.add(int(token), int(parent), float(value), int(source))
            trees.append(tree)
        return Proposal(trees, [{} for _ in trees])

    def choose(self, visits: Sequence[Visit], scores: Tensor, logits: Tensor) -> list[int]:
        chosen = []
        for visit in visits:
            number = visit.row.number
            at = self.step.rows.index(number)
            if self.taken[number] >= int(self.step.decision.count[at]):
                raise TraceMismatch(f"row {number} goes on past what was recorded; replay with the same stopping rules")
            chosen.append(int(self.step.decision.committed[at, self.taken[number]]))
            self.taken[number] += 1
        return chosen

    def observe(self, proposal: Proposal, walks: list[Walk], logits: Tensor, states: list[Tensor]) -> None:
        """Nothing to learn."""

    def select(self, rows: list[int]) -> None:
        """Nothing is kept per row."""
