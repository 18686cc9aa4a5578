"""How much each knob matters: in a search that changes all knobs at once, and in one that changes
one knob at a time.

In the first, trials are compared at one step. At the first rung of ASHA all of them are still
there; later only good ones are, which say less about what makes a trial bad. In the second, each
arm is set against the base, and there is a recommendation for each knob, with intervals.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pipelines.report import SKIPPED, STDERR, Column, Row, Rows, Table
from pipelines.report.drawing import COLOURS, GREY, measured, panels, widen
from pipelines.sweeping.arms import LEVEL, NONE_SEEN, TOO_FEW, Arm, difference
from pipelines.sweeping.search import BASE, OneAtATime, study
from pipelines.sweeping.settings import SweepConfig
from pipelines.sweeping.space import Choice, Space, label, titles
from pipelines.sweeping.trials import Trial

LEAST = 4  # trials for an analysis of variance
IMPORTANCE = (Column("knob", "Knob"), Column("share", "Share of the variance", ".2f"))
INTERVAL = (
    Column("difference", "Difference", ".4f"),
    Column("low", "From", ".4f"),
    Column("high", "To", ".4f"),
)
AGAINST = (
    Column("knob", "Knob"),
    Column("value", "Value"),
    Column("repeats", "Repeats"),
    *INTERVAL,
    Column("verdict", "Verdict"),
)
RECOMMENDED = (
    Column("knob", "Knob"),
    Column("base", "Base"),
    Column("recommended", "Recommended"),
    Column("says", "Verdict"),
    Column("value", "Nearest other value"),
    *INTERVAL,
)
SEVERAL = "several at once"
CONFIRMS, DIFFERS = "confirms the base", "differs from the base"
OPEN, UNKNOWN = f"keeps the base: {NONE_SEEN}", f"keeps the base: {TOO_FEW}"
WORDS, NAME = 60, 30  # characters of a value in a table, in a plot


def short(value: Any) -> Any:
    """A value as a cell of a table shows it."""
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        return value
    text = label(value)
    return text if len(text) <= WORDS else text[: WORDS - 1] + "…"


# --- all knobs at once -----------------------------------------------------------------------


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


# --- one knob at a time ----------------------------------------------------------------------


def compare(config: SweepConfig, search: OneAtATime, arms: Sequence[Arm]) -> list[Row]:
    """A row for each arm but the base, the most promising first."""
    finished = {label(arm.settings): arm for arm in arms}
    base = finished.get(label({}))
    rows = []
    for name, settings in search.named(config.space).items():
        if name == BASE:
            continue
        arm = finished.get(label(settings))
        ((knob, value),) = [(name, SEVERAL)] if name in search.arms else settings.items()
        row = {"knob": knob, "value": short(value)}
        if arm and base:
            found = difference(arm, base)
            figures = {"difference": found.mean, "difference" + STDERR: found.stderr}
            row |= {"repeats": found.pairs, **figures, "low": found.low, "high": found.high}
            row["verdict"] = found.verdict
        else:
            row[SKIPPED] = "the base did not finish" if arm else "no repeat finished"
        rows.append(row)
    return sorted(rows, key=_place)


def _place(row: Row) -> float:
    """Where a row stands: at its difference, or last where that is unknown."""
    found: float = row.get("difference", math.nan)
    return math.inf if math.isnan(found) else found


def recommend(config: SweepConfig, compared: Rows) -> list[Row]:
    """The recommended value of each knob: the best of those that are better than the base's, or
    else the base's, which is confirmed if every other value is known to be worse."""
    rows = []
    for key in config.space:
        all_of = [row for row in compared if row["knob"] == key]
        own = [row for row in all_of if SKIPPED not in row]
        if not own:
            continue
        better = [row for row in own if row["verdict"] == "better"]
        verdicts = {row.get("verdict") for row in all_of}
        kept = CONFIRMS if verdicts == {"worse"} else OPEN if NONE_SEEN in verdicts else UNKNOWN
        nearest, base = (better or own)[0], short(config.own(key))
        rows.append(
            {
                **nearest,
                "base": base,
                "recommended": nearest["value"] if better else base,
                "says": DIFFERS if better else kept,
            }
        )
    return rows


def comparison(config: SweepConfig, compared: Rows) -> dict[str, Table]:
    return {
        "against": Table(
            title="Against the base",
            note="The bound of each arm minus that of the base, in nats per token; negative is "
            "better. Mean over pairs of the same seed, ± one standard error, and the "
            f"{LEVEL:.0%} interval of Student's t, without a correction for many comparisons: "
            "about one in twenty arms without any effect is reported as different.",
            columns=AGAINST,
            rows=compared,
        ),
        "recommendation": Table(
            title="Recommendation",
            note="By knob, everything else as in the base. Figures are those of the best other "
            "value.",
            columns=RECOMMENDED,
            rows=recommend(config, compared),
        ),
    }


def plot_arms(compared: Rows) -> bytes | None:
    """Differences and their intervals, one below the other."""
    shown = measured(compared, "difference", "low", "high")
    if not shown:
        return None
    made = panels([""], width=7.0, height=1.0 + 0.32 * len(shown))
    (axes,) = made.axes
    for place, row in enumerate(shown):
        middle = row["difference"]
        reach = [[middle - row["low"]], [row["high"] - middle]]
        color = GREY if row["verdict"] == NONE_SEEN else COLOURS[0]
        axes.errorbar(middle, place, xerr=reach, fmt="o", ms=4, capsize=3, color=color)
    axes.axvline(0, color=GREY, ls=":")
    short_of = titles({row["knob"] for row in shown})
    names = [f"{short_of[row['knob']]}: {str(row['value'])[:NAME]}" for row in shown]
    axes.set_yticks(range(len(shown)), names)
    axes.invert_yaxis()
    axes.set(xlabel=f"bound minus that of the base, nats per token, {LEVEL:.0%} intervals")
    axes.grid(alpha=0.3, axis="x")
    return made.png()
