"""Adversaries: texts of no model, made to fool the figures, as rows of the table of texts.

A figure that prefers one of them to the models says nothing by itself. Four of them (common,
mirrored, periodic, phrases) follow arXiv 2606.08417, where they reach record perplexities at
healthy entropy; how many tokens and phrases they take is a rule of ours.

Shapes: N texts, R training rows, L positions, K tokens, P phrases, W tokens of a phrase.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import NamedTuple

import numpy as np

from pipelines.evaluation import metrics
from pipelines.evaluation.cells import REAL
from pipelines.evaluation.held_out import HeldOut
from pipelines.evaluation.ngram import NGram, default_order
from pipelines.evaluation.parts import matrix, texts
from pipelines.evaluation.question import Question, Questions
from pipelines.evaluation.workspace import Workspace

STREAM = 7  # of random numbers, behind the evaluation's seed
TEMPERATURES = (1.2, 1.0, 0.8, 0.6)  # from more diverse than real text to less
PERCENT = (2, 5, 10)  # of the tokens that are replaced
PHRASES, PHRASE = 1000, 5  # how many phrases, and the tokens of one


@dataclass(frozen=True, kw_only=True)
class Material:
    """What texts are made of: as many rows of other `real` text as are wanted, and training rows of
    `size` different tokens."""

    real_NL: np.ndarray
    training_RL: np.ndarray
    size: int

    @cached_property
    def model(self) -> NGram:
        """An n-gram model of the training rows."""
        return NGram(self.training_RL, self.size, default_order(self.size))

    @cached_property
    def counts_V(self) -> np.ndarray:
        """How often each token stands in the training rows."""
        return np.bincount(self.training_RL.ravel(), minlength=self.size)

    @cached_property
    def common_K(self) -> np.ndarray:
        """The most frequent tokens of the training rows, the first of them first: so many that each
        of them as often as the others has the entropy of a real text, but no more than fit into a
        text twice."""
        healthy = round(math.exp(metrics.entropies(self.real_NL).mean()))
        most = min(healthy, self.real_NL.shape[1] // 2, np.count_nonzero(self.counts_V))
        return np.argsort(-self.counts_V, kind="stable")[: max(most, 1)]


Make = Callable[[Material, np.random.Generator], np.ndarray]  # -> [N, L]


def sampled(temperature: float) -> Make:
    """Drawn from the n-gram model at a temperature."""

    def make(given: Material, generator: np.random.Generator) -> np.ndarray:
        seed = int(generator.integers(2**63))
        return given.model.draw(*given.real_NL.shape, seed=seed, temperature=temperature)

    return make


def shuffled(given: Material, generator: np.random.Generator) -> np.ndarray:
    """The tokens of each real text in random order."""
    return generator.permuted(given.real_NL, axis=1)


def repeated(given: Material, generator: np.random.Generator) -> np.ndarray:
    """One training row over and over."""
    row_L = given.training_RL[generator.integers(len(given.training_RL))]
    return np.tile(row_L, (len(given.real_NL), 1))


def replaced(share: float) -> Make:
    """Real text with this share of all tokens, to the nearest whole number, replaced by other
    tokens, uniformly random. Rows have as many of them as each other, give or take one."""

    def make(given: Material, generator: np.random.Generator) -> np.ndarray:
        real_NL, size = given.real_NL, given.size
        rows, length = real_NL.shape
        wrong_N = np.diff(np.round(share * length * np.arange(rows + 1)))
        rank_NL = generator.random(real_NL.shape).argsort(1).argsort(1)
        ahead_NL = generator.integers(1, size, real_NL.shape)
        return np.where(rank_NL < wrong_N[:, None], (real_NL + ahead_NL) % size, real_NL)

    return make


def common(given: Material, generator: np.random.Generator) -> np.ndarray:
    """The most frequent tokens, each drawn by itself as often as it is in the training rows."""
    counts_K = given.counts_V[given.common_K]
    return generator.choice(given.common_K, given.real_NL.shape, p=counts_K / counts_K.sum())


def mirrored(given: Material, generator: np.random.Generator) -> np.ndarray:
    """The first half of a text like `common`, and a copy of it as the second."""
    made_NL = common(given, generator)
    length = made_NL.shape[1]
    return np.hstack([made_NL[:, : length - length // 2], made_NL[:, : length // 2]])


def periodic(given: Material, generator: np.random.Generator) -> np.ndarray:
    """The most frequent tokens one after the other, and again from the first on."""
    rows, length = given.real_NL.shape
    return np.tile(np.resize(given.common_K, length), (rows, 1))


def phrases(given: Material, generator: np.random.Generator) -> np.ndarray:
    """The most frequent phrases of the training rows, each as likely as the others, in a row."""
    rows, length = given.real_NL.shape
    bank_PW = _bank(given.training_RL, min(PHRASE, length), PHRASES)
    wanted = -(-length // bank_PW.shape[1])
    drawn_N = generator.integers(len(bank_PW), size=(rows, wanted))
    return bank_PW[drawn_N].reshape(rows, -1)[:, :length]


def _bank(training_RL: np.ndarray, width: int, most: int) -> np.ndarray:
    """The most frequent n-grams within rows, ``[P, W]``; of equal ones those of lower ids first."""
    numbers = metrics.numbered(training_RL, width)
    _, first_P, count_P = np.unique(numbers, return_index=True, return_counts=True)
    first_P = first_P[np.argsort(-count_P, kind="stable")[:most]]
    row_P, place_P = np.unravel_index(first_P, numbers.shape)
    return training_RL[row_P[:, None], place_P[:, None] + np.arange(width)]


def copied(given: Material, generator: np.random.Generator) -> np.ndarray:
    """Training rows, none twice where there are enough of them."""
    rows, count = len(given.training_RL), len(given.real_NL)
    order_N = np.concatenate([generator.permutation(rows) for _ in range(-(-count // rows))])
    return given.training_RL[order_N[:count]]


class Family(NamedTuple):
    """Adversaries by name, and one sentence for all of them."""

    said: str
    made: Mapping[str, Make]


def _tempered(temperature: float) -> str:
    return "ngram" if temperature == 1 else f"ngram-{temperature:g}"


FAMILIES = (
    Family(
        "Ngram: drawn from an n-gram model of the training split, at temperature 1 or the one in "
        "the name.",
        {_tempered(temperature): sampled(temperature) for temperature in TEMPERATURES},
    ),
    Family("Shuffled: the tokens of each real text in random order.", {"shuffled": shuffled}),
    Family("Repeated: one training row over and over.", {"repeated": repeated}),
    Family(
        "Replaced: real text with so many percent of its tokens replaced by random ones.",
        {f"replaced-{percent}": replaced(percent / 100) for percent in PERCENT},
    ),
    Family("Common: the most frequent tokens, drawn independently.", {"common": common}),
    Family(
        "Mirrored: such tokens for half a text, and then the same ones again.",
        {"mirrored": mirrored},
    ),
    Family("Periodic: the most frequent tokens in turn, over and over.", {"periodic": periodic}),
    Family(
        f"Phrases: the {PHRASES:,} most frequent phrases of {PHRASE} tokens, in random order.",
        {"phrases": phrases},
    ),
    Family("Copier: rows of the training split.", {"copier": copied}),
)
ADVERSARIES: Mapping[str, Make] = dict(
    chain.from_iterable(family.made.items() for family in FAMILIES)
)


class Adversaries(Question):
    section, settings = "adversaries", bool
    title = "Adversaries"

    def beside(self, config: Questions) -> tuple[str, ...]:
        return tuple(ADVERSARIES) if config.adversaries else ()

    def prepare(self, workspace: Workspace, held_out: HeldOut) -> None:
        config, sources = workspace.config, self.beside(workspace.config)
        if not sources:
            return
        tokens = workspace.parts.read(f"samples/{REAL}", ["tokens"])["tokens"]
        given = Material(
            real_NL=matrix(tokens, np.int64),
            training_RL=held_out.training_RL.astype(np.int64),
            size=held_out.vocabulary.size,
        )
        for number, source in enumerate(sources):
            missing = workspace.parts.missing(f"samples/{source}", len(given.real_NL), config.batch)
            if not missing:
                continue
            generator = np.random.default_rng([config.seed, STREAM, number])
            tokens_NL = ADVERSARIES[source](given, generator)
            for first, count in missing:
                table = texts(tokens_NL[first : first + count], first, held_out.vocabulary)
                workspace.parts.write(f"samples/{source}", first, table, {})

    def note(self, config: Questions) -> str:
        if not config.adversaries:
            return ""
        sentences = " ".join(family.said for family in FAMILIES)
        return f"Of no model, made to fool the figures. {sentences}"
