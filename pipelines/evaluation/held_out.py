"""The text that models are judged on, and what the training text says of words and frequencies.

Shapes: N rows, R training rows, L positions, T tokens of a text.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dsl.vocabulary import Vocabulary
from infra import shards, stream
from infra.errors import ConfigError
from infra.shards import Manifest
from infra.storage import Folder
from pipelines import models
from pipelines.evaluation import metrics
from pipelines.evaluation.metrics import Unigram


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Rows ``[N, L]`` of a held-out split; the first rows ``[R, L]`` of the training split, and the
    unigram and the words of these."""

    manifest: Manifest
    vocabulary: Vocabulary
    rows_NL: np.ndarray
    training_RL: np.ndarray
    unigram: Unigram
    words: frozenset[str]

    @cached_property
    def bytes_N(self) -> np.ndarray:
        """UTF-8 bytes that each row stands for."""
        return metrics.text_bytes(self.rows_NL, self.vocabulary)


def read(url: str, split: str, rows: int, *, corpus_rows: int, seed: int) -> HeldOut:
    """A random subset of a split, the same for the same seed, and the words of the training split.

    corpus_rows: of the training split, at most so many are looked at, the first ones.
    Raises ConfigError or DataError for a split that is not there or shards that are damaged.
    """
    manifest, data = shards.read_manifest(url), Folder.at(url)
    vocabulary = models.vocabulary_of(manifest, data)
    training_RL = _training(data, manifest, corpus_rows)
    # Words and frequencies are those of the text, without what only frames a row.
    corpus_T = {"eos": training_RL, "bos_eos": training_RL[:, 1:-1]}[manifest.blocks].reshape(-1)
    return HeldOut(
        manifest=manifest,
        vocabulary=vocabulary,
        rows_NL=stream.holdout(data, manifest, split, rows, seed),
        training_RL=training_RL,
        unigram=Unigram.of(corpus_T, vocabulary.size),
        words=frozenset(metrics.words(corpus_T, vocabulary)),
    )


def require(url: str, split: str, wanted: dict[str, int]) -> Manifest:
    """The manifest of the data; ConfigError for the first setting that asks for too many rows."""
    manifest = shards.read_manifest(url)
    there = manifest.rows(split)
    for key, rows in wanted.items():
        if rows > there:
            raise ConfigError(
                key,
                f"{rows} of the {there} rows of {Folder.at(url).url_of(split)}",
                "Ask for fewer, or prepare a larger split",
            )
    return manifest


def _training(data: Folder, manifest: Manifest, most: int) -> np.ndarray:
    """The first rows of the training split, ``[R, L]``."""
    groups = [
        (file.name, index, count)
        for file, counts in zip(
            manifest.files("train"), shards.check_files(data, manifest, "train"), strict=True
        )
        for index, count in enumerate(counts)
    ]
    starts = np.cumsum([0, *(count for *_, count in groups)])
    wanted = [group for group, start in zip(groups, starts, strict=False) if start < most]
    return np.concatenate(
        [shards.read_group(data, manifest, name, index) for name, index, _ in wanted]
    )[:most]
