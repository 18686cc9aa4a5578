"""How much each knob matters in a search that changes all knobs at once.

Trials are compared at one step. At the first rung of ASHA all of them are still there; later only
good ones are, which say less about what makes a trial bad.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from pipelines.report import Column, Table
from pipelines.report.drawing import panels, widen
from pipelines.sweeping.search import study
from pipelines.sweeping.space import Choice, Space, label
from pipelines.sweeping.trials import Trial

LEAST = 4  # trials for an analysis of variance
IMPORTANCE = (Column("knob", "Knob"), Column("share", "Share of the variance", ".2f"))


def table(space: Space, trials: Sequence[Trial]) -> Table:
    """The importance of each knob; without rows where `importance` says nothing."""
    return Table(
        title="Importance of the knobs",
        note="Functional ANOVA: the share of the variance of the bound among trials that a knob "
        f"explains, over {len(trials)} trials.",
        columns=IMPORTANCE,
        rows=[{"knob": key, "share": share} for key, share in importance(space, trials).items()],
    )


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
