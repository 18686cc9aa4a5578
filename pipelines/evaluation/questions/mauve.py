"""MAUVE between the texts of a source and held-out text, by their features (arXiv 2102.01454),
through mauve-text.

Only sets of equally long texts are compared: the score of real text against real text falls with a
difference in length alone.

Shapes: N texts, M references, L positions, F features, R repeats, S seeds of k-means.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa

from infra.config import at_least
from infra.errors import ConfigError, DataError
from pipelines.evaluation.cells import REAL, REFERENCES
from pipelines.evaluation.features import AnyFeaturizer, Features, HubFeaturizer, same_length
from pipelines.evaluation.gate import OfTexts, Resamples, require_resamples
from pipelines.evaluation.metrics import mean
from pipelines.evaluation.parts import lists, matrix
from pipelines.evaluation.question import (
    Columns,
    Merit,
    Part,
    Question,
    Questions,
    entries,
    parts_of_texts,
    repeats,
)
from pipelines.evaluation.survey import Survey
from pipelines.evaluation.workspace import Workspace
from pipelines.report import Column, Row

LEAST = 500  # texts in a set: at 50 anything scores near 1
LEAST_SEEDS = 5
READER = "mauve.featurizer"  # the dotted path of the featurizer's settings
FIRST_SEED = 25  # mauve-text's default


@dataclass(frozen=True, kw_only=True)
class MauveConfig:
    """Texts are clustered by `featurizer`'s features with `seeds` seeds of k-means, at least 5: the
    choice of one moves the score as much as many reported gaps. `scaling` is c of the paper's
    eq. 2; `buckets` is how many clusters there are, a tenth of the texts where it is None. All
    else, and these by default, as the paper and mauve-text have it."""

    featurizer: AnyFeaturizer = field(default_factory=HubFeaturizer)
    seeds: int = LEAST_SEEDS
    scaling: float = 5.0
    buckets: int | None = None

    def __post_init__(self) -> None:
        at_least(LEAST_SEEDS, self, "seeds")
        if not 0 < self.scaling < math.inf:
            raise ValueError(f"scaling must be positive, got {self.scaling}")
        at_least(2, self, "buckets")


def per_seed(p_NF: np.ndarray, q_MF: np.ndarray, config: MauveConfig) -> list[float]:
    """MAUVE of texts p against references q with each seed of k-means: 25, 26, …"""
    seeds = range(FIRST_SEED, FIRST_SEED + config.seeds)
    return [one(p_NF, q_MF, config, seed) for seed in seeds]


def one(p_NF: np.ndarray, q_MF: np.ndarray, config: MauveConfig, seed: int) -> float:
    """MAUVE in (0, 1], 1 for sets that cannot be told apart, with one seed of k-means.

    Raises:
        ValueError: fewer than 500 texts on a side, features of different width or not finite, or
            more buckets than the smaller side has texts.
    """
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


# --- parts -------------------------------------------------------------------------------------


def _features(
    featurizer: AnyFeaturizer, workspace: Workspace, texts: Sequence[str], tokens_NL: np.ndarray
) -> Columns:
    found: Features = workspace.reader(READER, featurizer)(texts, tokens_NL)
    if not np.isfinite(found.features_NF).all():
        why = f"features of {featurizer.label} are infinite or NaN"
        raise DataError(f"{READER}.model", why, "Name another model, or take precision=float32")
    return {"features": lists(found.features_NF), "tokens": found.tokens_N}


def _score(workspace: Workspace, *, source: str, first: int) -> pa.Table:
    """By k-means seed, of one repeat; null for the references themselves, under whatever name, and
    for texts of another length."""
    config, rows = workspace.config.mauve, workspace.config.samples.rows
    own = _read(workspace.parts, source, first, rows)
    real = _read(workspace.parts, REFERENCES, 0, rows)
    same = np.array_equal(own.features_NF, real.features_NF)
    left_out = same or not same_length(own.tokens_N, real.tokens_N)
    scores = None if left_out else per_seed(own.features_NF, real.features_NF, config)
    # The type is named, as that of a null alone would be another one.
    return pa.table({"mauve": pa.array([scores], pa.list_(pa.float64()))})


def _read(parts: Any, source: str, first: int, rows: int) -> Features:
    """Of these texts of a source."""
    table = parts.rows(f"parts/features/{source}", first, rows, ["features", "tokens"])
    return Features(matrix(table["features"], np.float32), table["tokens"].to_numpy())


# --- what the gate may compare -------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class MauveGain(OfTexts):
    """MAUVE of the texts against the references; higher is better.

    Each resample costs a run of k-means for each model, hence a number of its own; it has a seed
    of its own, the same for both, so what that choice moves is in the interval too. A row that
    comes twice pulls a cluster towards itself: resamples score below the texts as they are, and
    scatter more than new texts would. The first is nearly the same for both models and leaves
    their difference; the second makes its interval too wide (on normal features, 1,000 rows, 1.3
    to 3.5 times), so the gate refuses rather than errs.
    """

    resamples: int = 100
    kind: Literal["mauve"] = "mauve"

    sign: ClassVar[int] = 1
    section: ClassVar[str] = "mauve"

    def __post_init__(self) -> None:
        require_resamples(self.resamples)

    def figures(self, survey: Survey, model: str, draws: Resamples) -> np.ndarray:
        config, rows = survey.config.mauve, survey.config.samples.rows
        own = _read(survey.parts, self.source(survey, model), 0, rows)
        real = _read(survey.parts, REFERENCES, 0, rows)
        p_NF, q_MF = own.features_NF, real.features_NF
        taken = zip(draws.rows(len(p_NF)), draws.references(len(q_MF)), draws.seeds(), strict=True)
        if not same_length(own.tokens_N, real.tokens_N):
            return np.full(1 + draws.resamples, math.nan)
        return np.array([one(p_NF[n], q_MF[m], config, seed) for n, m, seed in taken])


# --- the question ------------------------------------------------------------------------------


class Mauve(Question):
    section, settings, optional = "mauve", MauveConfig, True
    gate_metrics = (MauveGain,)
    columns = (
        Column("mauve", "MAUVE", ".3f"),
        Column("mauve_spread", "k-means spread", ".3f"),
    )
    merits = (Merit("mauve", "MAUVE ↑", ".3f", better=1, bounds=(0, 1), published="owt_mauve"),)

    def check(self, config: Questions) -> None:
        if config.samples.rows < LEAST:
            raise ValueError(
                f"MAUVE says nothing below {LEAST} texts, and samples.rows is "
                f"{config.samples.rows}; raise it or leave mauve out"
            )
        buckets, there = config.mauve.buckets or 0, config.samples.rows
        if buckets > there:
            why = f"{buckets} are too many for samples.rows={there} texts"
            raise ConfigError("mauve.buckets", why, "Ask for fewer, or leave it out")

    def readers(self, config: Questions) -> Mapping[str, AnyFeaturizer]:
        return {READER: config.mauve.featurizer}

    def of_texts(self, survey: Survey, source: str, texts: int) -> Iterable[Part]:
        measure = partial(_features, survey.config.mauve.featurizer)
        return parts_of_texts(f"parts/features/{source}", source, texts, measure)

    def of_corpus(self, survey: Survey, source: str, texts: int) -> Iterator[Part]:
        for first in repeats(survey, texts):
            work = partial(_score, source=source, first=first)
            yield Part(group=f"parts/mauve/{source}", first=first, work=work)

    def of_source(self, survey: Survey, source: str) -> Row:
        if not survey.parts.present(f"parts/mauve/{source}"):
            return {}
        found = survey.parts.read(f"parts/mauve/{source}")["mauve"].to_pylist()
        if None in found:
            return {}
        per_seed_RS = np.array(found)
        spread = float(per_seed_RS.std(1, ddof=1).mean())
        return {**entries("mauve", mean(per_seed_RS.mean(1))), "mauve_spread": spread}

    def note(self, config: Questions) -> str:
        featurizer = config.mauve.featurizer
        return (
            f"MAUVE on features of {featurizer.label} (pooling={featurizer.pooling}), mean over "
            f"{config.mauve.seeds} k-means seeds (spread: their standard deviation); ± is the "
            f"standard error over repeats, where there are several. {REAL} is what real text of "
            "the same size scores. None for texts that the featurizer finds longer or shorter "
            "than real ones."
        )
