"""MAUVE between two sets of texts by their features (arXiv 2102.01454), through mauve-text.

Shapes: N texts, M texts, F features.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from pipelines.evaluation.features import AnyFeaturizer, HubFeaturizer

LEAST = 500  # texts in a set: at 50 anything scores near 1
FIRST_SEED = 25  # mauve-text's default


@dataclass(frozen=True, kw_only=True)
class MauveConfig:
    """Texts are clustered by `featurizer`'s features with `seeds` seeds of k-means, whose choice
    moves the score as much as many reported gaps. `scaling` is c of the paper's eq. 2; `buckets`
    is how many clusters there are, a tenth of the texts where it is None. All else, and these
    by default, as the paper and mauve-text have it."""

    featurizer: AnyFeaturizer = field(default_factory=HubFeaturizer)
    seeds: int = 5
    scaling: float = 5.0
    buckets: int | None = None

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, got {self.seeds}")
        if not 0 < self.scaling < math.inf:
            raise ValueError(f"scaling must be positive, got {self.scaling}")
        if self.buckets is not None and self.buckets < 2:
            raise ValueError(f"buckets must be at least 2, got {self.buckets}")


class Mauve(NamedTuple):
    """In (0, 1], 1 for sets that cannot be told apart: the mean over the seeds of k-means, and
    the standard deviation between them (NaN for a single one)."""

    value: float
    spread: float
    per_seed: tuple[float, ...]


def score(p_NF: np.ndarray, q_MF: np.ndarray, config: MauveConfig) -> Mauve:
    """MAUVE of texts p against references q, over the seeds 25, 26, ….

    Raises:
        ValueError: fewer than 500 texts on a side, features of different width or not finite, or
            more buckets than the smaller side has texts.
    """
    seeds = range(FIRST_SEED, FIRST_SEED + config.seeds)
    found = tuple(one(p_NF, q_MF, config, seed) for seed in seeds)
    spread = statistics.stdev(found) if len(found) > 1 else math.nan
    return Mauve(statistics.fmean(found), spread, found)


def one(p_NF: np.ndarray, q_MF: np.ndarray, config: MauveConfig, seed: int) -> float:
    """MAUVE with one seed of k-means; ValueError as `score`."""
    fewer = min(len(p_NF), len(q_MF))
    if fewer < LEAST:
        raise ValueError(
            f"MAUVE says nothing below {LEAST} texts on either side: "
            f"there are {len(p_NF)}, and {len(q_MF)} references"
        )
    if p_NF.shape[1:] != q_MF.shape[1:]:
        raise ValueError(
            f"features of shape {p_NF.shape} and {q_MF.shape} come from different featurizers"
        )
    if not (np.isfinite(p_NF).all() and np.isfinite(q_MF).all()):
        raise ValueError("some features are infinite or NaN: the featurizer overflowed")
    if config.buckets is not None and config.buckets > fewer:
        raise ValueError(f"{config.buckets} buckets are too many for {fewer} texts")
    found = _compute()(
        p_features=p_NF,
        q_features=q_MF,
        num_buckets="auto" if config.buckets is None else config.buckets,
        mauve_scaling_factor=config.scaling,
        seed=seed,
    )
    return float(found.mauve)


@cache
def _compute() -> Callable[..., Any]:
    """mauve-text, with a k-means that does not advise on every call, from C++, to have 39 points
    a cluster where MAUVE is defined with 20. The advice is all that the number is for."""
    import faiss
    from mauve import compute_mauve

    module = sys.modules[compute_mauve.__module__]
    quiet = partial(faiss.Kmeans, min_points_per_centroid=1)
    module.faiss = SimpleNamespace(Kmeans=quiet)
    return compute_mauve
