"""MAUVE between the texts of a source and held-out text, by their features (arXiv 2102.01454),
through mauve-text.

Shapes: N texts, M references, L positions, F features, B rows of a batch, H hidden width,
R repeats, S seeds of k-means.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import torch

from dsl.state import State
from infra.errors import ConfigError
from pipelines.evaluation import hub
from pipelines.evaluation.cells import REFERENCES
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
from pipelines.evaluation.readers import HubReader, OpenModel, OwnReader
from pipelines.evaluation.survey import Survey
from pipelines.evaluation.workspace import Workspace
from pipelines.report import Column, Row

LEAST = 500  # texts in a set: at 50 anything scores near 1
FIRST_SEED = 25  # mauve-text's default


# From texts, and their rows of ids [N, L] in the data's vocabulary, to features [N, F] float32.
Featurize = Callable[[Sequence[str], np.ndarray], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class HubFeaturizer(HubReader):
    """The last hidden state at a text's last token, as in MAUVE's paper (arXiv 2102.01454, §4).

    Text is cut at `max_tokens` of the model's own tokenizer, to which `<|endoftext|>` means what
    the tokenizer says. A text without any token is read as the one token that begins texts;
    mauve-text would drop it. Features do not depend on the batch, up to rounding.
    """

    head: ClassVar[hub.Head] = "AutoModel"
    where: ClassVar[str] = "mauve.featurizer.model"

    def load(self, device: torch.device | str, open_model: OpenModel) -> Featurize:
        opened = self.open(device)
        tokenizer, network = opened.tokenizer, opened.network

        @torch.no_grad()
        def featurize(texts: Sequence[str], tokens_NL: np.ndarray) -> np.ndarray:
            cut = {"truncation": True, "max_length": self.max_tokens}
            ids = [row or [opened.start] for row in tokenizer(list(texts), **cut)["input_ids"]]
            features_NF = np.empty((len(ids), network.config.hidden_size), np.float32)
            for batch in hub.batches(ids, self.batch, device):
                read = network(input_ids=batch.ids_BL, attention_mask=batch.mask_BL)
                last_B1 = batch.mask_BL.sum(1, keepdim=True) - 1
                states_BLF = read.last_hidden_state
                last_BF = states_BLF.take_along_dim(last_B1[:, :, None], dim=1).squeeze(1)
                features_NF[batch.rows] = last_BF.cpu().numpy()
            return features_NF

        return featurize


@dataclass(frozen=True, kw_only=True)
class OwnFeaturizer(OwnReader):
    """The offline stand-in: the mean over positions of the hidden states of a model of our own.

    Normally of an AR model; any kind reads the text with every token revealed.
    """

    def load(self, device: torch.device | str, open_model: OpenModel) -> Featurize:
        denoiser = self.open(device, open_model)

        @torch.no_grad()
        def featurize(texts: Sequence[str], tokens_NL: np.ndarray) -> np.ndarray:
            table_VD, features_NF = denoiser.table_VD, []
            for tokens_BL in self.batches(tokens_NL):
                known_BL = torch.ones_like(tokens_BL, dtype=torch.bool)
                hidden_BLH = denoiser.hidden(State.from_tokens(table_VD, tokens_BL, known_BL))
                features_NF.append(hidden_BLH.float().mean(1).cpu().numpy())
            return np.concatenate(features_NF)

        return featurize


AnyFeaturizer = HubFeaturizer | OwnFeaturizer


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
    return {"features": lists(workspace.reader(featurizer)(texts, tokens_NL))}


def _score(workspace: Workspace, *, source: str, first: int) -> pa.Table:
    """By k-means seed, of one repeat; null for the references themselves, under whatever name."""
    config, rows = workspace.config.mauve, workspace.config.samples.rows
    own_NF = _read(workspace.parts, source)[first : first + rows]
    real_MF = _read(workspace.parts, REFERENCES)[:rows]
    same = np.array_equal(own_NF, real_MF)
    return pa.table({"mauve": [None if same else per_seed(own_NF, real_MF, config)]})


def _read(parts: Any, source: str) -> np.ndarray:
    """``[N, F]``"""
    return matrix(parts.read(f"parts/features/{source}", ["features"])["features"], np.float32)


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

    def __post_init__(self) -> None:
        require_resamples(self.resamples)

    def figures(self, survey: Survey, model: str, draws: Resamples) -> np.ndarray:
        config, rows = survey.config.mauve, survey.config.samples.rows
        texts_NF = _read(survey.parts, self.source(survey, model))[:rows]
        real_MF = _read(survey.parts, REFERENCES)[:rows]
        taken = zip(
            draws.rows(len(texts_NF)), draws.references(len(real_MF)), draws.seeds(), strict=True
        )
        return np.array([one(texts_NF[n], real_MF[m], config, seed) for n, m, seed in taken])

    def require(self, survey: Survey, candidate: str) -> None:
        super().require(survey, candidate)
        if survey.config.mauve is None:
            raise ConfigError("gate", "asks for MAUVE, which is not measured", "Give mauve, too")


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

    def readers(self, config: Questions) -> Sequence[AnyFeaturizer]:
        return (config.mauve.featurizer,)

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
        if found[0] is None:
            return {}
        per_seed_RS = np.array(found)
        spread = float(per_seed_RS.std(1, ddof=1).mean())
        return {**entries("mauve", mean(per_seed_RS.mean(1))), "mauve_spread": spread}

    def note(self, config: Questions) -> str:
        return (
            f"MAUVE on features of {config.mauve.featurizer.label}, mean over "
            f"{config.mauve.seeds} k-means seeds (spread: their standard deviation); ± is the "
            "standard error over repeats, where there are several."
        )
