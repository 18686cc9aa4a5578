"""Grids of SNR: where a sentence is after a share of its moves (003 algorithm 2).

Every grid's ``gamma(share, gamma_max)`` increases from 0 at share 0 to ``gamma_max``, positive and
finite, at share 1.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist
from types import MappingProxyType
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Linear:
    """Equal steps of SNR (003 algorithm 2)."""

    kind: Literal["linear"] = "linear"

    def gamma(self, share: float, gamma_max: float) -> float:
        return share * gamma_max


@dataclass(frozen=True, kw_only=True)
class Log:
    """Equal steps of log(1 + SNR): as linear below SNR 1, geometric above it."""

    kind: Literal["log"] = "log"

    def gamma(self, share: float, gamma_max: float) -> float:
        return math.expm1(share * math.log1p(gamma_max))


@dataclass(frozen=True, kw_only=True)
class Quantile:
    """Equal shares of the log-normal that SNR was trained on (003 C.2), cut at ``gamma_max``.

    Steps are small where the denoiser has seen most. ``mu`` and ``sigma`` are those of log SNR.

    Raises:
        ValueError: ``mu`` or ``sigma`` is out of range, or no share lies below ``gamma_max``.
    """

    mu: float
    sigma: float
    kind: Literal["quantile"] = "quantile"

    def __post_init__(self) -> None:
        if not (0 < self.sigma < math.inf and math.isfinite(self.mu)):
            raise ValueError(
                f"need finite mu and positive finite sigma, got {self.mu}, {self.sigma}"
            )

    def gamma(self, share: float, gamma_max: float) -> float:
        log_gamma = NormalDist(self.mu, self.sigma)
        below = log_gamma.cdf(math.log(gamma_max))
        if below == 0:
            raise ValueError(
                f"the log of gamma_max, {math.log(gamma_max):g}, must not lie so far below mu, "
                f"{self.mu:g}: no share of the log-normal lies below; raise gamma_max or lower mu"
            )
        if not 0 < share < 1:
            return share * gamma_max
        return min(math.exp(log_gamma.inv_cdf(share * below)), gamma_max)


@dataclass(frozen=True, kw_only=True)
class Information:
    """Equal steps of information, in nats: ``1/2 ∫ E dgamma`` up to an SNR (003 eq. 3).

    ``nats[k]`` is that integral of a measured error profile up to SNR ``gammas[k]``. Both start at
    0 and increase. Between two entries SNR is linear in nats.

    Raises:
        ValueError: other entries, or a ``gamma_max`` above the last.
    """

    gammas: tuple[float, ...]
    nats: tuple[float, ...]
    kind: Literal["information"] = "information"

    def __post_init__(self) -> None:
        if len(self.gammas) != len(self.nats) or len(self.gammas) < 2:
            raise ValueError("gammas and nats must be equally many, at least two")
        for name, column in (("gammas", self.gammas), ("nats", self.nats)):
            rises = all(low < high for low, high in pairwise(column))
            if column[0] != 0 or not rises or not math.isfinite(column[-1]):
                raise ValueError(f"{name} must start at 0, increase and stay finite")

    def gamma(self, share: float, gamma_max: float) -> float:
        if gamma_max > self.gammas[-1]:
            raise ValueError(
                f"gamma_max {gamma_max:g} lies beyond the measured profile, which ends at SNR "
                f"{self.gammas[-1]:g}; lower gamma_max or measure further"
            )
        if not 0 < share < 1:
            return share * gamma_max
        nats = share * _interpolate(gamma_max, self.gammas, self.nats)
        return min(_interpolate(nats, self.nats, self.gammas), gamma_max)


Grid = Linear | Log | Quantile | Information

LINEAR = Linear()

# Grids without settings, by name.
NAMED: Mapping[str, Grid] = MappingProxyType({"linear": LINEAR, "log": Log()})


def named(grid: Grid | str) -> Grid:
    """A grid, which may be given by its name.

    Raises:
        ValueError: no grid without settings has that name.
    """
    if not isinstance(grid, str):
        return grid
    if grid not in NAMED:
        raise ValueError(f"grid must be one of {', '.join(NAMED)}, got {grid!r}")
    return NAMED[grid]


def _interpolate(x: float, xs: tuple[float, ...], ys: tuple[float, ...]) -> float:
    right = min(max(bisect_right(xs, x), 1), len(xs) - 1)
    low, high = xs[right - 1], xs[right]
    return ys[right - 1] + (x - low) / (high - low) * (ys[right] - ys[right - 1])
