"""How diverse texts are: a figure of each text, whose mean is that of all.

Shapes: N texts, L positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

import numpy as np

from pipelines.evaluation.metrics import entropies
from pipelines.evaluation.ngram import NGram, default_order

FOLDS = 5
LEAST = 4 * FOLDS  # texts
TOKENS = 8  # of the vocabulary for each position, from which on the entropy of a text is taken

Kind = Literal["entropy", "ngram"]


class Diversity(NamedTuple):
    """`of`: tokens ``[N, L]`` and the size of their vocabulary to a figure of each text, ``[N]``.
    `title` names it on an axis, `note` says what it is."""

    of: Callable[[np.ndarray, int], np.ndarray]
    title: str
    note: str


def text_entropies(tokens_NL: np.ndarray, vocabulary: int) -> np.ndarray:
    """The entropy in nats of the tokens of each text by their frequencies in it, ``[N]``."""
    return entropies(tokens_NL)


def ngram_entropies(tokens_NL: np.ndarray, vocabulary: int) -> np.ndarray:
    """Nats per token of each text, ``[N]``, for an n-gram model of the texts of the other folds.

    No text is read by a model that has seen it, so in expectation the mean is an upper bound of
    the entropy per token of the law that the texts come from. The bound falls as texts are added,
    so only equally many texts compare. Resamples of these figures leave out how the models vary,
    which counts where there are few texts (`pipelines/evaluation/README.md`).
    """
    fold_N, order = np.arange(len(tokens_NL)) % FOLDS, default_order(vocabulary)
    nats_N = np.empty(len(tokens_NL))
    for fold in range(FOLDS):
        model = NGram(tokens_NL[fold_N != fold], vocabulary, order)
        nats_N[fold_N == fold] = model.nats(tokens_NL[fold_N == fold]).mean(1)
    return nats_N


DIVERSITIES: Mapping[Kind, Diversity] = MappingProxyType(
    {
        "entropy": Diversity(
            text_entropies, "entropy of a text, nats", "the entropy of a text's tokens, in nats"
        ),
        "ngram": Diversity(
            ngram_entropies,
            "entropy by n-grams, nats per token",
            "nats per token for an n-gram model of other texts of the same source, which is an "
            "upper bound of their entropy",
        ),
    }
)


def telling(vocabulary: int, length: int) -> Kind:
    """The diversity that says something of texts of ``length`` tokens.

    A text of a small vocabulary holds nearly all frequent tokens, whatever their order, and its
    entropy is that of single tokens. So the entropy of a text is taken where there are at least 8
    different tokens for each of its positions, and that of n-grams otherwise.
    """
    return "entropy" if vocabulary >= TOKENS * length else "ngram"
