"""Arms: groups of trials that differ only in their seed. They are ranked and compared in pairs.

Bounds are in nats per token; smaller is better.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from infra.errors import ConfigError, InfraError
from pipelines.sweeping.space import label
from pipelines.sweeping.trials import SEED, Trial

LEVEL = 0.95  # of all intervals
NONE_SEEN, TOO_FEW = "no difference seen", "too few repeats"


class Arm(NamedTuple):
    """The finished trials with the same settings, in order of their numbers; at least one."""

    trials: tuple[Trial, ...]

    @property
    def settings(self) -> dict[str, Any]:
        return self.trials[0].arm

    @property
    def trial(self) -> Trial:
        """The first trial, which represents the arm. As it is not chosen for its bound, other
        measurements of it are not biased."""
        return self.trials[0]

    @property
    def bound(self) -> float:
        """The mean over trials."""
        return statistics.fmean(trial.bound for trial in self.trials)


class Difference(NamedTuple):
    """A mean of paired differences, its standard error, and the `LEVEL` interval of Student's t;
    NaN where there are fewer than two pairs."""

    pairs: int
    mean: float
    stderr: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """What the difference says about a bound, which should be small."""
        if math.isnan(self.low):
            return TOO_FEW
        if self.low <= 0 <= self.high:
            return NONE_SEEN
        return "worse" if self.mean > 0 else "better"


def ranked(trials: Sequence[Trial]) -> list[Arm]:
    """The arms with finished trials, best mean first.

    Arms with fewer finished trials come after all that have more, as their failed trials are
    missing from the mean. Where no trial finished, raises InfraError if the same command tries one
    of them again, else ConfigError.
    """
    by_settings: dict[str, list[Trial]] = {}
    for trial in trials:
        if trial.state == "finished":
            by_settings.setdefault(label(trial.arm), []).append(trial)
    if not by_settings:
        why = "; ".join(f"{trial.name} {trial.state}: {trial.why}" for trial in trials)
        if any(trial.state == "lost" for trial in trials):
            fix = "The same command tries those again that were lost"
            raise InfraError("trials", f"none finished ({why})", fix)
        raise ConfigError("space", f"no trial finished ({why})", "Mend the settings they share")
    found = [Arm(tuple(repeats)) for repeats in by_settings.values()]
    return sorted(found, key=lambda arm: (-len(arm.trials), arm.bound))


def difference(one: Arm, other: Arm) -> Difference:
    """The bound of `one` minus that of `other`, over the seeds that both have."""
    bounds = {trial.settings.get(SEED): trial.bound for trial in other.trials}
    pairs = [
        trial.bound - bounds[trial.settings.get(SEED)]
        for trial in one.trials
        if trial.settings.get(SEED) in bounds
    ]
    return paired(pairs)


def paired(differences: Sequence[float]) -> Difference:
    from scipy.stats import t

    count = len(differences)
    mean = statistics.fmean(differences) if count else math.nan
    if count < 2:
        return Difference(count, mean, math.nan, math.nan, math.nan)
    stderr = statistics.stdev(differences) / math.sqrt(count)
    reach = float(t.ppf((1 + LEVEL) / 2, count - 1)) * stderr
    return Difference(count, mean, stderr, mean - reach, mean + reach)
