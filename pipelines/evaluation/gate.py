"""The gate to `champion`: is the candidate better, beyond what chance does to these very rows?

Two models answer for the same rows with the same noise, so rows are resampled in pairs (Koehn
2004, Statistical significance tests for machine translation evaluation): each resample takes the
same rows of both, and the same references. What counts is the percentile interval of the
difference (Efron & Tibshirani 1993, An Introduction to the Bootstrap, ch. 13), which is turned so
that more than 0 is better. The candidate passes when the interval of one metric lies above 0 and
that of no guard below it.

The interval covers the rows that were drawn and the noise that came with them. It does not cover
the training: another seed of that makes another model, which has to come here by itself.

Shapes: N rows, M references, R resamples, F features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, Protocol

import numpy as np


class Scores(Protocol):
    """What a comparison is made from; a model without a champion to beat meets "unigram".

    Row i of every model has the same noise, and for likelihoods the same held-out row.
    """

    def nats(self, model: str, view: str) -> np.ndarray:
        """Nats per token, ``[N]``."""

    def judged(self, model: str, path: str, budget: int) -> tuple[np.ndarray, np.ndarray]:
        """Nats and tokens that the judge counts in each text, both ``[N]``."""

    def words(self, model: str, path: str, budget: int) -> tuple[np.ndarray, np.ndarray]:
        """Words of each text that the corpus has, and all of them, both ``[N]``."""

    def entropies(self, model: str, path: str, budget: int) -> np.ndarray:
        """Nats, ``[N]``."""

    def features(self, model: str, path: str, budget: int) -> np.ndarray:
        """``[N, F]``."""

    def reference_entropies(self) -> np.ndarray:
        """Nats, ``[M]``."""

    def reference_features(self) -> np.ndarray:
        """``[M, F]``."""

    def mauve(self, p_NF: np.ndarray, q_NF: np.ndarray, seed: int) -> float:
        """MAUVE with one seed of k-means."""


class Measures(Protocol):
    """What is going to be measured. Each raises ConfigError for what is not."""

    def require_view(self, model: str, view: str) -> None:
        """A view of the model's likelihood."""

    def require_texts(self, model: str, path: str, budget: int) -> None:
        """Texts of the model on a path."""

    def require_mauve(self) -> None:
        """MAUVE of all texts."""

    def require_judge(self) -> None:
        """Somebody's perplexity of all texts."""


class Resamples:
    """The resamples, the same for both models; the first is the rows as they are.

    Drawn from a counter-based generator's raw bits, whose values numpy never changes. Raises
    ValueError where the second model has another number of rows than the first.
    """

    def __init__(self, seed: int, resamples: int) -> None:
        self.seed, self.resamples = seed, resamples
        self._counts: dict[int, int] = {}

    def rows(self, count: int) -> np.ndarray:
        """Numbers of rows, with replacement, ``[1 + R, N]``."""
        return self._indices(count, 0)

    def references(self, count: int) -> np.ndarray:
        """Numbers of references, with replacement, ``[1 + R, M]``."""
        return self._indices(count, 1)

    def seeds(self) -> list[int]:
        """One for each resample's own chance, such as k-means: ``1 + R`` numbers below 2^31."""
        return (self._bits(1 + self.resamples, 2) >> np.uint64(33)).tolist()

    def _indices(self, count: int, stream: int) -> np.ndarray:
        if count != self._counts.setdefault(stream, count):
            raise ValueError(f"{count} rows cannot be paired with {self._counts[stream]}")
        drawn = self._bits(self.resamples * count, stream) % np.uint64(count)
        drawn_RN = drawn.astype(np.int64).reshape(self.resamples, count)
        return np.vstack([np.arange(count), drawn_RN])

    def _bits(self, count: int, stream: int) -> np.ndarray:
        key, counter = np.array([self.seed, 0], np.uint64), np.array([0, 0, 0, stream], np.uint64)
        return np.random.Philox(key=key, counter=counter).random_raw(count)


def means(values_N: np.ndarray, rows_RN: np.ndarray) -> np.ndarray:
    """The mean of each resample, ``[R]``."""
    return ratios(values_N, np.ones(len(values_N)), rows_RN)


def ratios(parts_N: np.ndarray, wholes_N: np.ndarray, rows_RN: np.ndarray) -> np.ndarray:
    """``sum(parts) / sum(wholes)`` of each resample, ``[R]``; NaN where there is no whole."""
    times_RN = np.stack([np.bincount(rows_N, minlength=len(parts_N)) for rows_N in rows_RN])
    with np.errstate(invalid="ignore", divide="ignore"):
        return (times_RN @ parts_N.astype(float)) / (times_RN @ wholes_N.astype(float))


# --- metrics -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """Nats per token of held-out rows by one view; lower is better."""

    view: str = "endpoint_bound"
    kind: Literal["likelihood"] = "likelihood"

    sign: ClassVar[int] = -1
    resamples: ClassVar[None] = None

    @property
    def label(self) -> str:
        return f"nats per token, {self.view}"

    def figures(self, scores: Scores, model: str, draws: Resamples) -> np.ndarray:
        nats_N = scores.nats(model, self.view)
        return means(nats_N, draws.rows(len(nats_N)))

    def require(self, measures: Measures, candidate: str) -> None:
        """ConfigError where the candidate's likelihood is not viewed so."""
        measures.require_view(candidate, self.view)


@dataclass(frozen=True, kw_only=True)
class _OfTexts:
    """What is said of the texts of one path at one budget."""

    path: str
    budget: int

    resamples: ClassVar[int | None] = None

    @property
    def label(self) -> str:
        return f"{type(self).kind} of {self.path} {self.budget}"

    def require(self, measures: Measures, candidate: str) -> None:
        """ConfigError where the evaluation draws no such texts of the candidate."""
        measures.require_texts(candidate, self.path, self.budget)


@dataclass(frozen=True, kw_only=True)
class Mauve(_OfTexts):
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
        _enough(self.resamples)

    def figures(self, scores: Scores, model: str, draws: Resamples) -> np.ndarray:
        texts_NF = scores.features(model, self.path, self.budget)
        references_MF = scores.reference_features()
        pairs = zip(
            draws.rows(len(texts_NF)),
            draws.references(len(references_MF)),
            draws.seeds(),
            strict=True,
        )
        return np.array([scores.mauve(texts_NF[n], references_MF[m], seed) for n, m, seed in pairs])

    def require(self, measures: Measures, candidate: str) -> None:
        super().require(measures, candidate)
        measures.require_mauve()


@dataclass(frozen=True, kw_only=True)
class GenerativePerplexity(_OfTexts):
    """Perplexity of the texts for the judge, over all of their tokens; lower is better.

    It falls for texts that repeat themselves: guard it with `Entropy`.
    """

    kind: Literal["generative_perplexity"] = "generative_perplexity"

    sign: ClassVar[int] = -1

    def figures(self, scores: Scores, model: str, draws: Resamples) -> np.ndarray:
        nats_N, tokens_N = scores.judged(model, self.path, self.budget)
        return np.exp(ratios(nats_N, tokens_N, draws.rows(len(nats_N))))

    def require(self, measures: Measures, candidate: str) -> None:
        super().require(measures, candidate)
        measures.require_judge()


@dataclass(frozen=True, kw_only=True)
class Words(_OfTexts):
    """The share of words that occur in the corpus, over all words; higher is better."""

    kind: Literal["words"] = "words"

    sign: ClassVar[int] = 1

    def figures(self, scores: Scores, model: str, draws: Resamples) -> np.ndarray:
        known_N, all_N = scores.words(model, self.path, self.budget)
        return ratios(known_N, all_N, draws.rows(len(all_N)))


@dataclass(frozen=True, kw_only=True)
class Entropy(_OfTexts):
    """How far the mean entropy of a text is from that of the references; lower is better."""

    kind: Literal["entropy"] = "entropy"

    sign: ClassVar[int] = -1

    def figures(self, scores: Scores, model: str, draws: Resamples) -> np.ndarray:
        texts_N = scores.entropies(model, self.path, self.budget)
        references_M = scores.reference_entropies()
        ours_R = means(texts_N, draws.rows(len(texts_N)))
        return abs(ours_R - means(references_M, draws.references(len(references_M))))


AnyMetric = Likelihood | Mauve | GenerativePerplexity | Words | Entropy


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """Of the evaluation's models, `model` may become champion: if it is better by `metric`, and
    by none of the `guards` worse, with intervals of this `confidence` from so many `resamples`.
    """

    model: str
    metric: AnyMetric
    guards: tuple[AnyMetric, ...] = ()
    confidence: float = 0.95
    resamples: int = 1000

    def __post_init__(self) -> None:
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence lies between 0 and 1, got {self.confidence}")
        _enough(self.resamples)


def _enough(resamples: int) -> None:
    if resamples < 20:
        raise ValueError(f"resamples must be at least 20 for an interval, got {resamples}")


# --- the decision ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Interval:
    """One metric of both models, and the interval of their difference, above 0 where the
    candidate is better. NaN where a model gives nothing to measure."""

    metric: str
    candidate: float
    other: float
    difference: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        if not (math.isfinite(self.low) and math.isfinite(self.high)):
            return "not measurable"
        return "better" if self.low > 0 else "worse" if self.high < 0 else "undecided"

    def __str__(self) -> str:
        return (
            f"{self.metric}: {self.candidate:.4g} against {self.other:.4g}, better by "
            f"{self.difference:.4g} [{self.low:.4g}, {self.high:.4g}]"
        )


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Whether the candidate is to be champion, and why or why not in one sentence."""

    accepted: bool
    why: str
    candidate: str
    other: str
    confidence: float
    metric: Interval
    guards: tuple[Interval, ...]

    def rows(self) -> list[dict[str, Any]]:
        """One for each interval: its fields, its `role` (metric or guard) and its `verdict`."""
        return list(self._rows())

    def json(self) -> dict[str, Any]:
        """All of it as JSON has it: what could not be measured is null."""
        finite = [
            {
                k: None if isinstance(v, float) and not math.isfinite(v) else v
                for k, v in row.items()
            }
            for row in self._rows()
        ]
        return {
            "accepted": self.accepted,
            "why": self.why,
            "candidate": self.candidate,
            "other": self.other,
            "confidence": self.confidence,
            "intervals": finite,
        }

    def _rows(self) -> Iterator[dict[str, Any]]:
        for role, interval in (("metric", self.metric), *(("guard", g) for g in self.guards)):
            yield {"role": role, **asdict(interval), "verdict": interval.verdict}


def compare(
    scores: Scores, config: GateConfig, *, candidate: str, other: str, seed: int
) -> Decision:
    """Decide between two models by name; the same for the same scores and seed.

    Raises ValueError where the models have different numbers of rows.
    """

    def measure(metric: AnyMetric) -> Interval:
        return _interval(scores, config, metric, candidate=candidate, other=other, seed=seed)

    metric, guards = measure(config.metric), tuple(map(measure, config.guards))
    against = [guard for guard in guards if guard.verdict in ("worse", "not measurable")]
    accepted = metric.verdict == "better" and not against
    reason = next(iter(against), metric) if metric.verdict == "better" else metric
    verb = "becomes champion over" if accepted else "does not replace"
    why = f"{candidate} {verb} {other}: {reason.verdict} in {reason} at {config.confidence:.0%}"
    return Decision(
        accepted=accepted,
        why=why,
        candidate=candidate,
        other=other,
        confidence=config.confidence,
        metric=metric,
        guards=guards,
    )


def _interval(
    scores: Scores, config: GateConfig, metric: AnyMetric, *, candidate: str, other: str, seed: int
) -> Interval:
    draws = Resamples(seed, metric.resamples or config.resamples)
    ours_R, theirs_R = (metric.figures(scores, model, draws) for model in (candidate, other))
    differences_R = metric.sign * (ours_R - theirs_R)
    tail = (1 - config.confidence) / 2
    low, high = np.quantile(differences_R[1:], (tail, 1 - tail))
    return Interval(
        metric=metric.label,
        candidate=float(ours_R[0]),
        other=float(theirs_R[0]),
        difference=float(differences_R[0]),
        low=float(low),
        high=float(high),
    )
