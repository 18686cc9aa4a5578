"""The second level of a sweep: the best trials are evaluated on many paths, without training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from infra import tracking
from infra.config import to_tree, to_yaml
from infra.shards import read_manifest
from infra.tracking import RunHandle
from pipelines import evaluate
from pipelines.evaluation.cells import Cell, cells
from pipelines.evaluation.settings import QUALITY
from pipelines.report import SKIPPED, Row
from pipelines.sweeping.arms import Arm
from pipelines.sweeping.settings import CELLS, SECOND, TRIALS, SweepConfig

PARENT = "mlflow.parentRunId"


class Walk(NamedTuple):
    """A path along which a trial's model was sampled, and its row of figures."""

    cell: Cell
    row: Row


class Second(NamedTuple):
    """`rows` are all rows of the evaluation's samples, with those of real text and unigrams."""

    rows: Sequence[Row]
    walks: Sequence[Walk]


def run(config: SweepConfig, ranked: Sequence[Arm], sweep: RunHandle) -> Second:
    """Evaluate the best arms on every path; empty if the configuration has no second level.

    In MLflow, the evaluation is a child of the sweep, and each walk a child of its trial.
    """
    if config.second is None:
        return Second((), ())
    kept = [arm.trial for arm in ranked[: config.second.keep]]
    models = {trial.name: (config.folder / TRIALS / trial.name).url for trial in kept}
    settings = config.evaluation(models)
    made = evaluate.execute(settings)
    folder = config.folder / SECOND
    handle = tracking.opened(folder.url)
    if handle and sweep.run_id:
        tracking.finish(handle, tags={PARENT: sweep.run_id})
    rows = json.loads((folder / "report").read_bytes("evaluation.json"))["samples"]
    length = read_manifest(config.data).length
    walks = [
        Walk(cell, row)
        for cell in cells(models, settings.paths, length)
        for row in rows
        if _is(cell, row)
    ]
    for walk in walks:
        _show(config, walk, made["report"])
    return Second(rows, walks)


def best(walks: Sequence[Walk], model: str) -> Walk | None:
    """Where a model writes best, by the first that was measured of the merits of which more is
    better. Not by perplexity, which falls with entropy.
    """
    for metric in (merit for merit in QUALITY if merit.better > 0):
        own = [walk for walk in walks if walk.cell.model == model and metric.key in walk.row]
        if own:
            return max(own, key=lambda walk: float(walk.row[metric.key]))
    return None


def _is(cell: Cell, row: Row) -> bool:
    split = list(cell.split) if cell.split else None
    there = (row["model"], row.get("path"), row.get("budget"), row.get("split"))
    return SKIPPED not in row and there == (cell.model, cell.path, cell.budget, split)


def _show(config: SweepConfig, walk: Walk, report: str) -> None:
    """Make an MLflow run of a walk, with its settings and figures."""
    trial = tracking.opened((config.folder / TRIALS / walk.cell.model).url)
    settings = to_tree(walk.cell)
    handle = tracking.start(
        config.shown,
        root=(config.folder / CELLS).url,
        name=walk.cell.name,
        params=settings,
        tags={"verb": "sweep", "report": report},
        config_yaml=to_yaml(settings, "walk"),
        parent=trial.run_id if trial else None,
    )
    journal = tracking.Journal(handle.folder)
    journal.append(0, {key: value for key, value in walk.row.items() if _is_figure(key, value)})
    journal.close()
    tracking.finish(handle)


def _is_figure(key: str, value: Any) -> bool:
    return isinstance(value, int | float) and key not in ("budget", "split", "nucleus")
