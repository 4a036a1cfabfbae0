"""Spans: what each output token cost, read off the `Commit` decisions of a trace. Data only; nothing is drawn here.

A step of a decoder commits the accepted guesses of a row and then one token of the model's own. That last token is a
correction where a guess stood in its place, and plain where none did: the tree was empty there, or had been used up.

`Trace.about` may lack anything. "rows" gives the text of prompts and outputs in pieces, one per token; "vocabulary", a
mapping of token ids (as strings) to text, names the guesses that never reached an output.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pertoken.core.decision import SOURCES, Commit
from pertoken.core.trace import Trace

CORRECTED, PLAIN, UNKNOWN = "corrected", "plain", "unknown"
MEANING = {
    "model": "accepted guess of the draft",
    "ngram": "accepted guess from earlier text (n-gram)",
    "exit": "accepted guess of the first layers",
    "grammar": "forced by the grammar",
    CORRECTED: "the model's own token in place of a wrong guess",
    PLAIN: "the model's own token, with no guess in its place",
    UNKNOWN: "not recorded",
}
PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n\r"} | {127: 0x2421}
MARKS = str.maketrans({" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍"})


@dataclass(frozen=True)
class Turn:
    """One row in one step (from 1). path: accepted nodes from the root on; parent -1 is the last token before."""

    step: int
    row: int
    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    sources: tuple[str, ...]
    path: tuple[int, ...]
    committed: tuple[int, ...]
    note: dict[str, Any] = field(default_factory=dict)

    @property
    def end(self) -> int:
        """The node where the walk ended, -1 for the root."""
        return self.path[-1] if self.path else -1

    @property
    def exit(self) -> int | None:
        """The layer that drafted, for decoders that draft through their first layers."""
        return self.note.get("exit") if self.tokens else None

    def kinds(self) -> list[str]:
        """What each committed token was."""
        accepted = [self.sources[node] for node in self.path]
        own = CORRECTED if self.end in self.parents else PLAIN
        return accepted + [own] * (len(self.committed) - len(accepted))


@dataclass(frozen=True)
class Span:
    """One output token. text is None where the trace holds ids alone; place counts the tokens of its step from 1."""

    text: str | None
    kind: str
    token: int | None = None
    place: int = 1
    turn: Turn | None = None

    @property
    def label(self) -> str:
        """Its text, or its id in brackets, with control characters made visible."""
        return f"⟨{self.token}⟩" if self.text is None else printable(self.text)


@dataclass(frozen=True)
class Passage:
    """One batch row: the pieces of its prompt (none if the trace has no text) and its output."""

    number: int
    prompt: list[str]
    spans: list[Span]

    @property
    def text(self) -> str:
        return "".join(span.text or "" for span in self.spans)


@dataclass(frozen=True)
class Bar:
    """Steps `first` to `last` summed over rows. accepted: by source; exit and length: means over the steps."""

    first: int
    last: int
    drafted: int
    accepted: Counter[str]
    tokens: int
    exit: float | None = None
    length: float | None = None

    @property
    def name(self) -> str:
        return f"{self.first}" if self.first == self.last else f"{self.first}–{self.last}"


@dataclass(frozen=True)
class Totals:
    """Sums over a trace. layers: the target's layers passed one after the other per token, None if not noted."""

    steps: int
    tokens: int
    drafted: int
    kinds: Counter[str]
    layers: float | None

    @property
    def accepted(self) -> int:
        return sum(self.kinds[source] for source in SOURCES)


def printable(text: str) -> str:
    """The text with control characters other than line ends and tabs replaced by their pictures."""
    return text.translate(PICTURES)


def marked(text: str) -> str:
    """The text on one line with its whitespace visible."""
    return printable(text).translate(MARKS)


def turns(trace: Trace) -> list[Turn]:
    """Every row of every decoding step, in order; empty for a trace of another kind of decision."""
    steps = [step for step in trace.steps if isinstance(step.decision, Commit)]
    found = []
    for number, step in enumerate(steps, 1):
        decision = step.decision
        assert isinstance(decision, Commit)
        for at, row in enumerate(step.rows or range(len(decision.valid))):
            found.append(_turn(number, row, decision, at, step.note))
    return found


def _turn(step: int, row: int, decision: Commit, at: int, note: dict[str, Any]) -> Turn:
    size, count = int(decision.valid[at].sum()), int(decision.count[at])
    accepted = decision.accepted[at, :size].tolist()
    return Turn(
        step,
        row,
        tokens=tuple(decision.tokens[at, :size].tolist()),
        parents=tuple(decision.parents[at, :size].tolist()),
        sources=tuple(SOURCES[source] for source in decision.source[at, :size].tolist()),
        path=tuple(node for node in range(size) if accepted[node]),  # parents come before their children
        committed=tuple(decision.committed[at, :count].tolist()),
        note=note,
    )


def passages(trace: Trace) -> list[Passage]:
    """The rows in order, each with its output as spans. Output beyond what was recorded is there, as unknown."""
    given = trace.about.get("rows") or []
    by_row: dict[int, list[Turn]] = defaultdict(list)
    for turn in turns(trace):
        by_row[turn.row].append(turn)
    found = []
    for number in sorted({*range(len(given)), *by_row}):
        texts = given[number] if number < len(given) else {}
        found.append(Passage(number, texts.get("prompt") or [], _spans(by_row[number], texts.get("output"))))
    return found


def _spans(row_turns: Sequence[Turn], pieces: list[str] | None) -> list[Span]:
    spans, left = [], iter(pieces or [])
    for turn in row_turns:
        for place, (token, kind) in enumerate(zip(turn.committed, turn.kinds(), strict=True), 1):
            spans.append(Span(next(left, None), kind, token, place, turn))
    return spans + [Span(piece, UNKNOWN) for piece in left]


def vocabulary(trace: Trace) -> dict[int, str]:
    """The text of token ids, as far as the trace tells."""
    seen = {
        span.token: span.text
        for passage in passages(trace)
        for span in passage.spans
        if span.token is not None and span.text
    }
    return seen | {int(token): text for token, text in (trace.about.get("vocabulary") or {}).items()}


def bars(trace: Trace, limit: int) -> list[Bar]:
    """One bar per step, or per run of steps of equal length where there are more than `limit`."""
    by_step: dict[int, list[Turn]] = defaultdict(list)
    for turn in turns(trace):
        by_step[turn.step].append(turn)
    width = -(-len(by_step) // limit) or 1
    steps = sorted(by_step)
    return [_bar([by_step[step] for step in steps[at : at + width]]) for at in range(0, len(steps), width)]


def _bar(steps: Sequence[Sequence[Turn]]) -> Bar:
    rows = [turn for step in steps for turn in step]
    return Bar(
        first=rows[0].step,
        last=rows[-1].step,
        drafted=sum(len(turn.tokens) for turn in rows),
        accepted=Counter(turn.sources[node] for turn in rows for node in turn.path),
        tokens=sum(len(turn.committed) for turn in rows),
        exit=_mean(step[0].note.get("exit") for step in steps),
        length=_mean(step[0].note.get("length") for step in steps),
    )


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def totals(trace: Trace) -> Totals:
    """The sums that a caption needs."""
    found = turns(trace)
    tokens = sum(len(turn.committed) for turn in found)
    loads = [turn.note.get("layer_loads") for turn in found]
    known = [load for load in loads if load is not None]
    return Totals(
        steps=len({turn.step for turn in found}),
        tokens=tokens,
        drafted=sum(len(turn.tokens) for turn in found),
        kinds=Counter(kind for turn in found for kind in turn.kinds()),
        layers=sum(known) / tokens if known and len(known) == len(loads) else None,
    )
