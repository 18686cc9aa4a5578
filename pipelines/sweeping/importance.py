"""How much each knob matters: the share of the bound's variance that it explains by itself.

Trials are compared at one and the same step. At the first rung of ASHA all of them are still
there; later on only what was good enough is, which says less about what makes a trial bad.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pipelines.report import STDERR, Row
from pipelines.sweeping.search import study
from pipelines.sweeping.space import Choice, Space, label
from pipelines.sweeping.trials import Trial

LEAST = 4  # trials, to say anything
GROUPS = 3  # of the values of a range


def at(trials: Sequence[Trial], step: int) -> list[Trial]:
    """The trials as they were at the first validation from `step` on; those that got there."""
    found = []
    for trial in trials:
        there = [i for i, report in enumerate(trial.reports) if report.step >= step]
        if there:
            found.append(replace(trial, state="finished", reports=trial.reports[: there[0] + 1]))
    return found


def importance(space: Space, trials: Sequence[Trial]) -> Mapping[str, float]:
    """Functional ANOVA over the last bounds (optuna's, of a random forest); shares that sum to 1.

    Empty where there are too few trials, or all of them are equally good.
    """
    if len(trials) < LEAST or len({trial.bound for trial in trials}) == 1:
        return {}
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    evaluator = FanovaImportanceEvaluator(seed=0)
    found = get_param_importances(study(space, trials), evaluator=evaluator)
    return {key: found.get(key, 0.0) for key in space}


def effects(space: Space, trials: Sequence[Trial]) -> list[Row]:
    """For each value of each knob (of a range: each third of the trials) the mean of the bounds,
    over whatever the other knobs were, with its standard error."""
    return [row for key in space for row in _effects(key, space, trials)]


def _effects(key: str, space: Space, trials: Sequence[Trial]) -> list[Row]:
    groups: dict[str, list[Trial]] = {}
    if isinstance(space[key], Choice):
        for value in space[key].probes:
            had = [trial for trial in trials if trial.settings[key] == value]
            groups[label(value)] = had
    else:
        ordered = sorted(trials, key=lambda trial: trial.settings[key])
        size = max(1, math.ceil(len(ordered) / GROUPS))
        for start in range(0, len(ordered), size):
            part = ordered[start : start + size]
            low, high = part[0].settings[key], part[-1].settings[key]
            groups[f"{low:.3g} … {high:.3g}"] = part
    return [_row(key, name, part) for name, part in groups.items() if part]


def _row(key: str, value: str, trials: Sequence[Trial]) -> dict[str, Any]:
    bounds = [trial.bound for trial in trials]
    error = statistics.stdev(bounds) / math.sqrt(len(bounds)) if len(bounds) > 1 else math.nan
    return {
        "knob": key,
        "value": value,
        "trials": len(bounds),
        "bound": statistics.fmean(bounds),
        "bound" + STDERR: error,
        "best": min(bounds),
    }
