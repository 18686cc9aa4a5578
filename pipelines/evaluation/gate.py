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
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from infra.errors import ConfigError

if TYPE_CHECKING:
    from pipelines.evaluation.settings import GateConfig
    from pipelines.evaluation.survey import Survey


class Metric(Protocol):
    """A figure that two models are compared by. Each is defined beside the question that measures
    it, and a setting of the gate chooses it by its `kind`."""

    @property
    def sign(self) -> int:
        """+1 where higher is better, -1 where lower is."""

    @property
    def resamples(self) -> int | None:
        """How many resamples it takes; None for as many as the gate says."""

    @property
    def label(self) -> str:
        """What messages and tables call it."""

    def figures(self, survey: Survey, model: str, draws: Resamples) -> np.ndarray:
        """The figure of each resample, ``[1 + R]``, that of the rows as they are first.

        Row i of every model has the same noise, and for likelihoods the same held-out row.
        """

    def require(self, survey: Survey, candidate: str) -> None:
        """ConfigError where the evaluation does not measure it of the candidate."""


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


def percentiles(values_R: np.ndarray, confidence: float) -> tuple[float, float]:
    """The percentile interval of resamples ``[R]``.

    A value that is NaN may lie anywhere: it counts as the least for the lower end and as the
    greatest for the upper one. Where more than ``(1 - confidence) / 2`` of them are, both ends are
    infinite.
    """
    tail, lost_R = (1 - confidence) / 2, np.isnan(values_R)
    with np.errstate(invalid="ignore"):
        low = np.quantile(np.where(lost_R, -np.inf, values_R), tail)
        high = np.quantile(np.where(lost_R, np.inf, values_R), 1 - tail)
    # numpy finds NaN between two values of which one or both are infinite.
    return (
        -math.inf if math.isnan(low) else float(low),
        math.inf if math.isnan(high) else float(high),
    )


def means(values_N: np.ndarray, rows_RN: np.ndarray) -> np.ndarray:
    """The mean of each resample, ``[R]``."""
    return ratios(values_N, np.ones(len(values_N)), rows_RN)


def ratios(parts_N: np.ndarray, wholes_N: np.ndarray, rows_RN: np.ndarray) -> np.ndarray:
    """``sum(parts) / sum(wholes)`` of each resample, ``[R]``; NaN where there is no whole.

    Of K figures at once, ``[R, K]``, where both are ``[N, K]``.
    """
    times_RN = np.stack([np.bincount(rows_N, minlength=len(parts_N)) for rows_N in rows_RN])
    with np.errstate(invalid="ignore", divide="ignore"):
        return (times_RN @ parts_N.astype(float)) / (times_RN @ wholes_N.astype(float))


# --- metrics of texts --------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class OfTexts:
    """The base of metrics that compare the texts of one path at one budget.

    section: that of the configuration without which it is not measured, where there is one.
    """

    path: str
    budget: int

    resamples: ClassVar[int | None] = None
    section: ClassVar[str] = ""

    @property
    def label(self) -> str:
        return f"{type(self).kind} of {self.path} {self.budget}"

    def source(self, survey: Survey, model: str) -> str:
        """The texts; the unigram's, which stand for a champion where there is none, have no
        path."""
        return survey.source(model, self.path, self.budget)

    def require(self, survey: Survey, candidate: str) -> None:
        """ConfigError where the evaluation draws no such texts of the candidate, or does not
        measure this of any."""
        self.source(survey, candidate)
        if self.section and getattr(survey.config, self.section) is None:
            why = f"asks for {type(self).kind}, which is not measured"
            raise ConfigError("gate", why, f"Give {self.section}, too")


def require_resamples(resamples: int) -> None:
    """ValueError for too few resamples for an interval."""
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
        if not all(map(math.isfinite, (self.difference, self.low, self.high))):
            return "not measurable"
        return "better" if self.low > 0 else "worse" if self.high < 0 else "undecided"

    def __str__(self) -> str:
        return (
            f"{self.metric}: {self.candidate:.4g} against {self.other:.4g}, a difference of "
            f"{self.difference:.4g} [{self.low:.4g}, {self.high:.4g}] (above 0 is better)"
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
        intervals = (("metric", self.metric), *(("guard", guard) for guard in self.guards))
        return [
            {"role": role, **asdict(interval), "verdict": interval.verdict}
            for role, interval in intervals
        ]


def compare(
    survey: Survey, config: GateConfig, *, candidate: str, other: str, seed: int
) -> Decision:
    """Decide between two models by name; the same for the same parts and seed.

    Raises ValueError where the models have different numbers of rows.
    """

    def measure(metric: Metric) -> Interval:
        return _interval(survey, config, metric, candidate=candidate, other=other, seed=seed)

    metric, guards = measure(config.metric), tuple(map(measure, config.guards))
    against = [guard for guard in guards if guard.verdict in ("worse", "not measurable")]
    accepted = metric.verdict == "better" and not against
    reason = next(iter(against), metric) if metric.verdict == "better" else metric
    verb = "becomes champion over" if accepted else "does not replace"
    level = f"{100 * config.confidence:g}%"
    why = f"{candidate} {verb} {other}: {reason.verdict} in {reason} at {level}"
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
    survey: Survey,
    config: GateConfig,
    metric: Metric,
    *,
    candidate: str,
    other: str,
    seed: int,
) -> Interval:
    draws = Resamples(seed, metric.resamples or config.resamples)
    ours_R, theirs_R = (metric.figures(survey, model, draws) for model in (candidate, other))
    differences_R = metric.sign * (ours_R - theirs_R)
    low, high = percentiles(differences_R[1:], config.confidence)
    return Interval(
        metric=metric.label,
        candidate=float(ours_R[0]),
        other=float(theirs_R[0]),
        difference=float(differences_R[0]),
        low=low,
        high=high,
    )
