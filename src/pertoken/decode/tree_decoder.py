"""What all tree-growing decoders share: a drafter, a shape, and the session that grows, observes and lets rows go."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pertoken.core.attach import attach
from pertoken.core.errors import BadRequest
from pertoken.core.policy import Policy
from pertoken.decode.drafter import ModelDrafter
from pertoken.decode.growth import NGRAM, Economy, Growth, Shape
from pertoken.decode.ngram import NGramIndex, Trust
from pertoken.decode.request import Request
from pertoken.decode.speculation import Proposal, Session, Speculation
from pertoken.decode.tree import ROOT
from pertoken.decode.verify import Walk
from pertoken.models.adapter import adapter_for
from pertoken.models.context import Context
from pertoken.models.stack import ModuleStack, Stack, stack_of
from pertoken.models.timing import block_time


def check_vocabularies(draft: Any, target: Context) -> None:
    """Raise `BadRequest` unless draft and target number their tokens alike, as far as their configurations tell."""
    mine, theirs = draft.config, target.stack.adapter.config
    if mine.vocab_size != theirs.vocab_size:
        raise BadRequest(
            f"the draft has a vocabulary of {mine.vocab_size} tokens, the target {theirs.vocab_size}; speculation "
            "needs one tokenizer for both: take a draft of the same family, or none (prompt_lookup, del)"
        )
    ends = [getattr(c, "eos_token_id", None) for c in (mine, theirs)]
    if None not in ends and ends[0] != ends[1]:
        raise BadRequest(
            f"the draft ends text with token {ends[0]}, the target with {ends[1]}: their tokenizers differ. Take a "
            "draft that was trained with the target's tokenizer"
        )


@dataclass(frozen=True)
class TreeDecoder(Speculation):
    """Base of decoders that grow a tree from a draft model, a policy on the target itself, n-grams, or a mix."""

    draft: nn.Module | Policy | None = None

    @abstractmethod
    def shape(self) -> Shape:
        """Which places the tree takes."""

    @abstractmethod
    def growth(self, shape: Shape, request: Request, target: Context, drafter: ModelDrafter | None) -> Growth:
        """The growth rules of one request."""

    def session(self, request: Request, target: Context, scope: ExitStack) -> Session:
        shape = self.shape()
        if shape.size < 1:
            raise BadRequest(
                f"a tree of {shape.size} nodes guesses nothing; give at least 1, or use the 'full' decoder for plain "
                "decoding"
            )
        temperature = getattr(self, "temperature", 1.0)
        if not temperature > 0:
            raise BadRequest(f"temperature={temperature} of the draft must be above 0; give a value such as 0.6")
        drafter = None
        if self.draft is not None:
            stack = self._draft_stack(target, scope)
            need, limit = max(len(row.tokens) for row in request.rows) + request.max_new, stack.adapter.positions
            if need > limit:
                raise BadRequest(
                    f"the draft has {limit} positions, prompt and output may need {need}; take a draft made for longer "
                    "texts, or lower max_new_tokens"
                )
            drafter = ModelDrafter(stack, request.rows, shape.size)
        growth = self.growth(shape, request, target, drafter)
        growth.guide = request.guide
        return TreeSession(growth, request)

    def _draft_stack(self, target: Context, scope: ExitStack) -> Stack:
        if isinstance(self.draft, Policy):
            adapter = target.stack.adapter
            attachment = scope.enter_context(attach(adapter.model, self.draft))
            if not isinstance(target.stack, ModuleStack):
                return ModuleStack(adapter)
            return SwitchedStack(adapter, attachment, target.stack)
        check_vocabularies(self.draft, target)
        adapter_for(self.draft)
        return stack_of(self.draft)  # type: ignore[arg-type]


class SwitchedStack(ModuleStack):
    """The target's own modules with a policy that acts only while this stack runs, not while the target verifies."""

    def __init__(self, adapter: Any, attachment: Any, target_stack: Stack):
        super().__init__(adapter)
        self.attachment = attachment
        attachment.enabled = False

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        self.attachment.enabled = True
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.attachment.enabled = False

    def logits(self, hidden: Tensor) -> Tensor:
        self.attachment.enabled = True
        try:
            return super().logits(hidden)
        finally:
            self.attachment.enabled = False


def economy_of(target: Context, drafter: ModelDrafter | None, rows: int) -> Economy:
    """Step times of this machine for these models and rows, measured once."""
    draft = None if drafter is None else block_time(drafter.context.stack, rows)
    return Economy(block_time(target.stack, rows), draft, padding=target.stack.padding)


class TreeSession(Session):
    """Grows trees for the active rows and learns from what was accepted."""

    def __init__(self, growth: Growth, request: Request):
        self.growth, self.request = growth, request
        self.matches: list[dict[int, int]] = []

    @property
    def draft_calls(self) -> int:  # type: ignore[override]
        return self.growth.drafter.calls if self.growth.drafter is not None else 0

    def propose(self) -> Proposal:
        rows = self.request.active
        if self.growth.ngrams is not None:
            for index, row in zip(self.growth.ngrams, rows, strict=True):
                index.extend(row.tokens)
        grown = self.growth.grow(rows, [self.request.room(row) - 1 for row in rows])
        self.matches = grown.matches
        return Proposal(grown.trees, grown.laws)

    def observe(self, proposal: Proposal, walks: list[Walk], logits: Tensor, states: list[Tensor]) -> None:
        for tree, walk, matches in zip(proposal.trees, walks, self.matches, strict=True):
            visited = {ROOT, *walk.path}
            for node, length in matches.items():
                if tree.parents[node] in visited:
                    self.growth.trust.observe(length, node in visited)
        if self.growth.drafter is not None:
            self.growth.drafter.accept([walk.path[: len(walk.committed) - 1] for walk in walks])

    def select(self, rows: list[int]) -> None:
        if self.growth.ngrams is not None:
            self.growth.ngrams = [self.growth.ngrams[r] for r in rows]
        if self.growth.drafter is not None:
            self.growth.drafter.select(rows)


def ngram_indices(request: Request, shortest: int, longest: int) -> list[NGramIndex]:
    """One empty index per row; it reads the prompt with the first proposal."""
    return [NGramIndex(shortest, longest) for _ in request.rows]


__all__ = ["NGRAM", "TreeDecoder", "TreeSession", "Trust", "economy_of", "ngram_indices"]
