"""N-grams: guesses at what follows, from where the last tokens occurred before in the same row, and how far to trust
them; and a small causal model of counts, which scores what others guess."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from pertoken.core.errors import BadRequest

PRIOR_WEIGHT = 4.0


def prior(length: int) -> float:
    """Share of guesses expected to be right after a match of this length, before any was seen."""
    return min(0.2 + 0.12 * length, 0.9)


@dataclass
class NGramIndex:
    """Continuations of every n-gram of `shortest..longest` tokens of one row; the most recent occurrence counts."""

    shortest: int = 2
    longest: int = 6
    follows: dict[tuple[int, ...], int] = field(default_factory=dict)
    read: int = 0

    def extend(self, tokens: list[int]) -> None:
        """Index the tokens that were added to the row since the last call."""
        for end in range(max(self.read, 1), len(tokens)):
            following = tokens[end]
            for length in range(self.shortest, min(self.longest, end) + 1):
                self.follows[tuple(tokens[end - length : end])] = following
        self.read = len(tokens)

    def guess(self, suffix: tuple[int, ...]) -> tuple[int, int] | None:
        """(token, match length) after this suffix, by its longest known ending; None if none is known."""
        for length in range(min(self.longest, len(suffix)), self.shortest - 1, -1):
            token = self.follows.get(suffix[len(suffix) - length :])
            if token is not None:
                return token, length
        return None


@dataclass
class Trust:
    """Running estimate, per match length, of how often an n-gram guess at a reached place is accepted."""

    decay: float = 0.95
    hits: dict[int, float] = field(default_factory=dict)
    tries: dict[int, float] = field(default_factory=dict)

    def rate(self, length: int) -> float:
        hits, tries = self.hits.get(length, 0.0), self.tries.get(length, 0.0)
        return (hits + PRIOR_WEIGHT * prior(length)) / (tries + PRIOR_WEIGHT)

    def observe(self, length: int, accepted: bool) -> None:
        self.hits[length] = self.decay * self.hits.get(length, 0.0) + accepted
        self.tries[length] = self.decay * self.tries.get(length, 0.0) + 1.0


class NGramCounts:
    """A causal n-gram model that grows with its text, smoothed after Witten and Bell.

        p(w | h) = ( c(h w) + t(h) p(w | h') ) / ( c(h) + t(h) ),     h' = h without its first token,

    c a count, t(h) how many different tokens have followed h; behind the empty history comes the `base`, another such
    model (a fitted one under a row's own text), or all of the vocabulary alike.
    """

    def __init__(self, order: int, vocabulary: int, base: NGramCounts | None = None):
        if order < 1 or vocabulary < 1:
            raise BadRequest(f"order={order}, vocabulary={vocabulary}: both must be at least 1")
        self.order, self.vocabulary, self.base = order, vocabulary, base
        self.follows: dict[tuple[int, ...], dict[int, int]] = {}
        self.totals: dict[tuple[int, ...], int] = {}
        self.read = 0

    @classmethod
    def fitted(cls, texts: Iterable[Sequence[int]], vocabulary: int, order: int = 3) -> NGramCounts:
        """A model of these texts of token ids."""
        found = cls(order, vocabulary)
        for text in texts:
            found.read = 0
            found.extend(text)
        return found

    @property
    def context(self) -> int:
        """How many tokens of a history count."""
        return max(self.order - 1, 0 if self.base is None else self.base.context)

    def extend(self, tokens: Sequence[int]) -> None:
        """Count the tokens that were added to the text since the last call."""
        for end in range(self.read, len(tokens)):
            token = tokens[end]
            for length in range(min(self.order - 1, end) + 1):
                history = tuple(tokens[end - length : end])
                follows = self.follows.setdefault(history, {})
                follows[token] = follows.get(token, 0) + 1
                self.totals[history] = self.totals.get(history, 0) + 1
        self.read = len(tokens)

    def probability(self, history: tuple[int, ...], token: int) -> float:
        """p(token | history), of which the last `context` tokens count."""
        value = 1 / self.vocabulary if self.base is None else self.base.probability(history, token)
        for start in range(len(history), max(len(history) - self.order, -1), -1):
            follows = self.follows.get(history[start:])
            if follows is None:
                break  # a longer history has not been seen either
            kinds = len(follows)
            value = (follows.get(token, 0) + kinds * value) / (self.totals[history[start:]] + kinds)
        return value
