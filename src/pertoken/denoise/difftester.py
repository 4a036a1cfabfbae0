"""DiffTester: unit tests of one function are of one shape; what the lines of a batch have in common is committed early.

Source: "DiffTester: Accelerating Unit Test Generation for Diffusion LLMs via Repetitive Pattern", arXiv 2509.24975. At
every second step the text as it stands (decided tokens, and the model's guesses elsewhere) is split into lines, each
parsed alone. Lines with an undecided token are grouped, each with the first cluster with which it shares structure:

    template(a, b): same kind -> children in parallel up to the first pair of different kinds or an error
                    protected kind (literals, comments), or names of different text -> a gap: aligned, not shared
    approved: undecided tokens, not blank, of which every byte lies in a shared leaf or is blank

Approved positions with weight w >= `threshold` are committed besides those of the `base` rule, by default the paper's,
Dream's sampler; each row commits its own guess, so that literals stay as diverse as they were. With confidences c_i
(after temperature) over the undecided places of the row's block, w_i = exp(c_i / share) / sum_j exp(c_j / share), as
the paper has it, or w_i = c_i (share=None). A share is small while many places are undecided: with the paper's 0.2 and
0.02 nothing can pass while 50 are as confident as it, and at the end nearly everything does.

What differs from the released code, where that contradicts itself: a gap stays aligned when a third line joins (there
it ends the comparison); a template that shares no leaf is none (there two expression statements suffice, and a cluster
wears down to nothing); a cluster keeps its place in the order when a line joins it (there it moves behind all others);
integers of Java and all kinds of names are told apart as such; offsets are bytes, lines do not run over from row to
row, and text need not be inside a code fence, but is limited to one where there is one. Text ends at the first special
token. String contents are not protected unless `protected` says so (`LITERALS | STRING_TEXT`).

Rows work together: a row depends on the rows of its group (those of the same prompt, or of the same number in
`groups`), never on other groups. The paper has one block over the whole canvas (`Denoise(block=None)`); with shorter
blocks only lines up to the end of the row's block are compared. It loses where rows have nothing in common, where a
batch has one short row, and where a threshold on confidence alone already commits the structure.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from pertoken.core.card import Paper, method
from pertoken.core.errors import BadRequest
from pertoken.denoise.canvas import Canvas
from pertoken.denoise.lines import Text
from pertoken.denoise.pieces import Pieces
from pertoken.denoise.rules import CommitRule, Guess
from pertoken.denoise.schedule import Schedule
from pertoken.denoise.syntax import ERROR, LITERALS, Node, Parser, parser_for

if TYPE_CHECKING:
    from pertoken.denoise.settings import Settings


@dataclass
class PatternStats:
    """Counts of the last call. steps: at which lines were compared; approved, added: places on shared structure, and
    those of them committed besides the base's; seconds: wall clock of the comparison."""

    steps: int = 0
    approved: int = 0
    added: int = 0
    seconds: float = 0.0


@method(
    question="denoise",
    shape="decoder",
    exactness="approximate",
    paper=Paper(
        "DiffTester: Accelerating Unit Test Generation for Diffusion LLMs via Repetitive Pattern", "2509.24975"
    ),
    reads={"logits", "text", "noise"},
    writes={"commit"},
    needs={"diffusion", "tokenizer"},
    baselines=("schedule", "threshold", "random_commit"),
)
@dataclass(frozen=True)
class DiffTester(CommitRule):
    """Commit the structure that tests of one function share, besides what another rule commits.

    tokenizer: the model's; base: the other rule; threshold, share: the least weight, and the temperature of shares
    (None: the weight is the confidence); every: steps from one comparison to the next; language: "python", "java" or
    "cpp"; parser: "auto" (tree-sitter if installed), "tree_sitter", "ast", or a function from a line's bytes to its
    `Node`; protected: kinds of nodes that are never shared; templates: "open" compares lines with an undecided token,
    "all" the decided ones too; groups: one number per row of the batch (None: rows of the same prompt).
    """

    tokenizer: Any = None
    base: CommitRule = field(default_factory=lambda: Schedule(alg_temp=0.2, sharpened=True))
    threshold: float = 0.02
    share: float | None = 0.2
    every: int = 2
    language: str = "python"
    parser: Literal["auto", "tree_sitter", "ast"] | Parser = "auto"
    protected: frozenset[str] = LITERALS
    templates: Literal["open", "all"] = "open"
    groups: Sequence[int] | None = None
    stats: PatternStats = field(default_factory=PatternStats, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.every < 1:
            raise BadRequest(f"every={self.every} is too often; give 1 to compare at each step, or more")
        if self.share is not None and self.share <= 0:
            raise BadRequest(f"share={self.share} is no temperature; give one above 0, or None for the confidence")
        if self.templates not in ("open", "all"):
            raise BadRequest(f"templates={self.templates!r} is unknown; choose 'open' or 'all'")

    @property
    def reads_decided(self) -> bool:  # type: ignore[override]
        return self.base.reads_decided

    def fitted(self, settings: Settings) -> DiffTester:
        if self.tokenizer is None:
            raise BadRequest(
                "DiffTester has no tokenizer and cannot read lines; give DiffTester(tokenizer), the one that load(...) "
                "returns with the model"
            )
        Pieces.of(self.tokenizer)
        self._parse()
        if self.groups is not None and len(self.groups) != len(settings.ids):
            raise BadRequest(
                f"groups has {len(self.groups)} numbers for {len(settings.ids)} rows; give one per row of the batch, "
                "or None to group rows of the same prompt"
            )
        self.stats.__init__()  # type: ignore[misc]
        ready = replace(self, base=self.base.fitted(settings))
        object.__setattr__(ready, "stats", self.stats)
        return ready

    def choose(self, guess: Guess, canvas: Canvas) -> Tensor:
        chosen = self.base.choose(guess, canvas) & guess.masked
        return chosen | self.extra(guess, canvas, chosen)

    def extra(self, guess: Guess, canvas: Canvas, chosen: Tensor) -> Tensor:
        """bool `[row, place]`: what is committed besides the places `chosen` by the base."""
        due = canvas.step % self.every == 0
        if not bool(due.any()):
            return torch.zeros_like(chosen)
        sure = guess.masked & ~chosen & (self.weight(guess) >= self.threshold) & due[:, None]
        if not bool(sure.any()):
            return sure
        started = time.perf_counter()
        approved = self._approved(guess, canvas, chosen, due)
        added = approved & sure
        self.stats.steps += 1
        self.stats.approved += int(approved.sum())
        self.stats.added += int(added.sum())
        self.stats.seconds += time.perf_counter() - started
        return added

    def weight(self, guess: Guess) -> Tensor:
        """`[row, place]` float64: the quantity that is compared with `threshold`."""
        if self.share is None:
            return guess.sharpened
        return (guess.sharpened.masked_fill(~guess.masked, -torch.inf) / self.share).softmax(-1)

    def _parse(self) -> Parser:
        return self.parser if callable(self.parser) else parser_for(self.language, self.parser)

    def _approved(self, guess: Guess, canvas: Canvas, chosen: Tensor, due: Tensor) -> Tensor:
        """bool `[row, place]`: undecided places on structure that the lines of the row's group share."""
        places = canvas.block_columns
        tokens = torch.where(canvas.masked.gather(1, places), guess.tokens, canvas.ids.gather(1, places))
        undecided = canvas.masked & ~torch.zeros_like(canvas.masked).scatter_(1, places, chosen)
        shown = canvas.valid & (canvas.columns <= places[:, -1:])
        views = torch.stack([canvas.ids.scatter(1, places, tokens), undecided.long(), shown.long()], 1)
        pieces, groups = Pieces.of(self.tokenizer), defaultdict(list)
        for row, (label, (ids, open_, seen)) in enumerate(zip(self._labels(canvas), views.cpu().numpy(), strict=True)):
            groups[label].append((row, Text.of(pieces, ids, open_, seen, canvas.start, self.language)))
        found = np.zeros(canvas.ids.shape, bool)
        for rows in groups.values():
            self._compare([text for _, text in rows])
            for row, text in rows:
                found[row, text.columns] = text.covered()
        return torch.from_numpy(found).to(places.device).gather(1, places) & due[:, None]

    def _labels(self, canvas: Canvas) -> list[int]:
        if self.groups is not None:
            return [self.groups[number] for number in canvas.numbers]
        prompt, valid = canvas.ids[:, : canvas.start], canvas.valid[:, : canvas.start]
        if not canvas.start:
            return [0] * canvas.rows
        return prompt.masked_fill(~valid, -1).unique(dim=0, return_inverse=True)[1].tolist()

    def _compare(self, texts: list[Text]) -> None:
        """Mark in the texts of a group what their lines share."""
        parse = self._parse()
        lines = [(text, *line) for text in texts for line in text.lines(decided=self.templates == "all")]
        trees = [parse(text.data[start:end]) for text, start, end in lines]
        for (text, line, _), spans in zip(lines, shared(trees, self.protected), strict=True):
            for start, end in spans:
                text.marked[line + start : line + end] = True


def shared(trees: Sequence[Node], protected: frozenset[str] = LITERALS) -> list[list[tuple[int, int]]]:
    """For each line's tree the bytes `[start, end)` that it shares with the other lines of its cluster.

    A line joins the first cluster, in order of their first lines, with which it has a leaf in common.
    """
    clusters: list[tuple[Node, list[int]]] = []
    for number, tree in enumerate(trees):
        for place, (template, members) in enumerate(clusters):
            both = merged(template, tree, protected)
            if both is not None and _any_leaf(both):
                clusters[place] = (both, [*members, number])
                break
        else:
            clusters.append((tree, [number]))
    spans: list[list[tuple[int, int]]] = [[] for _ in trees]
    for template, members in clusters:
        if len(members) > 1:
            for member in members:
                _spans(template, trees[member], spans[member].append)
    return spans


def merged(template: Node, tree: Node, protected: frozenset[str]) -> Node | None:
    """What both have in common, None if they are of different kinds. A node without children or text is a gap."""
    if template.kind != tree.kind or tree.kind == ERROR:
        return None
    kind, text = template.kind, template.text
    if kind in protected or tree.children or (kind.endswith("identifier") and text != tree.text):
        text = b""
    children = []
    if kind not in protected:
        for mine, theirs in zip(template.children, tree.children, strict=False):
            both = merged(mine, theirs, protected)
            if both is None:
                break
            children.append(both)
    return Node(kind, template.start, template.end, tuple(children), text if tree.text else b"")


def _any_leaf(template: Node) -> bool:
    return bool(template.text) or any(map(_any_leaf, template.children))


def _spans(template: Node, tree: Node, found: Callable[[tuple[int, int]], None]) -> None:
    if template.text:
        found((tree.start, tree.end))
    for mine, theirs in zip(template.children, tree.children, strict=False):
        _spans(mine, theirs, found)
