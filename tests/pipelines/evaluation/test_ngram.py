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


def every_text(tokens: int, length: int) -> np.ndarray:
    """All texts of so many tokens, ``[tokens ** length, length]``."""
    number = np.arange(tokens**length)
    return np.stack(np.unravel_index(number, (tokens,) * length), axis=1)


def tempered(model: NGram, temperature: float, length: int) -> np.ndarray:
    """The probability of every text whose tokens are drawn from ``p(w | h)^(1/T)``, by number."""
    chance = np.ones(1)
    for place in range(length):
        nats = model.nats(every_text(model.vocabulary, place + 1))[:, place]
        p_HV = np.exp(-nats / temperature).reshape(-1, model.vocabulary)
        p_HV /= p_HV.sum(1, keepdims=True)
        chance = (chance[:, None] * p_HV).ravel()
    return chance


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 2.5])
def test_its_draws_have_the_tempered_probabilities(temperature: float) -> None:
    generator = np.random.default_rng(0)
    model = NGram(generator.integers(0, 3, (20, 6)), 3, 3)
    drawn = model.draw(60_000, 4, seed=1, temperature=temperature)
    found = np.bincount(drawn @ [27, 9, 3, 1], minlength=81) / 60_000
    expected = tempered(model, temperature, 4)
    assert expected.sum() == pytest.approx(1)
    error = np.sqrt(expected * (1 - expected) / 60_000)
    assert (np.abs(found - expected) <= 5 * (error + 1 / 60_000)).all()  # rare ones are counts


@given(rows=texts, order=st.integers(1, 4), temperature=st.floats(0.2, 4))
def test_its_orders_together_are_the_tempered_law(
    rows: list[list[int]], order: int, temperature: float
) -> None:
    """Own parts and shares of shorter contexts, added up without a draw."""
    model = NGram(np.array(rows), V, order)
    chances = model._chances(1 / temperature)
    length = len(chances)
    law = np.full((1, V), 1 / V)
    for n, (counted, (own_H, until_G)) in enumerate(zip(model.orders, chances, strict=True), 1):
        law = np.tile(law, (1 if n == 1 else V, 1))  # by context, the oldest token first
        p_G = np.diff(until_G, prepend=0)
        for at, context in enumerate(counted.context_H):
            grams = slice(counted.first_H[at], counted.first_H[at] + counted.types_H[at])
            own_V = np.bincount(counted.gram_G[grams] % V, p_G[grams], minlength=V)
            assert own_V.sum() == pytest.approx(own_H[at], abs=1e-9)
            law[context] = own_V + (1 - own_H[at]) * law[context]
    nats = model.nats(every_text(V, length))[:, -1]
    expected = np.exp(-nats / temperature).reshape(-1, V)
    np.testing.assert_allclose(law, expected / expected.sum(1, keepdims=True), atol=1e-9)


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


@pytest.mark.parametrize("temperature", [0, -1, 0.01, math.nan])
def test_a_temperature_too_low_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature"):
        NGram(np.array([[0, 1]]), V, 1).draw(1, 1, seed=0, temperature=temperature)
