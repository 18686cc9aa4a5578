"""How much of a text stands word for word in the training tokens: exact, over all of them.

Shapes: R training rows, N texts, L positions, T positions of the texts one after another,
P positions of the training tokens, Q asked suffixes.
"""

from __future__ import annotations

import math

import numpy as np

ENDS = -1  # stands after every training row, so that no copy reaches into the next
MOST_SUFFIXES = 2**20  # that are looked up together
AT_ONCE = 4  # tokens of two suffixes that are compared together


class Copies:
    """A suffix array of the training rows, in which the longest copy of any stretch is found.

    Building it takes about ``log2(L)`` sorts of all tokens.
    """

    def __init__(self, tokens_RL: np.ndarray) -> None:
        """tokens_RL: ids of at least 0. Raises ValueError where there are none."""
        if not tokens_RL.size:
            raise ValueError("there are no training tokens to look for copies in")
        rows, self.length = tokens_RL.shape
        ended = np.full((rows, self.length + 1), ENDS, np.int32)
        ended[:, :-1] = tokens_RL
        # Behind the last row, so that every suffix has as many tokens as are ever compared.
        self.tokens_P = np.concatenate([ended.ravel(), np.full(self.length, ENDS, np.int32)])
        self.sorted_P = _suffix_array(ended.ravel(), self.length)

    def longest(self, tokens_NL: np.ndarray) -> np.ndarray:
        """How many tokens of each text from each position on are a copy of training tokens of one
        row, ``[N, L]`` int64."""
        rows, length = tokens_NL.shape
        width = min(length, self.length)
        # Behind each text, so that every suffix has as many tokens as are compared.
        padded = np.full((rows, length + width), ENDS - 1, np.int32)  # equal to no training token
        padded[:, :length] = tokens_NL
        start_NL = np.arange(padded.size).reshape(padded.shape)[:, :length]
        pieces = np.array_split(start_NL.ravel(), math.ceil(start_NL.size / MOST_SUFFIXES))
        found = [self._longest(padded.ravel(), start_Q, width) for start_Q in pieces]
        return np.concatenate(found).reshape(rows, length)

    def _longest(self, texts_T: np.ndarray, start_Q: np.ndarray, width: int) -> np.ndarray:
        """By bisection: a longest copy is next to where the suffix itself would be sorted."""
        low_Q, high_Q = np.zeros(len(start_Q), int), np.full(len(start_Q), len(self.sorted_P))
        best_Q = np.zeros(len(start_Q), int)
        while (low_Q < high_Q).any():
            middle_Q = np.minimum((low_Q + high_Q) // 2, len(self.sorted_P) - 1)
            place_Q = self.sorted_P[middle_Q]
            common_Q, before_Q = self._compare(texts_T, start_Q, place_Q, width)
            best_Q = np.maximum(best_Q, common_Q)
            open_Q = low_Q < high_Q
            high_Q = np.where(open_Q & before_Q, middle_Q, high_Q)
            low_Q = np.where(open_Q & ~before_Q, middle_Q + 1, low_Q)
        return best_Q

    def _compare(
        self, texts_T: np.ndarray, start_Q: np.ndarray, place_Q: np.ndarray, width: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """How many of `width` tokens agree from the first on, and whether the asked suffix sorts
        before."""
        common_Q, before_Q = np.zeros(len(start_Q), int), np.zeros(len(start_Q), bool)
        open_Q = np.arange(len(start_Q))
        # A few tokens at a time: most suffixes differ in the first of them.
        for first in range(0, width, AT_ONCE):
            ahead = np.arange(first, min(first + AT_ONCE, width))
            asked_Q = texts_T[start_Q[open_Q, None] + ahead]
            there_Q = self.tokens_P[place_Q[open_Q, None] + ahead]
            differs_Q = asked_Q != there_Q
            found_Q, at_Q = differs_Q.any(1), differs_Q.argmax(1)[:, None]
            common_Q[open_Q] += np.where(found_Q, at_Q[:, 0], len(ahead))
            before_Q[open_Q] = np.take_along_axis(asked_Q < there_Q, at_Q, 1)[:, 0]
            open_Q = open_Q[~found_Q]
        return common_Q, before_Q


def share_copied(longest_NL: np.ndarray, size: int) -> np.ndarray:
    """Of each text's stretches of `size` tokens, the share that are copies, ``[N]``; NaN for texts
    that are shorter."""
    starts = longest_NL.shape[1] - size + 1
    if starts < 1:
        return np.full(len(longest_NL), np.nan)
    return (longest_NL[:, :starts] >= size).mean(1)


def _suffix_array(tokens_P: np.ndarray, compared: int) -> np.ndarray:
    """The order of all suffixes by their first `compared` tokens or more (prefix doubling)."""
    rank_P = np.unique(tokens_P, return_inverse=True)[1].astype(np.int64)
    reach = 1
    while True:
        # By the first `reach` tokens, then by the `reach` behind them; 0 is behind the end.
        behind_P = np.zeros_like(rank_P)
        behind_P[: max(len(rank_P) - reach, 0)] = rank_P[reach:] + 1
        key_P = rank_P * (len(rank_P) + 1) + behind_P
        order_P = np.argsort(key_P, kind="stable")
        sorted_P = key_P[order_P]
        rank_P = np.empty_like(rank_P)
        rank_P[order_P] = np.concatenate([[0], np.cumsum(sorted_P[1:] != sorted_P[:-1])])
        reach *= 2
        if reach >= compared or rank_P[order_P[-1]] == len(rank_P) - 1:
            return order_P
