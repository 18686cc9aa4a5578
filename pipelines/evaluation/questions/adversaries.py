"""Adversaries: texts of no model, made to fool the figures, as rows of the table of texts.

A figure that prefers one of them to the models says nothing by itself.

Shapes: N texts, R training rows, L positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from pipelines.evaluation.cells import REAL
from pipelines.evaluation.held_out import HeldOut
from pipelines.evaluation.ngram import NGram, default_order
from pipelines.evaluation.parts import chunks, matrix, texts
from pipelines.evaluation.question import Question, Questions
from pipelines.evaluation.workspace import Workspace

STREAM = 7  # of random numbers, behind the evaluation's seed


class Material(NamedTuple):
    """What texts are made of: as many rows of other `real` text as are wanted, and training rows of
    `size` different tokens."""

    real_NL: np.ndarray
    training_RL: np.ndarray
    size: int


Make = Callable[[Material, np.random.Generator], np.ndarray]  # -> [N, L]


def sampled(given: Material, generator: np.random.Generator) -> np.ndarray:
    """Drawn from an n-gram model of the training rows."""
    model = NGram(given.training_RL, given.size, default_order(given.size))
    return model.draw(*given.real_NL.shape, seed=int(generator.integers(2**63)))


def shuffled(given: Material, generator: np.random.Generator) -> np.ndarray:
    """The tokens of each real text in random order."""
    return generator.permuted(given.real_NL, axis=1)


def repeated(given: Material, generator: np.random.Generator) -> np.ndarray:
    """One training row over and over."""
    row_L = given.training_RL[generator.integers(len(given.training_RL))]
    return np.tile(row_L, (len(given.real_NL), 1))


def copied(given: Material, generator: np.random.Generator) -> np.ndarray:
    """Training rows, none twice where there are enough of them."""
    rows, count = len(given.training_RL), len(given.real_NL)
    order_N = np.concatenate([generator.permutation(rows) for _ in range(-(-count // rows))])
    return given.training_RL[order_N[:count]]


def replaced(share: float) -> Make:
    """Real text with this share of each row's tokens, to the nearest whole number, replaced by
    other tokens, uniformly random."""

    def make(given: Material, generator: np.random.Generator) -> np.ndarray:
        real_NL, size = given.real_NL, given.size
        rank_NL = generator.random(real_NL.shape).argsort(1).argsort(1)
        ahead_NL = generator.integers(1, size, real_NL.shape)
        wrong_NL = rank_NL < round(share * real_NL.shape[1])
        return np.where(wrong_NL, (real_NL + ahead_NL) % size, real_NL)

    return make


ADVERSARIES: Mapping[str, Make] = {
    "ngram": sampled,
    "shuffled": shuffled,
    "repeated": repeated,
    "replaced-5": replaced(0.05),
    "replaced-10": replaced(0.1),
    "copier": copied,
}


class Adversaries(Question):
    section, settings = "adversaries", bool

    def beside(self, config: Questions) -> tuple[str, ...]:
        return tuple(ADVERSARIES) if config.adversaries else ()

    def prepare(self, workspace: Workspace, held_out: HeldOut) -> None:
        config = workspace.config
        for number, source in enumerate(self.beside(config)):
            tokens = workspace.parts.read(f"samples/{REAL}", ["tokens"])["tokens"]
            size = held_out.vocabulary.size
            given = Material(matrix(tokens, np.int64), held_out.training_RL.astype(np.int64), size)
            generator = np.random.default_rng([config.seed, STREAM, number])
            tokens_NL = ADVERSARIES[source](given, generator)
            for first, count in chunks(len(tokens_NL), config.batch):
                table = texts(tokens_NL[first : first + count], first, held_out.vocabulary)
                workspace.parts.write(f"samples/{source}", first, table, {})

    def note(self, config: Questions) -> str:
        if not config.adversaries:
            return ""
        return (
            "Of no model, made to fool the figures: ngram, drawn from an n-gram model of the "
            "training split; shuffled, real text in random order; repeated, one training row over "
            "and over; replaced, real text with so many percent of its tokens wrong; copier, "
            "training rows."
        )
