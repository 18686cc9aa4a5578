"""Curves of quality against diversity, and diversity itself: exact where the law is known.

Shapes: N texts, L positions, T temperatures, R resamples, V tokens.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import dsl
from dsl import paths
from dsl.truncation import Truncated
from pipelines.evaluation.curves import crossing
from pipelines.evaluation.diversity import ngram_entropies, telling, text_entropies
from pipelines.evaluation.gate import Resamples, means, percentiles
from pipelines.evaluation.ngram import NGram

R = 20


def same(values_T: Any) -> np.ndarray:
    """The same values in the texts as they are and in every resample, ``[T, 1 + R]``."""
    return np.repeat(np.atleast_1d(np.asarray(values_T, float))[:, None], 1 + R, 1)


def at(diversity_T: Any, bits_T: Any, target: float) -> float:
    """The bits at a diversity; NaN where it is not reached."""
    found = crossing(same(diversity_T), same(target)[0], 0.95)
    values_R = found.of(same(bits_T))
    assert (values_R == values_R[0]).all() or np.isnan(values_R).all()
    return float(values_R[0])


# --- the diversity of real text on a curve -------------------------------------------------------


@given(
    diversity=st.lists(st.floats(0, 5), min_size=2, max_size=6, unique=True).map(sorted),
    slope=st.floats(-3, 3),
    share=st.floats(0, 1),
)
def test_on_a_straight_line_the_headline_is_exact(
    diversity: list[float], slope: float, share: float
) -> None:
    target = diversity[0] + share * (diversity[-1] - diversity[0])
    assume(diversity[0] <= target <= diversity[-1])
    diversity_T = np.array(diversity)
    bits_T = 2 + slope * diversity_T
    assert at(diversity_T, bits_T, target) == pytest.approx(2 + slope * target, abs=1e-9)
    # A judge on another scale says the same on its own.
    assert at(diversity_T, 5 * bits_T - 1, target) == pytest.approx(
        9 + 5 * slope * target, abs=1e-9
    )


def test_between_two_temperatures_it_is_the_line_through_both() -> None:
    assert at([1.0, 2.0, 4.0], [7.0, 3.0, 5.0], 2.5) == pytest.approx(3.5)
    assert at([1.0, 2.0, 4.0], [7.0, 3.0, 5.0], 1.25) == pytest.approx(6.0)


@pytest.mark.parametrize("number", range(3))
def test_a_temperature_with_the_very_diversity_is_taken_as_it_is(number: int) -> None:
    diversity, bits = [1.0, 2.0, 4.0], [7.0, 3.0, 5.0]
    assert at(diversity, bits, diversity[number]) == bits[number]
    assert at(diversity[number], bits[number], diversity[number]) == bits[number]


@pytest.mark.parametrize(("target", "side"), [(0.5, "more"), (4.5, "less")])
@pytest.mark.parametrize("diversity", [[1.0, 2.0, 4.0], [2.0]])
def test_what_does_not_reach_it_says_on_which_side_it_stays(
    diversity: list[float], target: float, side: str
) -> None:
    found = crossing(same(diversity), same(target)[0], 0.95)
    assert not found.reached
    assert found.lost == R
    assert side in found.said
    assert math.isnan(at(diversity, diversity, target))


def test_of_several_crossings_the_hottest_counts_at_which_diversity_rises() -> None:
    assert at([0.0, 3.0, 1.5, 2.5], [0.0, 30.0, 1.0, 2.0], 2.0) == pytest.approx(1.5)
    assert at([1.0, 3.0, 1.0], [10.0, 20.0, 30.0], 2.0) == pytest.approx(15.0)
    # The coldest texts have fallen apart: they come nearer to the target, from the other side.
    assert at([2.1, 1.9, 1.0, 3.0], [90.0, 80.0, 10.0, 20.0], 2.0) == pytest.approx(15.0)


def test_where_heat_only_makes_texts_less_diverse_nothing_is_told() -> None:
    found = crossing(same([3.0, 1.0]), same(2.0)[0], 0.95)
    assert (found.reached, found.lost, found.said) == (False, R, "no, less diverse")
    assert math.isnan(at([3.0, 1.0], [1.0, 2.0], 2.0))


def test_equal_diversities_at_the_target_give_the_cooler_one() -> None:
    assert at([2.0, 2.0], [5.0, 6.0], 2.0) == 5.0


def test_one_temperature_reaches_what_it_cannot_be_told_from() -> None:
    noise_R = np.random.default_rng(0).normal(size=1 + 500)
    for gap, reached in ((0.5, True), (5.0, False)):
        found = crossing((gap + noise_R)[None], np.zeros(501), 0.95)
        assert found.reached is reached
        assert found.said == ("cannot be told apart" if reached else "no, more diverse")
        assert found.lost == (0 if reached else 500)


def test_lost_resamples_are_counted() -> None:
    diversity_TR = np.array([[1.0, 1.0, 1.8, 1.0], [2.0, 2.0, 2.0, 1.4]])
    found = crossing(diversity_TR, np.full(4, 1.5), 0.95)
    assert found.reached
    assert found.lost == 2
    bits_R = found.of(np.array([[1.0] * 4, [3.0] * 4]))
    assert bits_R[:2].tolist() == [2.0, 2.0]
    assert np.isnan(bits_R[2:]).all()


# --- how diverse texts are -----------------------------------------------------------------------

P_VV = np.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]])


def markov(rows: int, length: int, seed: int) -> np.ndarray:
    """Texts of a chain that begins with each token alike."""
    generator = np.random.default_rng(seed)
    texts_NL = np.empty((rows, length), np.int64)
    texts_NL[:, 0] = generator.integers(3, size=rows)
    for place in range(1, length):
        cdf_NV = P_VV[texts_NL[:, place - 1]].cumsum(1)
        texts_NL[:, place] = (generator.random((rows, 1)) > cdf_NV).sum(1)
    return texts_NL


def markov_entropy(length: int) -> float:
    """Of a text of the chain, in nats per token."""
    p_V, total = np.full(3, 1 / 3), math.log(3)
    for _ in range(length - 1):
        total -= p_V @ (P_VV * np.log(P_VV)).sum(1)
        p_V = p_V @ P_VV
    return total / length


def test_ngrams_bound_the_entropy_of_a_known_law_ever_closer() -> None:
    truth, before = markov_entropy(40), math.inf
    for rows in (20, 80, 320, 1280):
        nats_N = np.concatenate([ngram_entropies(markov(rows, 40, s), 3) for s in range(6)])
        error = nats_N.std() / math.sqrt(len(nats_N))
        assert truth - 4 * error < nats_N.mean() < before
        before = nats_N.mean()
    assert before < 1.02 * truth


def test_no_text_is_read_by_a_model_that_has_seen_it() -> None:
    tokens_NL = markov(23, 12, 0)
    found_N = ngram_entropies(tokens_NL, 3)
    for number in (0, 7, 22):
        others = np.arange(23) % 5 != number % 5
        expected = NGram(tokens_NL[others], 3, 6).nats(tokens_NL[number : number + 1]).mean()
        assert found_N[number] == pytest.approx(expected)


def test_texts_that_are_all_alike_are_diverse_by_themselves_alone() -> None:
    """Which is why a small vocabulary takes the entropy of n-grams."""
    tokens_NL = markov(40, 30, 0)
    alike_NL = np.repeat(tokens_NL[:1], 40, 0)
    assert ngram_entropies(alike_NL, 3).mean() < 0.2 * ngram_entropies(tokens_NL, 3).mean()
    assert text_entropies(alike_NL, 3).mean() == pytest.approx(text_entropies(tokens_NL[:1], 3)[0])


@pytest.mark.parametrize(
    ("vocabulary", "length", "kind"),
    [(27, 64, "ngram"), (511, 64, "ngram"), (512, 64, "entropy"), (50257, 1024, "entropy")],
)
def test_the_diversity_goes_by_tokens_for_each_position(
    vocabulary: int, length: int, kind: str
) -> None:
    assert telling(vocabulary, length) == kind


# --- the interval --------------------------------------------------------------------------------


def test_the_interval_covers_the_headline_of_a_known_law_as_often_as_it_says() -> None:
    """Two temperatures whose texts have mean diversity 1 and 2, bits 2 and 4 on average, and real
    text of mean diversity 1.4: the headline is 2.8."""
    covered, runs, rows = 0, 300, 100
    for seed in range(runs):
        generator, draws = np.random.default_rng(seed), Resamples(seed, 200)
        # Diverse texts are hard for the judge: both figures of a text go together.
        hard_TN = generator.normal(scale=0.5, size=(2, rows))
        taken = draws.rows(rows)
        diversity_TR = np.stack([means(m + n, taken) for m, n in zip((1, 2), hard_TN, strict=True)])
        bits_TR = np.stack([means(m + 2 * n, taken) for m, n in zip((2, 4), hard_TN, strict=True)])
        real_R = means(generator.normal(1.4, 0.5, size=rows), taken)
        values_R = crossing(diversity_TR, real_R, 0.9).of(bits_TR)[1:]
        low, high = np.quantile(values_R, (0.05, 0.95))
        covered += low <= 2.8 <= high
    # Four standard errors of a share of 0.9, and what percentiles of 100 rows fall short by.
    assert 0.9 - 0.07 - 0.02 < covered / runs < 0.9 + 0.07


def test_texts_of_the_exact_posterior_are_as_good_as_real_ones_at_their_diversity() -> None:
    """Real text and judge are the chain itself; one sampler of it is exact, and one is not: it
    draws all tokens of a text at once."""
    length, rows, temperatures = 12, 400, (0.2, 0.6, 0.9, 1.2)
    table_VD, start_V = torch.eye(3).double(), torch.full((3,), 1 / 3).double()
    law = dsl.ChainDenoiser(table_VD, start_V, torch.from_numpy(P_VV))
    draws = Resamples(0, 200)
    taken = draws.rows(rows)

    def figures(tokens_NL: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        bits_N = -law.log_prob(torch.from_numpy(tokens_NL)).numpy() / math.log(2) / length
        return means(ngram_entropies(tokens_NL, 3), taken), means(bits_N, taken)

    def headline(budget: int) -> np.ndarray:
        of_T = []
        for temperature in temperatures:
            texts = dsl.sample(
                Truncated(law, temperature),
                paths.Order("left_to_right"),
                dsl.State.masked(rows, length, 3),
                budget=budget,
                seed=1,
            )
            of_T.append(figures(texts.tokens_BL.numpy()))
        diversity_TR, bits_TR = (np.stack(values) for values in zip(*of_T, strict=True))
        return crossing(diversity_TR, real_R, 0.95).of(bits_TR)

    real_R, real_bits_R = figures(markov(rows, length, 7))
    exact_R, at_once_R = headline(length), headline(1)
    low, high = percentiles(exact_R[1:] - real_bits_R[1:], 0.999)
    assert low < 0 < high
    assert (high - low) < 0.25
    assert percentiles(at_once_R[1:] - real_bits_R[1:], 0.999)[0] > high
