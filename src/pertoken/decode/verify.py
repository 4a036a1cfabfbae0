"""Verification: walk each row's tree with the target's distributions and commit one token per visited node.

At a node the target's scores are processed as plain generation would process them there, a token is chosen, and the
walk goes on into the child that carries it, if there is one. Greedy choice takes the most likely token. Sampling is
exact multi-draft rejection sampling: children are tried in the order they were drawn; child y, drawn from q, is
accepted with probability min(1, R[y] / q[y]); a rejected child leaves R <- norm(max(R - q, 0)) and its token out of the
next q.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pertoken.core.errors import BadRequest
from pertoken.decode.request import Request, Row
from pertoken.decode.tree import ROOT, Tree


@dataclass
class Walk:
    """What became of one row's tree: accepted nodes in order, and every committed token (accepted ones, then one
    more)."""

    path: list[int] = field(default_factory=list)
    committed: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Visit:
    """One row at one node: its tree, the node, and the law its drawn children come from (None if it has none)."""

    row: Row
    tree: Tree
    node: int
    law: Tensor | None


class Choice(ABC):
    """How a token is chosen at a visited node."""

    def postponed(self, visits: Sequence[Visit], logits: Tensor) -> list[bool]:
        """Which visits wait until the other rows have come as far as they can; logits as the model gave them."""
        return [False] * len(visits)

    @abstractmethod
    def choose(self, visits: Sequence[Visit], scores: Tensor, logits: Tensor) -> list[int]:
        """One token per visit from processed scores `[visit, vocabulary]`; logits: the same before processing."""


class Greedy(Choice):
    """The most likely token."""

    def choose(self, visits: Sequence[Visit], scores: Tensor, logits: Tensor) -> list[int]:
        return scores.argmax(-1).tolist()


class Sampling(Choice):
    """A sample of the target's distribution, spent on the tree's children first."""

    def choose(self, visits: Sequence[Visit], scores: Tensor, logits: Tensor) -> list[int]:
        target = scores.softmax(-1)
        tokens: list[int | None] = [None] * len(visits)
        children = [visit.tree.children.get(visit.node, []) for visit in visits]
        waiting = [i for i, nodes in enumerate(children) if nodes]
        draft = None
        if waiting:
            empty = torch.zeros_like(target[0])
            draft = torch.stack([empty if v.law is None else v.law for v in visits]).to(target.device)
        rank = 0
        while waiting:
            assert draft is not None
            tried = [visits[i].tree.tokens[children[i][rank]] for i in waiting]
            sure = torch.tensor([visits[i].tree.sure[children[i][rank]] for i in waiting], device=target.device)
            at = torch.tensor(waiting, device=target.device)
            token = torch.tensor(tried, device=target.device)[:, None]
            rest, q = target[at], draft[at]
            own = torch.zeros_like(q).scatter_(1, token, 1.0)
            q = torch.where(sure[:, None], own, q / q.sum(-1, keepdim=True).clamp(min=1e-30))
            q_token, rest_token = q.gather(1, token), rest.gather(1, token)
            accepted = (torch.rand_like(q_token) * q_token < rest_token).flatten()
            left = (rest - q).clamp_(min=0)
            total = left.sum(-1, keepdim=True)
            left = torch.where(total > 0, left / total.clamp(min=1e-30), rest)
            target[at] = torch.where(accepted[:, None], rest, left)
            draft[at] = draft[at].scatter(1, token, 0.0)
            verdicts = accepted.tolist()
            for i, chosen, verdict in zip(waiting, tried, verdicts, strict=True):
                if verdict:
                    tokens[i] = chosen
            rank += 1
            waiting = [
                i for i, verdict in zip(waiting, verdicts, strict=True) if not verdict and len(children[i]) > rank
            ]
        open_ = [i for i, token in enumerate(tokens) if token is None]
        if open_:
            sampled = torch.multinomial(target[open_], 1).flatten().tolist()
            for i, token in zip(open_, sampled, strict=True):
                tokens[i] = token
        return [int(t) for t in tokens if t is not None]


def _check_finite(best: Tensor, visits: Sequence[Visit]) -> None:
    good = torch.isfinite(best)
    if not bool(good.all()):
        index = int((~good).nonzero()[0])
        row = visits[index].row
        raise BadRequest(
            f"the model gave {float(best[index])} as its best logit for row {row.number} after {len(row.tokens)} "
            "tokens; logits must be finite. Check the weights and the dtype (fp16 overflows: try bf16 or fp32)"
        )


def verify(
    request: Request, trees: Sequence[Tree], laws: Sequence[dict[int, Tensor]], logits: Tensor, choice: Choice
) -> list[Walk]:
    """Walk all rows of `request.active` at once, level by level; logits `[row, 1 + node, vocabulary]`, the root first.

    Tokens are committed to the request as they are chosen, so a row stops where plain generation would.
    """
    walks = [Walk() for _ in trees]
    if isinstance(choice, Greedy) and not request.processors and not request.keep_scores and not request.keep_logits:
        best, tokens = logits.max(-1)
        table, finite = tokens.tolist(), bool(torch.isfinite(best).all())
    else:
        table, finite = None, False
    at, waiting = dict.fromkeys(range(len(trees)), ROOT), {}
    while at or waiting:
        waited = not at
        if waited:
            at, waiting = waiting, at
        visits = [Visit(request.active[r], trees[r], node, laws[r].get(node)) for r, node in at.items()]
        if table is not None and finite:
            chosen = [table[r][node + 1] for r, node in at.items()]
        else:
            seen = logits[list(at), [node + 1 for node in at.values()]]
            _check_finite(seen.amax(-1), visits)
            if not waited and any(late := choice.postponed(visits, seen)):
                for (r, node), stays in zip(list(at.items()), late, strict=True):
                    if stays:
                        waiting[r] = node
                        del at[r]
                continue
            chosen = choice.choose(visits, request.process([v.row for v in visits], seen), seen)
        request.commit([v.row for v in visits], chosen)
        further = {}
        for (r, node), token in zip(at.items(), chosen, strict=True):
            walks[r].committed.append(token)
            child = trees[r].child_with(node, token)
            if child is not None:
                walks[r].path.append(child)
                if not request.active[r].done:
                    further[r] = child
        at = further
    return walks
