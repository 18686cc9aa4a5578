"""What is said of texts and of likelihoods: pure functions of token ids, with standard errors.

Shapes: N rows, L positions, V tokens, T tokens of a text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Set
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from dsl.noise import Draws, Stream
from dsl.vocabulary import Vocabulary

WORD = re.compile(r"[^\W\d_]+")  # a maximal run of letters
NGRAMS = (1, 2, 3)  # of which the different ones are counted
REPEATED = 4  # tokens that make a repetition
TORN = "\N{REPLACEMENT CHARACTER}"


class Score(NamedTuple):
    """A figure and its standard error as an estimate for all text like the rows it is of.

    The value is NaN where there is nothing to measure, the error where there is a single row.
    """

    value: float
    stderr: float


def ratio(parts_N: np.ndarray, wholes_N: np.ndarray) -> Score:
    """``sum(parts) / sum(wholes)`` over rows, which are drawn together; linearised error."""
    parts_N, wholes_N = np.asarray(parts_N, float), np.asarray(wholes_N, float)
    rows, whole = len(wholes_N), wholes_N.sum()
    if not whole:
        return Score(math.nan, math.nan)
    value = float(parts_N.sum() / whole)
    if rows < 2:
        return Score(value, math.nan)
    rest = float(((parts_N - value * wholes_N) ** 2).sum())
    return Score(value, math.sqrt(rest * rows / (rows - 1)) / float(whole))


def mean(values_N: np.ndarray) -> Score:
    """The mean over rows."""
    return ratio(values_N, np.ones(len(values_N)))


@dataclass(frozen=True)
class Unigram:
    """Tokens independent of each other: what a model must beat. ``p_V`` sums to 1."""

    p_V: np.ndarray

    @classmethod
    def of(cls, tokens_T: np.ndarray, size: int) -> Unigram:
        """The frequencies of a text, one added to every count so that no token is impossible."""
        counts_V = np.bincount(tokens_T, minlength=size) + 1.0
        return cls(counts_V / counts_V.sum())

    def nats(self, tokens_NL: np.ndarray) -> np.ndarray:
        """``-log p`` per token of each row, ``[N]``."""
        return -np.log(self.p_V)[tokens_NL].mean(1)

    def draw(self, rows: int, length: int, seed: int) -> np.ndarray:
        """``[N, L]``, keyed by (seed, row)."""
        uniform_NL = Draws(seed, 0, 0).uniform(rows, length, Stream.TOKEN).numpy()
        cdf_V = self.p_V.cumsum()
        return np.searchsorted(cdf_V, uniform_NL * cdf_V[-1], side="right")


def words(tokens_T: np.ndarray, vocabulary: Vocabulary) -> Iterator[str]:
    """The words of a stretch of text: maximal runs of letters, case-folded.

    A word that touches an end of the stretch may have been cut there and is left out; the ends of
    documents inside it cut nothing.
    """
    documents = _documents(tokens_T, vocabulary)
    for number, document_T in enumerate(documents):
        text = vocabulary.decode(document_T.tolist()).strip(TORN)
        for match in WORD.finditer(text):
            first = number == 0 and match.start() == 0
            last = number == len(documents) - 1 and match.end() == len(text)
            if not (first or last):
                yield match[0].casefold()


def word_counts(
    rows_NL: np.ndarray, vocabulary: Vocabulary, known: Set[str]
) -> tuple[np.ndarray, np.ndarray]:
    """How many of each row's words are among the known, and how many there are; both ``[N]``."""
    found = [[word in known for word in words(row_L, vocabulary)] for row_L in rows_NL]
    return np.array([sum(row) for row in found]), np.array([len(row) for row in found])


def numbered(rows_NL: np.ndarray, n: int) -> np.ndarray:
    """The n-grams within rows as numbers from 0 on, in the order of their ids, ``[N, L - n + 1]``:
    equal where the n-grams are."""
    numbers, size = np.zeros(rows_NL.shape, np.int64), 1 + int(rows_NL.max())
    for place in range(n):  # each time from 0 on, as ids of several tokens would outgrow 64 bits
        ahead = rows_NL[:, place:]
        longer = numbers[:, : ahead.shape[1]] * size + ahead
        numbers = np.unique(longer, return_inverse=True)[1].reshape(longer.shape)
    return numbers


def distinct(rows_NL: np.ndarray, n: int) -> float:
    """Different n-grams of tokens as a share of all of them; NaN where rows are shorter."""
    if rows_NL.shape[1] < n:
        return math.nan
    numbers = numbered(rows_NL, n)
    return (int(numbers.max()) + 1) / numbers.size


def entropies(rows_NL: np.ndarray) -> np.ndarray:
    """Entropy in nats of the tokens of each row, by their frequencies in it, in [0, log L]."""

    def of(row_L: np.ndarray) -> float:
        p = np.unique(row_L, return_counts=True)[1] / len(row_L)
        return float(-(p * np.log(p)).sum())

    return np.array([of(row_L) for row_L in rows_NL])


def repetitions(rows_NL: np.ndarray, n: int = REPEATED) -> np.ndarray:
    """The share of each row's n-grams that it had before, in [0, 1); NaN where rows are shorter."""
    if rows_NL.shape[1] < n:
        return np.full(len(rows_NL), math.nan)
    return np.array([1 - len(np.unique(row_G)) / len(row_G) for row_G in numbered(rows_NL, n)])


def text_bytes(rows_NL: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """UTF-8 bytes that each row stands for, ``[N]``; end marks hold none."""
    return np.array([len(vocabulary.bytes_of(row_L)) for row_L in rows_NL.tolist()])


def _documents(tokens_T: np.ndarray, vocabulary: Vocabulary) -> list[np.ndarray]:
    """The stretches between marks of beginning and end, without the empty ones."""
    marks = np.flatnonzero(np.isin(tokens_T, (vocabulary.bos, vocabulary.eos)))
    edges = [-1, *marks.tolist(), len(tokens_T)]
    return [tokens_T[a + 1 : b] for a, b in pairwise(edges) if b > a + 1]
