"""The search space: for each knob, which is a setting of a recipe, its set or range of values."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

if TYPE_CHECKING:
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
        """Values that are possible only if all values are."""
        return self.values

    def draw(self, rng: np.random.Generator) -> Any:
        return self.values[rng.integers(len(self.values))]

    def distribution(self) -> BaseDistribution:
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution(self.labels)

    def to_optuna(self, value: Any) -> str:
        return label(value)

    def from_optuna(self, value: str) -> Any:
        return self.values[self.labels.index(value)]


@dataclass(frozen=True, kw_only=True)
class Range:
    """From `low` to `high`, both included; whole numbers where both are."""

    low: int | float
    high: int | float
    log: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not -math.inf < self.low < self.high < math.inf:
            raise ValueError(f"low must lie below high, got {self.low} and {self.high}")

    @property
    def probes(self) -> tuple[int | float, ...]:
        return self.low, self.high

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    def distribution(self) -> BaseDistribution:
        from optuna.distributions import FloatDistribution, IntDistribution

        kind = IntDistribution if self.whole else FloatDistribution
        return kind(self.low, self.high, log=self.log)

    def to_optuna(self, value: int | float) -> int | float:
        return value

    def from_optuna(self, value: int | float) -> int | float:
        return value


@dataclass(frozen=True, kw_only=True)
class Uniform(Range):
    """Evenly from `low` to `high`."""

    kind: Literal["uniform"] = "uniform"

    def draw(self, rng: np.random.Generator) -> int | float:
        if self.whole:
            return int(rng.integers(self.low, self.high, endpoint=True))
        return float(self.low + (self.high - self.low) * rng.random())


@dataclass(frozen=True, kw_only=True)
class LogUniform(Range):
    """Evenly on a logarithmic scale."""

    kind: Literal["log_uniform"] = "log_uniform"
    log: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low <= 0:
            raise ValueError(f"low must be positive on a logarithmic scale, got {self.low}")

    def draw(self, rng: np.random.Generator) -> int | float:
        low, high = math.log(self.low), math.log(self.high)
        value = math.exp(low + (high - low) * rng.random())
        return round(value) if self.whole else min(max(value, self.low), self.high)


Knob = Choice | Uniform | LogUniform
Space = Mapping[str, Knob]


def titles(keys: Collection[str]) -> dict[str, str]:
    """The shortest end of each dotted key that is the end of no other."""

    def ends(key: str) -> Iterator[str]:
        parts = key.split(".")
        return (".".join(parts[first:]) for first in reversed(range(len(parts))))

    counts = Counter(end for key in keys for end in ends(key))
    return {key: next((end for end in ends(key) if counts[end] == 1), key) for key in keys}


def label(value: Any) -> str:
    """A value in one line, the same for equal values."""
    return json.dumps(value, sort_keys=True)
