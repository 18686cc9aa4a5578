"""Copies of training tokens against a search of every stretch by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.evaluation import copies
from pipelines.evaluation.copies import Copies, share_copied

rows = st.integers(1, 9).flatmap(
    lambda length: st.lists(
        st.lists(st.integers(0, 2), min_size=length, max_size=length), min_size=1, max_size=8
    )
)


def by_hand(train: list[list[int]], text: list[int], start: int) -> int:
    def known(stretch: list[int]) -> bool:
        size = len(stretch)
        return any(row[i : i + size] == stretch for row in train for i in range(len(row)))

    sizes = range(1, len(text) - start + 1)
    return max((size for size in sizes if known(text[start : start + size])), default=0)


@given(train=rows, texts=rows, most=st.sampled_from([1, 5, 2**20]))
def test_the_longest_copy_from_every_position(
    train: list[list[int]], texts: list[list[int]], most: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copies, "MOST_SUFFIXES", most)
        found = Copies(np.array(train)).longest(np.array(texts))
    expected = [[by_hand(train, text, start) for start in range(len(text))] for text in texts]
    assert found.tolist() == expected


def test_copied_text_is_flagged_and_fresh_text_is_not() -> None:
    generator = np.random.default_rng(0)
    train = generator.integers(0, 27, (2_000, 64))
    index = Copies(train)
    fresh = index.longest(generator.integers(0, 27, (50, 64)))
    assert fresh.max() < 9
    assert not share_copied(fresh, 32).any()
    assert (share_copied(index.longest(train[:50]), 32) == 1).all()
    half = np.concatenate([train[:50, :40], generator.integers(0, 27, (50, 24))], axis=1)
    assert share_copied(index.longest(half), 32) == pytest.approx(9 / 33, abs=2 / 33)


def test_texts_that_are_too_short_say_nothing() -> None:
    assert math.isnan(share_copied(np.zeros((1, 8)), 32)[0])
    with pytest.raises(ValueError, match="no training tokens"):
        Copies(np.zeros((0, 8), int))
