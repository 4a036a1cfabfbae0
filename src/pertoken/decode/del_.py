"""DEL: self-speculation whose exit layer and draft length follow the text.

Source: Entezari Zarch et al., "DEL: Context-Aware Dynamic Exit Layer for Efficient Self-Speculative Decoding",
arXiv 2504.05598; the algorithm as the released code has it, re-implemented.

The target drafts through its own first E layers and verifies with all L. After each verification the hidden states of
every layer at the verified positions exist anyway; pushed through the final norm and head they give *shadow tokens*:
what a draft at that layer would have been. Counts of shadow tokens that match the target, decayed by omega per round,
give for each exit l an acceptance rate alpha_l, and the mean confidence on matches and mismatches a threshold tau_l.
The next round drafts at the (E, d) that maximises tokens per layer-load

    TPL(E, d) = (1 - alpha_E^(d+1)) / (1 - alpha_E) / (L + d E)

and stops early after a token whose confidence is below tau_E. Verification runs layers 1..E on the last drafted token
only and the others on the whole block, so a round costs L + d E layer-loads.

What differs from the release, which is right where they agree: an exit not yet seen has alpha 1/2 and tau 0 (there: 0 /
0, so such an exit drafted 18 tokens blindly); d* = 0 drafts nothing (there: always one token);
`bounded` lets d* bound the draft as well (in the release it is computed and not used, and here too tau alone gave more
tokens per layer-load on three of five kinds of text); d runs to `longest` itself; rows of a batch keep their own counts
and thresholds and share one E, chosen from their summed TPL. When sampling, drafts are drawn with the request's own
temperature and truncation.

It loses on a model whose shallow layers were not trained to decode (no early-exit loss): alpha stays small, d* is 0,
and what is left is the cost of the shadow pass.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pertoken.core.card import Paper, method
from pertoken.core.errors import BadRequest
from pertoken.decode.request import Request
from pertoken.decode.speculation import Partial, Proposal, Session, Speculation
from pertoken.decode.tree import ROOT, Tree
from pertoken.decode.verify import Walk
from pertoken.models.context import Context

EXIT = 2  # index of "exit" in core.decision.SOURCES


class Controller:
    """Running acceptance and confidence of every exit, per row. Exits are numbered by layers run, 1..layers - 1."""

    def __init__(self, rows: int, layers: int, longest: int = 18, omega: float = 0.95):
        self.layers, self.longest, self.omega = layers, longest, omega
        self.counts = np.zeros((rows, layers - 1, 2))  # matches, mismatches
        self.confidences = np.zeros((rows, layers - 1, 2))

    def update(self, row: int, match: np.ndarray, confidence: np.ndarray, drafted_at: int | None) -> None:
        """Count one round of a row: match and confidence `[exit, column]`.

        Columns after the first one that the drafting exit got wrong stood on a wrong context and are left out; None for
        calibration columns, which all count.
        """
        if drafted_at is not None:
            wrong = np.flatnonzero(~match[drafted_at - 1])
            if len(wrong):
                match, confidence = match[:, : wrong[0] + 1], confidence[:, : wrong[0] + 1]
        both = np.stack([match, ~match], -1)
        self.counts[row] = self.omega * self.counts[row] + both.sum(1)
        self.confidences[row] = self.omega * self.confidences[row] + (both * confidence[..., None]).sum(1)

    def alpha(self) -> np.ndarray:
        """`[row, exit]` estimated acceptance; 1/2 where nothing was seen."""
        total = self.counts.sum(-1)
        return np.where(total > 0, self.counts[..., 0] / np.where(total > 0, total, 1.0), 0.5)

    def tau(self, exit_layer: int) -> np.ndarray:
        """`[row]` confidence below which a draft at this exit stops; 0 until it was both right and wrong."""
        counts, sums = self.counts[:, exit_layer - 1], self.confidences[:, exit_layer - 1]
        seen = (counts > 0).all(-1)
        means = sums / np.where(counts > 0, counts, 1.0)
        return np.where(seen, 0.5 * means.sum(-1), 0.0)

    def tokens_per_layer(self) -> np.ndarray:
        """`[row, exit, length]` expected tokens per layer-load for draft lengths 0..longest."""
        alpha = self.alpha()[..., None]
        powers = alpha ** np.arange(self.longest + 1)
        loads = self.layers + np.arange(1, self.layers)[:, None] * np.arange(self.longest + 1)
        return powers.cumsum(-1) / loads

    def select(self) -> tuple[int, int]:
        """(exit, draft length) of the largest TPL summed over rows; the shallowest and shortest of equals."""
        total = self.tokens_per_layer().sum(0)
        exit_index, length = np.unravel_index(int(total.argmax()), total.shape)
        return int(exit_index) + 1, int(length)

    def keep(self, rows: list[int]) -> None:
        self.counts, self.confidences = self.counts[rows], self.confidences[rows]


@method(
    name="del",
    question="decode",
    shape="decoder",
    exactness="lossless",
    paper=Paper("DEL: Context-Aware Dynamic Exit Layer for Efficient Self-Speculative Decoding", "2504.05598"),
    reads={"logits", "states"},
    writes={"guesses"},
    baselines=("full", "prompt_lookup"),
)
@dataclass(frozen=True)
class DEL(Speculation):
    """Self-speculation through the target's first layers; exit layer and draft length chosen online.

    longest: most tokens drafted in a round; omega: decay of the counts per round; calibration: prompt tokens counted
    before the first round; probe: rounds between two shadow passes (1: every round, as in the paper); fixed: (exit,
    length) of a fixed baseline instead of the controller's choice; bounded: whether the chosen length bounds the draft
    (False: only the confidence threshold does, as in the release).
    """

    longest: int = 18
    omega: float = 0.95
    calibration: int = 32
    probe: int = 1
    fixed: tuple[int, int] | None = None
    bounded: bool = False

    def session(self, request: Request, target: Context, scope: ExitStack) -> Session:
        layers = target.stack.adapter.depth
        if layers < 2:
            raise BadRequest(f"the model has {layers} layer(s); drafting through its first layers needs at least 2")
        if self.fixed is not None and not (1 <= self.fixed[0] < layers and self.fixed[1] >= 0):
            raise BadRequest(f"fixed={self.fixed}: the exit must be in 1..{layers - 1} and the length at least 0")
        if self.probe < 1:
            raise BadRequest(f"probe={self.probe}: a shadow pass comes every so many rounds, at least every 1")
        if self.longest < 1:
            raise BadRequest(f"longest={self.longest} drafts nothing; give at least 1, or use the 'full' decoder")
        return DelSession(self, request, target, Controller(len(request.rows), layers, self.longest, self.omega))


class DelSession(Session):
    """Drafts chains on the target's own context."""

    def __init__(self, settings: DEL, request: Request, target: Context, controller: Controller):
        self.settings, self.request, self.target, self.controller = settings, request, target, controller
        self.wants_states = settings.fixed is None
        self.exit, self.first, self.rounds = 1, True, 0

    def prefilled(self, states: list[Tensor], lengths: list[int]) -> None:
        """Count the last prompt tokens: states `[row, token, width]` of every layer, lengths of the rows within
        them."""
        if self.settings.fixed is not None or not self.settings.calibration:
            return
        for row, length in enumerate(lengths):
            if length:
                columns = slice(max(length - self.settings.calibration, 0), length)
                part = [state[row : row + 1, columns] for state in states]
                final = self.target.stack.logits(part[-1]).argmax(-1)
                match, confidence = self._shadow(part, final)
                self.controller.update(row, match[:, 0], confidence[:, 0], None)

    def propose(self) -> Proposal:
        rows, settings = self.request.active, self.settings
        if settings.fixed is not None:
            self.exit, length = settings.fixed
        elif self.first:
            self.exit, length = 1, 1
        else:
            self.exit, length = self.controller.select()
            if length and not settings.bounded:
                length = settings.longest
        self.first = False
        tau = np.zeros(len(rows)) if settings.fixed is not None else self.controller.tau(self.exit)
        trees = [Tree() for _ in rows]
        laws: list[dict[int, Tensor]] = [{} for _ in rows]
        length = min(length, max(self.request.room(row) for row in rows) - 1)
        note = {"exit": self.exit if length > 0 else None, "length": length}
        if length < 1:
            return Proposal(trees, laws, None, note)
        partial = self._draft(trees, laws, length, tau)
        return Proposal(trees, laws, partial, note)

    def _draft(self, trees: list[Tree], laws: list[dict[int, Tensor]], length: int, tau: np.ndarray) -> Partial:
        rows, stack, cache = self.request.active, self.target.stack, self.target.cache
        device = self.target.device
        tokens = torch.tensor([row.tokens[-1] for row in rows], device=device)[:, None]
        last = torch.tensor([len(row.tokens) - 1 for row in rows], device=device)[:, None]
        states: list[list[Tensor]] = []
        going = [self.request.room(row) > 1 for row in rows]
        reach = [1.0] * len(rows)
        for depth in range(length):
            states.append([])
            allow = torch.ones(len(rows), 1, depth + 1, dtype=torch.bool, device=device)
            hidden = stack.forward(
                tokens, last + depth, cache, cache.base + depth, allow, last >= 0, last=self.exit, states=states[-1]
            )
            logits = (
                self.request.warp(stack.logits(hidden[:, -1])) if self.request.sampling else stack.logits(hidden[:, -1])
            )
            logits = logits.float()
            if self.request.sampling:
                law = logits.softmax(-1)
                if not torch.isfinite(law).all():
                    raise BadRequest(
                        f"the model's exit after layer {self.exit} gave nan or inf logits for row "
                        f"{rows[int((~torch.isfinite(law).all(-1)).nonzero()[0])].number}; logits must be finite. "
                        "Check the weights and the dtype (fp16 overflows: try bf16 or fp32)"
                    )
                tokens = torch.multinomial(law, 1)
                chances = law.gather(-1, tokens)
            else:
                best, tokens = logits.max(-1, keepdim=True)
                chances = (best - logits.logsumexp(-1, keepdim=True)).exp()
            for i, (token, chance) in enumerate(
                zip(tokens.flatten().tolist(), chances.flatten().tolist(), strict=True)
            ):
                if going[i]:
                    tree = trees[i]
                    parent = len(tree) - 1 if len(tree) else ROOT
                    if self.request.sampling:
                        laws[i][parent] = law[i]
                    reach[i] *= chance
                    tree.add(token, parent, reach[i], EXIT)
                    ends = token in self.request.ends or len(tree) >= self.request.room(rows[i]) - 1
                    going[i] = chance >= tau[i] and not ends
            if not any(going):
                break
        joined = [torch.cat([step[layer] for step in states], 1) for layer in range(self.exit)]
        return Partial(self.exit, len(states), joined)

    def _shadow(self, states: list[Tensor], final: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """match and confidence `[exit, row, column]` of every early exit against the final layer's tokens."""
        logits = self.target.stack.logits(torch.stack(states[:-1])).float()
        best, tokens = logits.max(-1)
        confidence = (best - logits.logsumexp(-1)).exp()
        return (tokens == final).cpu().numpy(), confidence.cpu().numpy()

    def observe(self, proposal: Proposal, walks: list[Walk], logits: Tensor, states: list[Tensor]) -> None:
        self.rounds += 1
        if not states or self.settings.fixed is not None or self.rounds % self.settings.probe:
            return
        match, confidence = self._shadow(states, logits.argmax(-1))
        for row, tree in enumerate(proposal.trees):
            columns = len(tree) + 1
            drafted_at = self.exit if len(tree) else None
            self.controller.update(row, match[:, row, :columns], confidence[:, row, :columns], drafted_at)

    def select(self, rows: list[int]) -> None:
        self.controller.keep(rows)
