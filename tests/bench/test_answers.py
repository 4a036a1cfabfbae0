"""Measures of texts against their definitions written as loops."""

from __future__ import annotations

import re
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pertoken.bench.answers import edit_similarity, rouge_l
from pertoken.bench.code_tasks import line_of, rests_of_lines

TEXT = st.text("ab \n(é", max_size=8)


def distance(one: str, other: str) -> int:
    @cache
    def fewest(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        swap = fewest(i - 1, j - 1) + (one[i - 1] != other[j - 1])
        return min(swap, fewest(i - 1, j) + 1, fewest(i, j - 1) + 1)

    return fewest(len(one), len(other))


@given(TEXT, TEXT)
def test_edit_similarity_counts_edits(one, other):
    longest = max(len(one), len(other))
    assert edit_similarity(one, other) == pytest.approx(1 - distance(one, other) / longest if longest else 1.0)
    assert edit_similarity(one, other) == edit_similarity(other, one)


@given(TEXT, TEXT)
def test_rouge_l_is_f1_of_the_longest_common_subsequence(one, other):
    mine, theirs = (re.findall(r"\w+|[^\w\s]", text) for text in (one, other))

    @cache
    def longest(i: int, j: int) -> int:
        if not i or not j:
            return 0
        same = longest(i - 1, j - 1) + (mine[i - 1] == theirs[j - 1])
        return max(same, longest(i - 1, j), longest(i, j - 1))

    common = longest(len(mine), len(theirs))
    recall, precision = common / max(len(theirs), 1), common / max(len(mine), 1)
    wanted = 2 * recall * precision / (recall + precision) if common else float(not mine and not theirs)
    assert rouge_l(one, other) == pytest.approx(wanted)


def test_rests_of_lines_are_what_follows_in_held_out_files():
    from pertoken.zoo import corpus

    found, texts = rests_of_lines(8), "\0".join(corpus.split_texts("heldout").values())
    assert len({one.prompt for one in found}) == 8
    for one in found:
        assert one.prompt + one.original in texts and one.original.strip()
        assert line_of(one.original + "\nmore") == one.original
