"""DiffuSpec: a masked-diffusion model guesses a block in one forward; a search makes a string of it; its length adapts.

Source: Li et al., "DiffuSpec: Unlocking Diffusion Language Models for Speculative Decoding", arXiv 2510.02358. No code
was released; this follows the paper's text and what a third party's re-implementation found out.

Each step the drafter reads the text x and k masks behind it, once: a law p_i per position (`lattice.py`). Two remedies:

- the most likely tokens of all positions need not make a string that reads from the left. Per position the fewest
  tokens that have the share `mass` of p_i are kept, at most `candidates`, and every end of text; a beam of `width`
  finds the path y of largest  S(y) = sum_i [ w log p_i(y_i) + (1 - w) log q(y_i | x, y_<i) ],  q a small n-gram model;
- the block's length follows the text. Of a step, L_gen = min(s - 1, k) positions precede the first end of text s among
  the most likely tokens and L_acc guesses were accepted; with running means of both (decay 1 - rho),
  k <- clip( floor(mean L_gen) + step [mean L_acc >= mean L_gen], shortest, longest ).

Exactness: a path that a search has found is no sample of any law that the drafter could name, so the paper's test
(accept with min(1, p / q_L2R)) does not give the target's law. Here the path is a guess outright: token y is accepted
with the target's own probability p(y), and after a rejection the token is drawn from p without y. The law is exactly
the target's at any temperature, and greedy output that of plain greedy decoding.

What differs from the paper besides: paths are compared at equal length, in the end by their mean score per token (the
plain sum prefers whatever ends early); the running means are corrected for their start at 0 (uncorrected, k falls to
`shortest` after the first step, whatever was accepted); the n-gram model counts each row's own text, with `ngrams`, one
fitted on other texts as in the paper, under it; `paths` > 1 gives the best paths to the target as one tree; `beyond`
masks are read but not proposed, so that the draft is not taken for the end of the text; `refresh` computes the text's
keys and values less often than in every step.

It loses where the drafter, which reads the whole text at each step, costs as much as the tokens it saves, and where a
causal draft of its size agrees with the target better, as it mostly does on text that is hard to guess ahead.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pertoken.core.card import Paper, method
from pertoken.core.errors import BadRequest
from pertoken.decode.lattice import MaskDrafter, Path, likely, paths, pruned
from pertoken.decode.ngram import NGramCounts
from pertoken.decode.request import Request
from pertoken.decode.speculation import Proposal, Session, Speculation
from pertoken.decode.tree import ROOT, Tree
from pertoken.decode.verify import Walk
from pertoken.models.context import Context
from pertoken.models.kind import kind_of


class Length:
    """How many positions one row's next draft has (adaptive draft length)."""

    def __init__(self, shortest: int, longest: int, step: int, rho: float):
        self.shortest, self.longest, self.step, self.rho = shortest, longest, step, rho
        self.now = longest
        self.generated = self.accepted = self.seen = 0.0

    def update(self, generated: int, accepted: int) -> None:
        """Count one step: positions before the draft's end of text, and guesses accepted."""
        keep, rho = 1 - self.rho, self.rho
        self.generated = keep * self.generated + rho * generated
        self.accepted = keep * self.accepted + rho * accepted
        self.seen = keep * self.seen + rho
        mean = self.generated / self.seen + 1e-9  # what rounding takes off a whole number
        more = self.step if self.accepted / self.seen + 2e-9 >= mean else 0
        self.now = min(max(math.floor(mean) + more, self.shortest), self.longest)


@method(
    question="decode",
    shape="decoder",
    exactness="lossless",
    paper=Paper("DiffuSpec: Unlocking Diffusion Language Models for Speculative Decoding", "2510.02358"),
    reads={"logits"},
    writes={"guesses"},
    needs={"diffusion_draft"},
    baselines=("full", "chain", "prompt_lookup"),
)
@dataclass(frozen=True)
class DiffuSpec(Speculation):
    """Blocks of guesses from a masked-diffusion model, searched for a path that reads well, of adaptive length.

    drafter: a masked-diffusion model whose first tokens are the target's vocabulary; shortest, longest, step, rho: of
    the draft's length, equal shortest and longest fix it; width: of the beam; mass, candidates: of a position's tokens;
    weight: of the drafter's log-probability against the n-gram model's (1: that is not asked); order: of the n-gram
    model; ngrams: one fitted on other texts; paths: how many of the best are proposed; beyond, refresh: see the module
    and `MaskDrafter`.
    """

    drafter: nn.Module | None = None
    shortest: int = 20
    longest: int = 30
    step: int = 10
    rho: float = 0.5
    width: int = 3
    mass: float = 0.8
    candidates: int = 15
    weight: float = 0.5
    order: int = 3
    ngrams: NGramCounts | None = None
    paths: int = 1
    beyond: int = 0
    refresh: int | None = 1

    def session(self, request: Request, target: Context, scope: ExitStack) -> Session:
        self._check()
        vocabulary = target.stack.adapter.vocabulary
        check_drafter(self.drafter, vocabulary)
        if self.ngrams is not None and self.ngrams.vocabulary != vocabulary:
            raise BadRequest(
                f"ngrams was fitted for a vocabulary of {self.ngrams.vocabulary} tokens, the target has {vocabulary}"
            )
        config: Any = self.drafter.config  # type: ignore[union-attr]
        need, limit = max(len(row.tokens) for row in request.rows) + request.max_new, config.max_position_embeddings
        if need > limit:
            raise BadRequest(
                f"the drafter has {limit} positions, prompt and output may need {need}; take one made for longer "
                "texts, or lower max_new_tokens"
            )
        columns = min(need + self.beyond, limit)
        drafter = MaskDrafter(self.drafter, len(request.rows), columns, vocabulary, self.beyond, self.refresh)
        return DiffuSession(self, request, drafter, vocabulary)

    def _check(self) -> None:
        if not 1 <= self.shortest <= self.longest:
            raise BadRequest(f"shortest={self.shortest}, longest={self.longest}: give 1 <= shortest <= longest")
        for name in ("width", "candidates", "order", "paths", "refresh"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise BadRequest(f"{name}={getattr(self, name)}: give at least 1")
        if self.beyond < 0 or self.step < 0:
            raise BadRequest(f"beyond={self.beyond}, step={self.step}: give 0 or more")
        for name in ("mass", "weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise BadRequest(f"{name}={getattr(self, name)} is no share; give 0 to 1")
        if not 0 < self.rho <= 1:
            raise BadRequest(f"rho={self.rho}: give more than 0 and at most 1")


def check_drafter(drafter: Any, vocabulary: int) -> None:
    """Raise `BadRequest` unless this is a masked-diffusion model for a target with so many tokens."""
    if not isinstance(drafter, nn.Module):
        raise BadRequest(
            f"DiffuSpec needs a masked-diffusion model as its drafter, got {type(drafter).__name__}; give one with the "
            "target's tokenizer, such as zoo:code-diffusion for zoo:code-target"
        )
    config: Any = drafter.config
    token = getattr(config, "mask_token_id", None)
    if kind_of(drafter) != "diffusion" or token is None:
        raise BadRequest(
            f"the drafter {type(drafter).__name__} is no masked-diffusion model: config.is_causal must be False (it is "
            f"{getattr(config, 'is_causal', True)}) and config.mask_token_id a token (it is {token}). For a causal "
            "draft take dyspec or chain"
        )
    if config.vocab_size < vocabulary or not 0 <= token < config.vocab_size:
        raise BadRequest(
            f"the drafter has {config.vocab_size} tokens with mask token {token}, the target {vocabulary}: the target's"
            " tokens must be the drafter's first ones. Take a drafter with the target's tokenizer"
        )


class DiffuSession(Session):
    """Drafts for the active rows; per row a length, and counts of its own text."""

    def __init__(self, settings: DiffuSpec, request: Request, drafter: MaskDrafter, vocabulary: int):
        self.settings, self.request, self.drafter = settings, request, drafter
        rows = range(len(request.rows))
        self.lengths = [Length(settings.shortest, settings.longest, settings.step, settings.rho) for _ in rows]
        self.counts = [NGramCounts(settings.order, vocabulary, settings.ngrams) for _ in rows]
        self.ends = sorted(request.ends)
        self.generated: list[int] = [0 for _ in rows]

    @property
    def draft_calls(self) -> int:  # type: ignore[override]
        return self.drafter.calls

    def propose(self) -> Proposal:
        rows, settings = self.request.active, self.settings
        wanted = [min(length.now, self.request.room(row) - 1) for length, row in zip(self.lengths, rows, strict=True)]
        self.generated = [0 for _ in rows]
        trees = [Tree() for _ in rows]
        if any(wanted):
            found = likely(self.drafter.read(rows, wanted), settings.candidates, self.ends)
            for i, (row, count) in enumerate(zip(rows, wanted, strict=True)):
                if count:
                    tokens, log_p, ended = (array[i, :count] for array in found)
                    first = tokens[:, 0].tolist()
                    self.generated[i] = next((n for n, t in enumerate(first) if t in self.request.ends), count)
                    places = pruned(tokens, log_p, ended, self.ends, settings.mass)
                    if settings.weight < 1:
                        self.counts[i].extend(row.tokens)
                    best = paths(places, row.tokens, self.request.ends, self.counts[i], settings.weight, settings.width)
                    trees[i] = tree_of([path for _, path in best[: settings.paths]], [dict(p) for p in places])
        return Proposal(trees, [{} for _ in rows], note={"lengths": wanted})

    def observe(self, proposal: Proposal, walks: list[Walk], logits: Tensor, states: list[Tensor]) -> None:
        for length, generated, tree, walk in zip(self.lengths, self.generated, proposal.trees, walks, strict=True):
            if len(tree):
                length.update(generated, len(walk.path))

    def select(self, rows: list[int]) -> None:
        self.drafter.select(rows)
        self.lengths = [self.lengths[r] for r in rows]
        self.counts = [self.counts[r] for r in rows]


def tree_of(found: list[Path], places: list[dict[int, float]]) -> Tree:
    """The paths as one tree of outright guesses; places: log-probabilities of the candidates of each position."""
    tree = Tree()
    for path in found:
        node, reach = ROOT, 1.0
        for token, place in zip(path, places, strict=False):
            reach *= math.exp(place[token])
            known = tree.child_with(node, token)
            node = tree.add(token, node, reach, sure=True) if known is None else known
    return tree
