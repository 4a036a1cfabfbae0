"""The corpus: what is held out stays out, texts become windows without loss, and the n-gram yardstick is a law."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from pertoken.zoo import corpus, model_path
from pertoken.zoo.evaluate import prompts, repeated_four_grams
from pertoken.zoo.ngram_model import NGramModel


@pytest.fixture(scope="module")
def splits():
    return {split: corpus.split_texts(split) for split in ("train", "heldout")}


def test_no_held_out_file_is_ever_trained_on(splits):
    listed = corpus.heldout_names()
    assert len(listed) > 30 and len(corpus.HELDOUT_LIST.read_text().split()) == len(listed), "a name is listed twice"
    assert not listed & splits["train"].keys()
    assert splits["heldout"].keys() <= listed
    assert len(splits["heldout"]) >= len(listed) // 2, "hardly any listed file is in this interpreter's library"
    assert splits["train"].keys() | splits["heldout"].keys() <= corpus.source_files().keys()


def test_no_held_out_text_is_trained_on_under_another_name(splits):
    train = {hash(text) for text in splits["train"].values()}
    copies = [name for name, text in splits["heldout"].items() if hash(text) in train]
    assert not copies


def test_no_prompt_occurs_in_a_training_file(splits):
    everything = "\0".join(splits["train"].values())
    assert len(prompts()) >= 64
    leaked = [prompt[:60] for prompt in prompts() if prompt.strip() in everything]
    assert leaked == []
    held = "\0".join(splits["heldout"].values())
    assert np.mean([prompt in held for prompt in prompts()]) > 0.5, "prompts are not from the held-out files"
    assert prompts(3) == prompts()[:3]


def library(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())


def test_tables_foreign_packages_and_unreadable_files_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "heldout_names", lambda: frozenset({"b.py", "sub/d.py"}))
    library(
        tmp_path,
        {
            "a.py": "x = 1\r\ny = 2\r\n",
            "b.py": "held = True\n",
            "sub/c.py": "c = 3\n",
            "sub/d.py": "d = 4\n",
            "encodings/cp1.py": "table = 0\n",
            "site-packages/other/e.py": "not = ours\n",
            "__pycache__/f.py": "no\n",
            "empty.py": "  \n",
            "latin.py": b"# caf\xe9\n",
            "nul.py": "a\0b\n",
            "notes.txt": "no code\n",
        },
    )
    assert corpus.split_texts("train", tmp_path) == {"a.py": "x = 1\ny = 2\n", "sub/c.py": "c = 3\n"}
    assert corpus.split_texts("heldout", tmp_path) == {"b.py": "held = True\n", "sub/d.py": "d = 4\n"}
    with pytest.raises(ValueError, match=r"'valid'.*'train'.*'heldout'"):
        corpus.split_texts("valid", tmp_path)


def test_a_directory_without_source_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        corpus.source_files(tmp_path)


SAMPLE = "class A:\n    def f(self, x2):\n\n        return x2 ** 10 != 'é'  # tab\there\n\tif 1:\r\n"


def test_the_tokenizer_loses_nothing():
    tokenizer = corpus.train_tokenizer([SAMPLE] * 3, 300)
    assert 257 < tokenizer.get_vocab_size() <= 300
    for text in (SAMPLE, "   \n\n  ", "日本 ☃ 0.5e-3", "\t \t\n  x"):
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    packaged = Tokenizer.from_file(str(model_path("code-target") / "tokenizer.json"))
    assert packaged.decode(packaged.encode(SAMPLE).ids, skip_special_tokens=False) == SAMPLE


def test_a_stream_is_the_texts_each_with_its_end():
    tokenizer = corpus.train_tokenizer([SAMPLE], 280)
    end = tokenizer.token_to_id(corpus.END_OF_TEXT)
    stream = corpus.token_stream(tokenizer, ["a = 1\n", "b\n"])
    expected = [*tokenizer.encode("a = 1\n").ids, end, *tokenizer.encode("b\n").ids, end]
    assert stream.dtype == np.uint16 and stream.tolist() == expected


@settings(derandomize=True, max_examples=60)
@given(st.integers(1, 7), st.integers(20, 120), st.integers(0, 3), st.integers(0, 5))
def test_windows_are_disjoint_pieces_in_an_order_of_their_own(length, size, epoch, seed):
    stream = np.arange(size, dtype=np.uint16)
    windows = corpus.windows(stream, length, epoch, seed)
    assert windows.shape[1] == length + 1
    assert (np.diff(windows.astype(int), axis=1) == 1).all(), "a window is a contiguous piece"
    inputs = windows[:, :-1].flatten()
    assert len(set(inputs.tolist())) == len(inputs) and len(inputs) > size - 2 * length - 1
    assert np.array_equal(windows, corpus.windows(stream, length, epoch, seed))


def test_epochs_differ():
    stream = np.arange(2000, dtype=np.uint16)
    first, second = (corpus.windows(stream, 10, epoch, 3) for epoch in (0, 1))
    assert not np.array_equal(first[:100], second[:100])


# ------------------------------------------------------------------------------------------------ the yardstick


def naive_probability(stream, history, token, order, vocabulary):
    """Witten-Bell, recursively, from lists."""
    if order == 0:
        return 1.0 / vocabulary
    context = tuple(history[len(history) - order + 1 :]) if order > 1 else ()
    after = Counter(
        stream[i + order - 1] for i in range(len(stream) - order + 1) if tuple(stream[i : i + order - 1]) == context
    )
    lower = naive_probability(stream, history, token, order - 1, vocabulary)
    if not after:
        return lower
    return (after[token] + len(after) * lower) / (sum(after.values()) + len(after))


@settings(derandomize=True, max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=8, max_size=30), st.lists(st.integers(0, 5), min_size=2, max_size=2))
def test_the_n_gram_model_is_the_naive_one_and_sums_to_one(tokens, history):
    vocabulary, order = 6, 3
    model = NGramModel(np.array(tokens, dtype=np.uint16), order)
    law = [math.exp(-model.loss(np.array([*history, t], dtype=np.uint16), vocabulary)) for t in range(vocabulary)]
    assert sum(law) == pytest.approx(1.0, rel=1e-9) and min(law) > 0
    assert law == pytest.approx([naive_probability(tokens, history, t, order, vocabulary) for t in range(vocabulary)])


def test_longer_n_grams_beat_single_tokens_on_text_with_order():
    pattern = np.array(list(itertools.islice(itertools.cycle([1, 2, 3, 1, 2, 4]), 600)), dtype=np.uint16)
    losses = [NGramModel(pattern[:400], order).loss(pattern[400:], 6) for order in (1, 2, 3, 4)]
    assert losses[0] > losses[1] + 0.3 and losses[2] < losses[1] and losses[3] < 0.1
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 6, 4000).astype(np.uint16)
    assert NGramModel(noise[:3000], 1).loss(noise[3000:], 6) == pytest.approx(math.log(6), abs=0.02)


def test_a_token_too_large_for_the_keys_is_named():
    with pytest.raises(ValueError, match="4096"):
        NGramModel(np.array([1, 4096, 2], dtype=np.uint16))


@pytest.mark.parametrize(
    ("outputs", "share"),
    [
        ([[1, 2, 3, 4, 5, 6]], 0.0),
        ([[1] * 8], 4 / 5),
        ([[1, 2, 3, 4, 1, 2, 3, 4]], 1 / 5),
        ([[1, 2, 3, 4], [1, 2, 3, 4]], 0.0),
        ([[7] * 5, [1, 2, 3, 4, 5, 6, 7]], 1 / 6),
        ([[1, 2]], 0.0),
        ([], 0.0),
    ],
)
def test_repeated_four_grams_by_hand(outputs, share):
    assert repeated_four_grams(outputs) == pytest.approx(share)


def test_a_tokenizer_that_has_padded_gives_the_same_stream():
    from pertoken.models.load import load

    tokenizer = load("zoo:code-draft")[1]
    texts = ["x = 1\n", "def f(a, b):\n    return a + b\n"]
    before = corpus.token_stream(tokenizer.backend_tokenizer, texts)
    assert tokenizer(texts, padding=True)["input_ids"]
    assert corpus.token_stream(tokenizer.backend_tokenizer, texts).tolist() == before.tolist()
