"""The code corpus: the Python source that ships with CPython, split by file.

Nothing is downloaded: the interpreter's own standard library is the text. A committed list (`heldout.txt`) names the
files that no model may ever be trained on. Machine-made tables (character maps, documentation topics) are left out:
they are data, not code.
"""

from __future__ import annotations

import sysconfig
from functools import cache
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

HELDOUT_LIST = Path(__file__).with_name("heldout.txt")
END_OF_TEXT = "<|endoftext|>"
BYTES = 257  # a vocabulary of the end of text and single bytes
TABLES = ("encodings/", "pydoc_data/", "test/cjkencodings", "lib2to3/tests/data", "ensurepip/_bundled", "turtledemo/")
OUTSIDE = ("site-packages/", "dist-packages/")
CODE_SPLIT = r"\n[ ]*| ?[A-Za-z_]+| ?\d| ?[^\sA-Za-z_\d]+|[ \t\r\f\v]+"


def standard_library() -> Path:
    """Directory of the running interpreter's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def source_files(root: Path | None = None) -> dict[str, Path]:
    """Every usable `*.py` under `root`, keyed by its POSIX path relative to it, in sorted order."""
    root = root or standard_library()
    found = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if not name.startswith((*TABLES, *OUTSIDE)) and "__pycache__" not in name:
            found[name] = path
    if not found:
        raise FileNotFoundError(f"no Python source under {root}; give the directory of a standard library")
    return found


@cache
def heldout_names() -> frozenset[str]:
    """Names (relative to the standard library) of the files that are never trained on."""
    return frozenset(HELDOUT_LIST.read_text().split())


def read_source(path: Path) -> str | None:
    """The text of one file, or None if it is empty or not UTF-8 (a few test fixtures are not)."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None
    return text.replace("\r\n", "\n") if text.strip() and "\x00" not in text else None


def split_texts(split: str, root: Path | None = None) -> dict[str, str]:
    """Texts of `split` ("train" or "heldout"), keyed by file name."""
    if split not in ("train", "heldout"):
        raise ValueError(f"split {split!r} is unknown; choose 'train' or 'heldout'")
    wanted = split == "heldout"
    texts = {}
    for name, path in source_files(root).items():
        if (name in heldout_names()) == wanted and (text := read_source(path)) is not None:
            texts[name] = text
    return texts


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE whose pre-tokens are words, single digits, operator runs, and a newline with its indentation."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CODE_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def token_stream(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """All texts as one `uint16` stream, each followed by the end-of-text id."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    tokenizer.no_padding()  # a transformers tokenizer that has padded once leaves its backend padding
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    return np.concatenate([np.array([*e.ids, end], dtype=np.uint16) for e in encoded])


def windows(stream: np.ndarray, length: int, epoch: int, seed: int) -> np.ndarray:
    """`[count, length + 1]` non-overlapping windows of the stream in a random order fixed by `seed` and `epoch`."""
    rng = np.random.default_rng((seed, epoch))
    offset = int(rng.integers(length))
    count = (len(stream) - offset - 1) // length
    starts = offset + rng.permutation(count) * length
    return stream[starts[:, None] + np.arange(length + 1)]
