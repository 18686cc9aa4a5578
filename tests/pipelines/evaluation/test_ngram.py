"""The n-gram model against its definition, one word at a time.

Shapes: N texts, L positions, V tokens.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.evaluation.ngram import NGram, most_order

V = 4
texts = st.integers(1, 7).flatmap(
    lambda length: st.lists(
        st.lists(st.integers(0, V - 1), min_size=length, max_size=length), min_size=1, max_size=6
    )
)


def probability(rows: list[list[int]], word: int, history: list[int]) -> float:
    """Witten-Bell as its formula says."""
    followers = [
        row[i + len(history)]
        for row in rows
        for i in range(len(row) - len(history))
        if row[i : i + len(history)] == history
    ]
    shorter = probability(rows, word, history[1:]) if history else 1 / V
    if not followers:
        return shorter
    types = len(set(followers))
    return (followers.count(word) + types * shorter) / (len(followers) + types)


@given(rows=texts, order=st.integers(1, 4), other=texts)
def test_it_is_the_formula(rows: list[list[int]], order: int, other: list[list[int]]) -> None:
    model = NGram(np.array(rows), V, order)
    longest = min(order, len(rows[0]))
    expected = [
        [
            -math.log(probability(rows, row[i], row[max(i - longest + 1, 0) : i]))
            for i in range(len(row))
        ]
        for row in other
    ]
    np.testing.assert_allclose(model.nats(np.array(other)), expected, rtol=1e-12)


@given(rows=texts, order=st.integers(1, 4), history=st.lists(st.integers(0, V - 1), max_size=3))
def test_probabilities_sum_to_one(rows: list[list[int]], order: int, history: list[int]) -> None:
    asked = np.array([[*history, word] for word in range(V)])
    found = np.exp(-NGram(np.array(rows), V, order).nats(asked)[:, -1])
    assert found.sum() == pytest.approx(1, abs=1e-12)
    assert (found > 0).all()


def test_its_draws_have_its_probabilities() -> None:
    generator = np.random.default_rng(0)
    model = NGram(generator.integers(0, 3, (20, 6)), 3, 3)
    drawn = model.draw(60_000, 3, seed=1)
    found = np.bincount(drawn @ [9, 3, 1], minlength=27) / 60_000
    every = np.stack(np.unravel_index(np.arange(27), (3, 3, 3)), axis=1)
    expected = np.exp(-model.nats(every).sum(1))
    error = np.sqrt(expected * (1 - expected) / 60_000)
    assert (np.abs(found - expected) < 5 * error).all()


def test_more_context_reads_text_better_and_orders_fit_into_a_number() -> None:
    rows = np.array([list(b"the cat sat on the mat and the dog sat on the cat")])
    found = [NGram(rows, 256, order).nats(rows).mean() for order in (1, 2, 4)]
    assert found[0] > found[1] > found[2]
    assert [most_order(tokens) for tokens in (2, 27, 256, 50_257)] == [62, 13, 7, 4]


@pytest.mark.parametrize(
    ("tokens", "order", "said"),
    [
        ([[0, 1]], 0, "order 0"),
        ([[0, 1]], 40, "order 40 is not in"),
        ([[0, V]], 2, "outside"),
        ([[-1, 0]], 2, "outside"),
        ([[]], 2, "at least one token"),
    ],
)
def test_bad_arguments_are_named(tokens: list[list[int]], order: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        NGram(np.array(tokens, np.int64), V, order)
