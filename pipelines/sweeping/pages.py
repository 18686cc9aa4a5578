"""The report of a sweep: its trials, what mattered, and what the second level found."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from pipelines.evaluation.question import Merit
from pipelines.report import Column, Plot, Report, Rows, Table, plots
from pipelines.report.drawing import curve, panels, styles
from pipelines.sweeping import knobs
from pipelines.sweeping.arms import LEVEL, Arm, difference
from pipelines.sweeping.knobs import short
from pipelines.sweeping.search import OneAtATime
from pipelines.sweeping.settings import SweepConfig
from pipelines.sweeping.space import titles
from pipelines.sweeping.trials import SEED, Trial

Drawn = tuple[str, str, bytes | None]  # name, caption, PNG

TRIAL = Column("trial", "Trial")
MEASURED = (
    Column("bound", "Bound", ".4f"),
    Column("endpoint", "at the endpoints", ".4f"),
    Column("hybrid", "along finite SNR", ".4f"),
)
ENDED = (Column("step", "Step", ","), Column("state", "State"), Column("why", "Why"))
WALKS = (
    Column("model", "Trial"),
    Column("path", "Path"),
    Column("split", "Split"),
    Column("budget", "Budget"),
    Column("calls", "Calls", ".4g"),
)
AT = Column("at", "of the headline: temperature", ".2f")
ENTROPY = Column("entropy", "Entropy of a text, nats", ".3f")
MEANING = (
    "Nats per token of validation rows: the mean of two upper bounds on -log P, one at masked and "
    "revealed tokens, one along finite SNR. Trials of one seed have the same rows and noise."
)


def report(
    config: SweepConfig,
    trials: Sequence[Trial],
    arms: Sequence[Arm],
    best: Arm,
    by: str,
    walks: Rows,
) -> Report:
    """The report of a sweep.

    arms: in the order of their bounds. best: the one that is recommended, for what `by` says.
    walks: the rows of the second level.
    """
    tables, drawn = _of_knobs(config, trials, arms)
    merits = [merit for merit in config.second.merits if merit.better] if config.second else []
    tables |= {"trials": _trials(config, trials), "walks": _walks(merits, walks)}
    drawn += [("bounds", "Bound by step of every trial", _bounds(trials)), *_quality(merits, walks)]
    return Report(
        name="sweep",
        title=f"Sweep {config.name}",
        subtitle=f"{len(trials)} trials of {config.finetune.train.steps:,} steps at most from "
        f"{config.finetune.init}; best: {arms[0].trial.name} at {arms[0].bound:.4f} nats per "
        f"token{_next(arms)}; recommended: {best.trial.name}, by {by}",
        facts={
            "best": {"trial": best.trial.name, "bound": best.bound, "settings": best.settings},
            "ranking": [
                {"trials": [trial.name for trial in arm.trials], "bound": arm.bound} for arm in arms
            ],
        },
        tables={name: table for name, table in tables.items() if table.rows},
        plots=[Plot(name, caption, png) for name, caption, png in drawn if png],
        texts=[],
    )


def _next(arms: Sequence[Arm]) -> str:
    """The difference between the second-best arm and the best."""
    if len(arms) == 1 or not (found := difference(arms[1], arms[0])).pairs:
        return ""
    interval = f" ({LEVEL:.0%} interval {found.low:+.4f} to {found.high:+.4f})"
    sure = "" if math.isnan(found.low) else interval
    return f"; next: {arms[1].trial.name}, {found.mean:+.4f}{sure}"


def _of_knobs(
    config: SweepConfig, trials: Sequence[Trial], arms: Sequence[Arm]
) -> tuple[dict[str, Table], list[Drawn]]:
    """What is known of the knobs, which depends on how settings were chosen."""
    if isinstance(config.search, OneAtATime):
        compared = knobs.compare(config, config.search, arms)
        drawn = ("against", "Arms against the base", knobs.plot_arms(compared))
        return knobs.comparison(config, compared), [drawn]
    step = config.asha.grace if config.asha else config.finetune.train.steps
    there = knobs.at(trials, step)
    drawn = ("knobs", f"Bound by knob at step {step}", knobs.plot(config.space, there))
    return {"importance": knobs.table(config.space, there)}, [drawn]


def _trials(config: SweepConfig, trials: Sequence[Trial]) -> Table:
    def row(trial: Trial) -> dict[str, Any]:
        measured = trial.validations[-1]._asdict() if trial.validations else {"step": 0}
        settings = {key: short(value) for key, value in trial.settings.items()}
        return {"trial": trial.name, **settings, **measured, "state": trial.state, "why": trial.why}

    keys = [*config.space, *([SEED] if any(SEED in trial.settings for trial in trials) else [])]
    columns = tuple(Column(key, title, ".4g") for key, title in titles(keys).items())
    return Table(
        title="Trials",
        note=f"{MEANING} Stopped trials show their last validation. What a trial does not "
        "set is as in finetune.",
        columns=(TRIAL, *columns, *MEASURED, *ENDED),
        rows=sorted(map(row, trials), key=lambda r: (-r["step"], r.get("bound", math.inf))),
    )


def _walks(merits: Sequence[Merit], rows: Rows) -> Table:
    found = (*(Column(m.key, m.title, m.show) for m in merits), AT, ENTROPY)
    return Table(
        title="The second level: paths of the trials that were kept",
        note="No training: splits, SNR at the hand-over, eta and nucleus. The folder `second` has "
        "the whole evaluation.",
        columns=(*WALKS, *(column for column in found if any(column.key in row for row in rows))),
        rows=rows,
    )


def _bounds(trials: Sequence[Trial]) -> bytes | None:
    shown = [trial for trial in trials if trial.validations]
    if not shown:
        return None
    made = panels([""], width=6.5, height=4.0, beside=1.4)
    (axes,) = made.axes
    lines = styles(trial.name for trial in shown)
    for trial in shown:
        rows = [validation._asdict() for validation in trial.validations]
        curve(axes, rows, "step", "bound", label=trial.name, **lines[trial.name])
    axes.set(xlabel="step", ylabel="bound, nats per token")
    axes.grid(alpha=0.3)
    made.legend()
    return made.png()


def _quality(merits: Sequence[Merit], rows: Rows) -> Iterator[Drawn]:
    """Plots of each figure of merit against calls, and of hybrid paths by split."""
    for merit in merits:
        png = plots.quality(rows, merit.key, label=merit.title, bounds=merit.bounds)
        yield f"{merit.key}_by_calls", f"{merit.title} against calls", png
        png = plots.splits(rows, merit.key, label=merit.title)
        yield f"{merit.key}_by_split", f"{merit.title} of hybrid paths by split", png
