"""Statistics of texts against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsl.vocabulary import Vocabulary
from pipelines.evaluation import metrics
from pipelines.evaluation.metrics import Unigram

CHAR = Vocabulary.char()


def rows(*texts: str) -> np.ndarray:
    """Equally long texts as ids; `|` is the end of a document."""
    return np.array([[CHAR.eos if c == "|" else CHAR.encode([c])[0][0] for c in t] for t in texts])


def test_a_mean_has_the_textbook_standard_error() -> None:
    score = metrics.mean(np.array([1.0, 2.0, 3.0, 6.0]))
    assert score.value == 3.0
    assert score.stderr == pytest.approx(np.std([1, 2, 3, 6], ddof=1) / math.sqrt(4))


def test_a_ratio_weighs_rows_by_what_they_hold() -> None:
    score = metrics.ratio(np.array([1, 3]), np.array([2, 4]))
    assert score.value == pytest.approx(4 / 6)
    # Linearised: the residuals are 1 - 4/3 and 3 - 8/3, over a total of 6.
    assert score.stderr == pytest.approx(math.sqrt((1 / 9 + 1 / 9) * 2) / 6)


def test_the_error_of_a_ratio_is_the_spread_of_its_estimates() -> None:
    draws = np.random.default_rng(0)
    wholes = draws.integers(1, 20, size=(4000, 50))
    parts = draws.binomial(wholes, 0.3)
    scores = [metrics.ratio(*pair) for pair in zip(parts, wholes, strict=True)]
    spread = np.std([score.value for score in scores])
    assert np.mean([score.stderr for score in scores]) == pytest.approx(spread, rel=0.05)


def test_nothing_to_measure_is_not_a_number() -> None:
    assert all(map(math.isnan, metrics.ratio(np.zeros(3), np.zeros(3))))
    assert math.isnan(metrics.mean(np.array([2.0])).stderr)


def test_the_unigram_adds_one_to_every_count() -> None:
    unigram = Unigram.of(np.array([0, 0, 0, 1]), size=4)
    assert unigram.p_V == pytest.approx([4 / 8, 2 / 8, 1 / 8, 1 / 8])
    nats_N = unigram.nats(np.array([[0, 0], [1, 3]]))
    assert nats_N == pytest.approx([math.log(2), (math.log(4) + math.log(8)) / 2])


def test_a_uniform_law_has_the_perplexity_of_its_size() -> None:
    unigram = Unigram.of(np.arange(28), size=28)
    nats = metrics.mean(unigram.nats(rows("abcd", "zz z")))
    assert math.exp(nats.value) == pytest.approx(28)
    assert nats.stderr == pytest.approx(0, abs=1e-12)


def test_unigram_draws_follow_their_law_row_by_row() -> None:
    unigram = Unigram(np.array([0.5, 0.0, 0.3, 0.2]))
    drawn_NL = unigram.draw(500, 40, seed=3)
    share_V = np.bincount(drawn_NL.ravel(), minlength=4) / drawn_NL.size
    assert share_V[1] == 0
    assert share_V == pytest.approx(unigram.p_V, abs=4 * math.sqrt(0.25 / drawn_NL.size))
    assert (unigram.draw(20, 40, seed=3) == drawn_NL[:20]).all()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one two three", ["two"]),
        (" one two three ", ["one", "two", "three"]),
        ("one", []),
        ("ne two|three fo", ["two", "three"]),
        ("|ne two|", []),  # marks at the ends frame the row, which may cut all the same
        ("a||b", []),
        ("x|one|y", ["one"]),
    ],
)
def test_words_that_a_row_may_have_cut_do_not_count(text: str, expected: list[str]) -> None:
    assert list(metrics.words(rows(text)[0], CHAR)) == expected


def test_words_are_runs_of_letters_in_any_case_and_script() -> None:
    text = " Don't re_use x2 STRASSE Straße ÉTÉ naïve "
    bpe = Vocabulary.train_bpe([text], 300)
    expected = ["don", "t", "re", "use", "x", "strasse", "strasse", "été", "naïve"]
    assert list(metrics.words(np.array(bpe.encode([text])[0]), bpe)) == expected


def test_half_a_character_at_the_edge_is_no_end_of_a_word() -> None:
    bpe = Vocabulary.train_bpe(["x"], 257)  # bytes
    ids = np.array(bpe.encode(["été la mer é"])[0])
    assert list(metrics.words(ids[1:-1], bpe)) == ["la", "mer"]


@given(st.text("ab ", max_size=40), st.data())
def test_a_piece_of_a_text_has_no_word_that_the_text_has_not(
    text: str, data: st.DataObject
) -> None:
    low = data.draw(st.integers(0, len(text)))
    high = data.draw(st.integers(low, len(text)))
    piece = np.array(CHAR.encode([text[low:high]])[0], dtype=int)
    assert set(metrics.words(piece, CHAR)) <= set(text.split())


def test_known_words_by_hand() -> None:
    texts_NL = rows(" one two x ", " two one zz", "          |")
    known_N, words_N = metrics.word_counts(texts_NL, CHAR, {"one"})
    assert known_N.tolist() == [1, 1, 0]
    assert words_N.tolist() == [3, 2, 0]  # one two x, two one


def test_distinct_counts_n_grams_within_rows() -> None:
    tokens_NL = np.array([[1, 1, 1, 2], [1, 1, 2, 3]])
    assert metrics.distinct(tokens_NL, 1) == 3 / 8
    assert metrics.distinct(tokens_NL, 2) == 3 / 6  # 11 12 23; 2 1 across rows is none
    assert metrics.distinct(tokens_NL, 4) == 1
    assert math.isnan(metrics.distinct(tokens_NL, 5))


def test_entropy_is_of_each_row_by_itself() -> None:
    found_N = metrics.entropies(np.array([[7, 7, 7, 7], [0, 1, 2, 3], [5, 5, 6, 6]]))
    assert found_N == pytest.approx([0, math.log(4), math.log(2)])


def test_repetition_counts_what_a_row_had_before() -> None:
    tokens_NL = np.array([[1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 1, 2, 3, 1], [4, 4, 4, 4, 4, 4, 4]])
    # 4-grams: 4 different of 4; 1231 2312 3123 1231; 4444 four times.
    assert metrics.repetitions(tokens_NL).tolist() == [0, 1 / 4, 3 / 4]
    assert np.isnan(metrics.repetitions(tokens_NL[:, :3])).all()


def test_bytes_are_those_of_the_text_and_not_of_marks() -> None:
    assert metrics.text_bytes(rows("a b|", "||||"), CHAR).tolist() == [3, 0]
    bpe = Vocabulary.train_bpe(["x"], 257)
    assert metrics.text_bytes(np.array(bpe.encode(["été"])), bpe).tolist() == [5]
