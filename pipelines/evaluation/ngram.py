"""An interpolated n-gram model of the training tokens: a judge that is no network of ours.

Shapes: N texts, L positions, B rows, V tokens, G distinct n-grams of one order, H their contexts.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

ORDER = 6  # tokens of the longest n-grams, where the vocabulary allows it
COLDEST = 0.05  # below it, tempered probabilities need not be numbers of 64 bits


class Order(NamedTuple):
    """What the text says of n-grams of one order: ids of several tokens are digits of one number.

    `gram_G` and `context_H` are sorted, so the n-grams of a context lie side by side from `first_H`
    on. A context was followed by `total_H` tokens, of `types_H` different kinds.
    """

    gram_G: np.ndarray
    count_G: np.ndarray
    context_H: np.ndarray
    first_H: np.ndarray
    total_H: np.ndarray
    types_H: np.ndarray


class Chances(NamedTuple):
    """How the tokens of one order are drawn: a context draws one of its own with probability
    `own_H`, and leaves it to the shorter context otherwise. `until_G` is the running sum of the
    probabilities of its own tokens over all n-grams."""

    own_H: np.ndarray
    until_G: np.ndarray


class NGram:
    """Witten-Bell interpolation of the orders 1 to n, and below them each of V tokens alike:

    ``p(w | h) = (count(h w) + types(h) p(w | h')) / (total(h) + types(h))`` with h' the context h
    less its first token; a context that was never seen leaves the word to h'. Every token has a
    positive probability and they sum to 1. (Witten and Bell 1991; Chen and Goodman 1999, eq. 15.)
    """

    def __init__(self, tokens_NL: np.ndarray, vocabulary: int, order: int) -> None:
        """Count the n-grams within rows, up to `order` tokens long.

        Raises ValueError for an order below 1, no tokens, ids outside [0, `vocabulary`), and where
        `vocabulary ** order` does not fit into 63 bits.
        """
        if order < 1 or vocabulary**order >= 2**63:
            raise ValueError(f"order {order} is not in [1, {most_order(vocabulary)}]")
        if not tokens_NL.size:
            raise ValueError("an n-gram model needs at least one token")
        if not 0 <= tokens_NL.min() <= tokens_NL.max() < vocabulary:
            raise ValueError(f"a token id lies outside [0, {vocabulary})")
        self.vocabulary = vocabulary
        longest = min(order, tokens_NL.shape[1])
        self.orders = [self._counted(tokens_NL, n) for n in range(1, longest + 1)]

    def nats(self, tokens_NL: np.ndarray) -> np.ndarray:
        """``-log p`` of every token given those before it in its row, ``[N, L]`` float64."""
        p_NL = np.full(tokens_NL.shape, 1 / self.vocabulary)
        for n, order in enumerate(self.orders, 1):
            if n > tokens_NL.shape[1]:
                break
            gram = self._grams(tokens_NL, n)
            context = gram // self.vocabulary
            count = _looked_up(order.gram_G, order.count_G, gram)
            total = _looked_up(order.context_H, order.total_H, context)
            types = _looked_up(order.context_H, order.types_H, context)
            below = p_NL[:, n - 1 :]
            seen = total > 0
            mixed = (count + types * below) / np.where(seen, total + types, 1)
            p_NL[:, n - 1 :] = np.where(seen, mixed, below)
        return -np.log(p_NL)

    def draw(self, rows: int, length: int, seed: int, temperature: float = 1.0) -> np.ndarray:
        """Texts ``[rows, length]`` of the model itself, int64.

        Each token is drawn with probability ``p(w | h)^(1/T) / sum_v p(v | h)^(1/T)``: the
        temperature T sharpens the interpolated law of the next token. Exact up to rounding.
        Raises ValueError for a temperature below 0.05.
        """
        if not temperature >= COLDEST:
            raise ValueError(f"temperature must be at least {COLDEST}, got {temperature}")
        generator, chances = np.random.default_rng(seed), self._chances(1 / temperature)
        texts_BL = np.zeros((rows, length), np.int64)
        for place in range(length):
            texts_BL[:, place] = generator.integers(self.vocabulary, size=rows)
            open_B = np.ones(rows, bool)
            for n in range(min(len(self.orders), place + 1), 0, -1):
                order, (own_H, until_G) = self.orders[n - 1], chances[n - 1]
                context_B = self._joined(texts_BL[:, place - n + 1 : place])
                at_B = _place(order.context_H, context_B)
                seen_B = order.context_H[at_B] == context_B
                taken_B = open_B & seen_B & (generator.random(rows) < own_H[at_B])
                first_B = order.first_H[at_B]
                last_B = first_B + order.types_H[at_B] - 1
                high_B = until_G[last_B]
                low_B = high_B - own_H[at_B]
                sum_B = low_B + generator.random(rows) * (high_B - low_B)
                gram_B = np.searchsorted(until_G, sum_B, "right").clip(first_B, last_B)
                token_B = order.gram_G[gram_B] % self.vocabulary
                texts_BL[:, place] = np.where(taken_B, token_B, texts_BL[:, place])
                open_B &= ~taken_B
        return texts_BL

    def _chances(self, power: float) -> list[Chances]:
        """How to draw from ``p(w | h)^power``, by order.

        The interpolation ``p = a + b p'`` of a context's own part a and the shorter context's p'
        becomes ``p^power = [(a + b p')^power - (b p')^power] + b^power p'^power``. The bracket is
        not negative, and 0 for tokens that the context never had: again an own part and a share of
        the shorter context's law.
        """
        found = []
        p_G, sum_H = np.array([1 / self.vocabulary]), np.array([self.vocabulary ** (1 - power)])
        shorter: Order | None = None
        for n, order in enumerate(self.orders, 1):
            within_G = np.zeros(len(order.gram_G), np.int64)
            within_H = np.zeros(len(order.context_H), np.int64)
            if shorter:  # where the n-grams and contexts without their first token stand there
                within_G = _place(shorter.gram_G, order.gram_G % self.vocabulary ** (n - 1))
                within_H = _place(shorter.context_H, order.context_H % self.vocabulary ** (n - 2))
            context_G = np.repeat(np.arange(len(order.context_H)), order.types_H)
            weight_H = order.total_H + order.types_H
            share_H = order.types_H / weight_H
            lower_G = share_H[context_G] * p_G[within_G]
            p_G = order.count_G / weight_H[context_G] + lower_G
            own_G = p_G**power - lower_G**power
            own_H = np.add.reduceat(own_G, order.first_H)
            sum_H = own_H + share_H**power * sum_H[within_H]
            found.append(Chances(own_H / sum_H, np.cumsum(own_G / sum_H[context_G])))
            shorter = order
        return found

    def _counted(self, tokens_NL: np.ndarray, n: int) -> Order:
        gram_G, count_G = np.unique(self._grams(tokens_NL, n), return_counts=True)
        context_H, first_H, types_H = np.unique(
            gram_G // self.vocabulary, return_index=True, return_counts=True
        )
        return Order(
            gram_G=gram_G,
            count_G=count_G,
            context_H=context_H,
            first_H=first_H,
            total_H=np.add.reduceat(count_G, first_H),
            types_H=types_H,
        )

    def _grams(self, tokens_NL: np.ndarray, n: int) -> np.ndarray:
        """The n-gram that ends at each position from n - 1 on, ``[N, L - n + 1]``."""
        return self._joined(np.lib.stride_tricks.sliding_window_view(tokens_NL, n, axis=1))

    def _joined(self, digits: np.ndarray) -> np.ndarray:
        """Ids along the last dimension as one number."""
        number = np.zeros(digits.shape[:-1], np.int64)
        for digit in np.moveaxis(digits, -1, 0):
            number = number * self.vocabulary + digit
        return number


def default_order(vocabulary: int) -> int:
    """6, or as many as such n-grams can have."""
    return min(ORDER, most_order(vocabulary))


def most_order(vocabulary: int) -> int:
    """The longest n-grams of so many tokens that are numbers of 63 bits; at least 1."""
    order = 1
    while vocabulary ** (order + 1) < 2**63 and order < 62:
        order += 1
    return order


def _place(keys_K: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Where each wanted key stands among the sorted ones, or some place where it does not."""
    return np.minimum(np.searchsorted(keys_K, wanted), len(keys_K) - 1)


def _looked_up(keys_K: np.ndarray, values_K: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The value of each wanted key, 0 for one that is not there."""
    at = _place(keys_K, wanted)
    return np.where(keys_K[at] == wanted, values_K[at], 0)
