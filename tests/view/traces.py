"""Hand-made traces, and Hypothesis strategies for well-formed ones."""

from random import Random

import torch
from hypothesis import strategies as st

from pertoken.core.decision import SOURCES, Commit
from pertoken.core.trace import Trace

MODEL, NGRAM, EXIT = range(3)


def guess(tokens=(), parents=None, sources=(), path=(), committed=()):
    """One row of one step; without parents the guesses are a chain."""
    tokens = list(tokens)
    parents = list(range(-1, len(tokens) - 1)) if parents is None else list(parents)
    return tokens, parents, list(sources) or [MODEL] * len(tokens), list(path), list(committed)


def commit(*rows) -> Commit:
    """A step of several rows, padded as the decoding loop pads."""
    width, slots = max(len(row[0]) for row in rows), max(len(row[4]) for row in rows)

    def padded(column, size, fill):
        return torch.tensor([row[column] + [fill] * (size - len(row[column])) for row in rows], dtype=torch.long)

    return Commit(
        valid=torch.tensor([[node < len(row[0]) for node in range(width)] for row in rows], dtype=torch.bool),
        tokens=padded(0, width, 0),
        parents=padded(1, width, -1),
        value=torch.zeros(len(rows), width),
        source=padded(2, width, 0),
        accepted=torch.tensor([[node in row[3] for node in range(width)] for row in rows], dtype=torch.bool),
        committed=padded(4, slots, 0),
        count=torch.tensor([len(row[4]) for row in rows]),
    )


def text_of(token: int) -> str:
    return f"<{token}>\n"


def two_rows(**about) -> Trace:
    """Row 1 stops after its second step; row 0 goes on.

    Step 1: row 0 takes model, n-gram and a correction from a tree; row 1 has its first guess refused.
    Step 2: nothing is guessed for row 0; row 1 takes its whole chain and stops on it, without a token of its own.
    Step 3: row 0 takes its whole chain and one token more.
    """
    trace = Trace({"method": "toy"} | about)
    tree = guess([5, 6, 7, 8], [-1, -1, 1, 2], [NGRAM, MODEL, NGRAM, MODEL], path=[1, 2], committed=[6, 7, 9])
    trace.record("decode.step", commit(tree, guess([4, 4], committed=[3])), (0, 1), layer_loads=6, seconds=0.1)
    second = guess([1, 2], sources=[EXIT, EXIT], path=[0, 1], committed=[1, 2])
    trace.record("decode.step", commit(guess(committed=[10]), second), (0, 1), layer_loads=8, exit=2, length=4)
    trace.record("decode.step", commit(guess([11], path=[0], committed=[11, 12])), (0,), layer_loads=6)
    return trace


ROWS = [
    {"prompt": ["def", " f"], "output": [text_of(t) for t in (6, 7, 9, 10, 11, 12)]},
    {"prompt": ["x"], "output": [text_of(t) for t in (3, 1, 2)]},
]
RUN = {
    "name": "toy",
    "label": "toy [bold]",
    "seconds": 2.0,
    "tokens": 9,
    "tokens_per_second": 4.5,
    "steps": 3,
    "flops": 2_500_000_000,
    "peak_bytes": 7_000_000,
    "speedup": 1.5,
    "identical": True,
}
CHARACTERS = "ab <&>\"'[]{}\n\t\x00\x1b\u00e9\u4e2d\U0001f600"


def random_guess(random: Random):
    """A random tree and a random walk in it."""
    size = random.randint(0, 6)
    parents = [random.randint(-1, node - 1) for node in range(size)]
    tokens = [random.randint(0, 30) for _ in range(size)]
    sources = [random.randrange(len(SOURCES)) for _ in range(size)]
    path, at = [], -1
    while (children := [node for node in range(size) if parents[node] == at]) and random.random() < 0.6:
        at = random.choice(children)
        path.append(at)
    own = [] if path and random.random() < 0.3 else [random.randint(0, 30)]
    return guess(tokens, parents, sources, path, [tokens[node] for node in path] + own)


def random_pieces(random: Random, count: int) -> list[str]:
    return ["".join(random.choices(CHARACTERS, k=random.randint(0, 4))) for _ in range(count)]


@st.composite
def traces(draw):
    """A random trace of rows that stop at different steps, with awkward text; about may lack the text."""
    lives = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    random = Random(draw(st.integers(0, 2**32)))
    trace = Trace({"method": "random"})
    counts = [0] * len(lives)
    for step in range(max(lives)):
        rows = tuple(row for row, life in enumerate(lives) if step < life)
        made = [random_guess(random) for _ in rows]
        for row, one in zip(rows, made, strict=True):
            counts[row] += len(one[4])
        trace.record("decode.step", commit(*made), rows)
    if draw(st.booleans()):
        texts = [{"prompt": random_pieces(random, 3), "output": random_pieces(random, count)} for count in counts]
        trace.about["rows"] = texts
    return trace
