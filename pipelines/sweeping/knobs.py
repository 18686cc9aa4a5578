"""How much each knob matters in a search that changes all knobs at once.

Trials are compared at one step. At the first rung of ASHA all of them are still there; later only
good ones are, which say less about what makes a trial bad.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from pipelines.report import STDERR, Column, Row, Table
from pipelines.report.drawing import panels, widen
from pipelines.sweeping.search import study
from pipelines.sweeping.space import Choice, Space, label
from pipelines.sweeping.trials import Trial

LEAST = 4  # trials for an analysis of variance
GROUPS = 3  # of the values of a range
IMPORTANCE = (
    Column("knob", "Knob"),
    Column("early", "Importance at the first rung", ".2f"),
    Column("late", "Importance at the end", ".2f"),
)
EFFECTS = (
    Column("knob", "Knob"),
    Column("value", "Value"),
    Column("trials", "Trials"),
    Column("bound", "Mean bound", ".4f"),
    Column("best", "Best", ".4f"),
)


def tables(space: Space, trials: Sequence[Trial], first: int, last: int) -> dict[str, Table]:
    """Importance and effects of the knobs; `first` and `last` are the steps of the comparison."""
    early, late = at(trials, first), at(trials, last)
    found = importance(space, early), importance(space, late)
    return {
        "importance": Table(
            title="Importance of the knobs",
            note="Functional ANOVA: the share of the variance of the bound among trials that a "
            f"knob explains, for {len(early)} trials at the first rung and {len(late)} at the end.",
            columns=IMPORTANCE,
            rows=[
                {"knob": key, "early": found[0].get(key), "late": found[1].get(key)}
                for key in space
                if any(found)
            ],
        ),
        "effects": Table(
            title="Effect of the knobs",
            note=f"Over all trials with this value at step {first}, whatever their other settings; "
            "± is one standard error.",
            columns=EFFECTS,
            rows=list(effects(space, early)),
        ),
    }


def at(trials: Sequence[Trial], step: int) -> list[Trial]:
    """The trials as they were at their first validation from `step` on; others are left out."""
    found = []
    for trial in trials:
        there = [i for i, v in enumerate(trial.validations) if v.step >= step]
        if there:
            kept = trial.validations[: there[0] + 1]
            found.append(replace(trial, state="finished", validations=kept))
    return found


def importance(space: Space, trials: Sequence[Trial]) -> Mapping[str, float]:
    """Functional ANOVA of the last bounds (optuna's, with a random forest): shares that sum to 1.

    Empty where there are too few trials, or all of them are equally good.
    """
    if len(trials) < LEAST or len({trial.bound for trial in trials}) == 1:
        return {}
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    evaluator = FanovaImportanceEvaluator(seed=0)
    found = get_param_importances(study(space, trials), evaluator=evaluator)
    return {key: found.get(key, 0.0) for key in space}


def effects(space: Space, trials: Sequence[Trial]) -> Iterator[Row]:
    """The mean of the bounds, with its standard error, for each value of each choice and each
    third of the trials in order of a range."""
    for key, knob in space.items():
        if isinstance(knob, Choice):
            groups = {
                label(value): [trial for trial in trials if trial.settings[key] == value]
                for value in knob.values
            }
        else:
            ordered = sorted(trials, key=lambda trial: trial.settings[key])
            size = max(1, math.ceil(len(ordered) / GROUPS))
            parts = [ordered[start : start + size] for start in range(0, len(ordered), size)]
            groups = {
                f"{part[0].settings[key]:.3g} … {part[-1].settings[key]:.3g}": part
                for part in parts
            }
        for value, group in groups.items():
            if bounds := [trial.bound for trial in group]:
                error = statistics.stdev(bounds) / len(bounds) ** 0.5 if bounds[1:] else math.nan
                mean = {"bound": statistics.fmean(bounds), "bound" + STDERR: error}
                row = {"knob": key, "value": value, "trials": len(bounds)}
                yield {**row, **mean, "best": min(bounds)}


def plot(space: Space, trials: Sequence[Trial]) -> bytes | None:
    """A panel for each knob with a dot for each trial."""
    if not trials:
        return None
    made = panels(list(space), width=3.0, share=False)
    for axes, (key, knob) in zip(made.axes, space.items(), strict=True):
        values = [trial.settings[key] for trial in trials]
        if isinstance(knob, Choice):
            axes.set_xticks(range(len(knob.values)), [text[:18] for text in knob.labels])
            values = [knob.labels.index(label(value)) for value in values]
        axes.plot(values, [trial.bound for trial in trials], "o", ms=4, alpha=0.7)
        if not isinstance(knob, Choice):
            widen(axes, "x", values)
        axes.set(ylabel="bound, nats per token")
        axes.grid(alpha=0.3)
    return made.png()
