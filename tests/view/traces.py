"""Hand-made traces, and Hypothesis strategies for well-formed ones."""

from random import Random

import torch
from hypothesis import strategies as st

from pertoken.core.decision import SOURCES, Commit, Keep
from pertoken.core.trace import Trace
from pertoken.denoise import COMMIT, INSERT, REFRESH

MODEL, NGRAM, EXIT = range(3)
CLS = 1


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


def canvas(prompts, committed, computed=None, tokens=True, **about) -> Trace:
    """A trace of the denoising loop from, per row, its prompt's length and the step of each position (0: never).

    computed: `(row, step, column) -> bool` over prompt and canvas; everything unless given. Rows leave when they are
    done; prompts are padded on the left; the block is a quarter of the canvas.
    """
    widest, length = max(prompts), len(committed[0])
    trace = Trace({"method": "toy"} | about)
    for step in range(1, max(map(max, committed)) + 1):
        rows = tuple(row for row, steps in enumerate(committed) if step <= max(steps))
        valid = torch.tensor([[c >= widest - prompts[row] for c in range(widest + length)] for row in rows])
        work = [
            [computed is None or computed(row, step, c - widest + prompts[row]) for c in range(widest + length)]
            for row in rows
        ]
        chosen = [[False] * widest + [own == step for own in committed[row]] for row in rows]
        note = {"block": [max(i for i, s in enumerate(committed[row]) if s <= step) * 4 // length for row in rows]}
        if tokens:
            note["tokens"] = [[10 + i for i, s in enumerate(committed[row]) if s == step] for row in rows]
        trace.record(REFRESH, Keep(valid, torch.tensor(work) & valid), rows)
        trace.record(COMMIT, Keep(valid, torch.tensor(chosen)), rows, **note)
    return trace


def two_canvases(**about) -> Trace:
    """Row 0: prompt of 3, all committed by step 3. Row 1: prompt of 1, done at step 2, its last position cut off.

    What is decided is not computed again, but for row 0's first position, once.
    """
    committed = [[1, 3, 2, 3], [2, 1, 1, 0]]

    def computed(row, step, column):
        place = column - (3, 1)[row]
        if place < 0:
            return step == 1
        own = committed[row][place]
        return step <= own or (row, place, step) == (0, 0, 3) or (own == 0 and step == 1)

    return canvas([3, 1], committed, computed, **about)


CANVAS_ROWS = [
    {"prompt": ["def", " f", "("], "output": ["a", " <b", "\n", "d"]},
    {"prompt": ["x"], "output": ["&", "y", ""]},
]


GAP = None  # where a token of the text is missing


def insertions(texts, born, **about) -> Trace:
    """A trace of insertions of one token per step and row. texts: the finished tokens, and behind which of them the one
    gap marker stood (-1: CLS); born: the step of each token, 0 for given. A row stops one step after its last."""
    trace = Trace({"method": "ilm"} | about)
    widest = max(len(tokens) for tokens, _ in texts) + 2
    for step in range(1, max(map(max, born)) + 2):
        here = tuple(row for row, steps in enumerate(born) if step <= max(steps) + 1)
        valid, keep = torch.zeros(2, len(here), widest, dtype=torch.bool)
        note = {"tokens": [], "stop": [], "given": [1 + born[row].count(0) for row in here]}
        for at, row in enumerate(here):
            (tokens, gap), steps = texts[row], born[row]
            line = [(CLS, 0)]
            for place, (token, one) in enumerate(zip(tokens, steps, strict=True)):
                line += [(GAP, 0)] * (gap == place - 1) + [(token, one)]
            line += [(GAP, 0)] * (gap == len(tokens) - 1)
            old = [pair for pair in line if pair[1] < step]
            for position, (token, one) in enumerate(old):
                valid[at, position] = token is GAP or one > 0
            for index, pair in enumerate(line):
                if pair[1] == step:
                    keep[at, sum(one < step for _, one in line[:index]) - 1] = True
            note["tokens"].append([token for token, one in line if one == step])
            note["stop"].append(0.97 if step > max(steps) else 0.03)
        trace.record(INSERT, Keep(valid, keep), here, **note)
    return trace


def two_insertions(**about) -> Trace:
    """Row 0: "a", then at steps 2, 1 and 3 "x y z" in its gap, then "b". Row 1: nothing given, "u" inserted at once."""
    return insertions([([21, 31, 32, 33, 22], 0), ([41], -1)], [[0, 2, 1, 3, 0], [1]], **about)


INSERTED_ROWS = [{"prompt": [], "output": ["a", " x", " <y", "\n", "b"]}, {"prompt": [], "output": ["u"]}]


@st.composite
def canvases(draw):
    """A random trace of the loop: ragged prompts, random steps, random work, awkward text or none."""
    random = Random(draw(st.integers(0, 2**32)))
    rows, length = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    prompts = [random.randint(0, 5) for _ in range(rows)]
    committed = []
    for _ in range(rows):
        steps = [random.randint(1, 6) for _ in range(length)]
        names = {step: number for number, step in enumerate(sorted(set(steps)), 1)}
        committed.append([names[step] for step in steps])
    chance = random.random()
    work = {(r, s, c): random.random() < chance for r in range(rows) for s in range(1, 7) for c in range(-5, 17)}
    trace = canvas(prompts, committed, lambda row, step, column: work[row, step, column], tokens=random.random() < 0.5)
    if draw(st.booleans()):
        trace.about["rows"] = [
            {"prompt": random_pieces(random, prompts[row]), "output": random_pieces(random, length)}
            for row in range(rows)
        ]
    return trace, prompts, committed, work
