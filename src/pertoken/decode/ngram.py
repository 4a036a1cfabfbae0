"""N-gram guesses: what followed the last tokens when they occurred before in the same row, and how far to trust it."""

from __future__ import annotations

from dataclasses import dataclass, field

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
