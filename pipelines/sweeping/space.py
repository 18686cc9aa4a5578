"""What a sweep may choose from: knobs, each the set or the range of a setting's values."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from optuna import Trial
    from optuna.distributions import BaseDistribution

Settings = Mapping[str, Any]  # dotted key of a recipe -> value


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One of `values`, which may be whole sections."""

    values: tuple[Any, ...]
    kind: Literal["choice"] = "choice"

    def __post_init__(self) -> None:
        if len(set(self.labels)) < max(len(self.values), 1):
            raise ValueError(f"values must be different ones, at least one, got {self.labels}")

    @property
    def labels(self) -> list[str]:
        return [label(value) for value in self.values]

    @property
    def probes(self) -> tuple[Any, ...]:
        """Values that show whether all others can be."""
        return self.values

    def draw(self, rng: np.random.Generator) -> Any:
        return self.values[rng.integers(len(self.values))]

    def ask(self, trial: Trial, key: str) -> Any:
        return self.values[self.labels.index(trial.suggest_categorical(key, self.labels))]

    def distribution(self) -> BaseDistribution:
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution(self.labels)

    def internal(self, value: Any) -> Any:
        """The value as Optuna knows it."""
        return label(value)


@dataclass(frozen=True, kw_only=True)
class Range:
    """From `low` to `high`, both included; whole numbers where both are."""

    low: int | float
    high: int | float

    def __post_init__(self) -> None:
        if not -math.inf < self.low < self.high < math.inf:
            raise ValueError(f"low must lie below high, got {self.low} and {self.high}")

    @property
    def probes(self) -> tuple[int | float, ...]:
        return self.low, self.high

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    def _between(self, low: float, high: float, rng: np.random.Generator) -> float:
        return float(low + (high - low) * rng.random())

    def _suggest(self, trial: Trial, key: str, *, log: bool) -> int | float:
        suggest = trial.suggest_int if self.whole else trial.suggest_float
        return suggest(key, self.low, self.high, log=log)

    def _distribution(self, *, log: bool) -> BaseDistribution:
        from optuna.distributions import FloatDistribution, IntDistribution

        return (IntDistribution if self.whole else FloatDistribution)(self.low, self.high, log=log)

    def internal(self, value: int | float) -> int | float:
        return value


@dataclass(frozen=True, kw_only=True)
class Uniform(Range):
    """Evenly from `low` to `high`."""

    kind: Literal["uniform"] = "uniform"

    def draw(self, rng: np.random.Generator) -> int | float:
        if self.whole:
            return int(rng.integers(self.low, self.high, endpoint=True))
        return self._between(self.low, self.high, rng)

    def ask(self, trial: Trial, key: str) -> int | float:
        return self._suggest(trial, key, log=False)

    def distribution(self) -> BaseDistribution:
        return self._distribution(log=False)


@dataclass(frozen=True, kw_only=True)
class LogUniform(Range):
    """Evenly on a logarithmic scale."""

    kind: Literal["log_uniform"] = "log_uniform"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low <= 0:
            raise ValueError(f"low must be positive on a logarithmic scale, got {self.low}")

    def draw(self, rng: np.random.Generator) -> int | float:
        value = math.exp(self._between(math.log(self.low), math.log(self.high), rng))
        return round(value) if self.whole else min(max(value, self.low), self.high)

    def ask(self, trial: Trial, key: str) -> int | float:
        return self._suggest(trial, key, log=True)

    def distribution(self) -> BaseDistribution:
        return self._distribution(log=True)


Knob = Choice | Uniform | LogUniform
Space = Mapping[str, Knob]


def label(value: Any) -> str:
    """A value in one line, the same for equal values."""
    return json.dumps(value, sort_keys=True)
