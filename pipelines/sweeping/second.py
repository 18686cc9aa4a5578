"""The second level of a sweep: the best trials are evaluated on many paths, without training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

from infra import tracking
from infra.config import flatten, parse, to_tree, to_yaml
from infra.errors import Problem
from infra.journal import Journal
from infra.shards import read_manifest
from infra.storage import Folder
from infra.tracking import RunHandle
from pipelines import evaluate
from pipelines.evaluation import preparation
from pipelines.evaluation.cells import Cell, cells
from pipelines.evaluation.question import Merit
from pipelines.evaluation.settings import QUALITY, Questions
from pipelines.report import SKIPPED, Row
from pipelines.sweeping.arms import Arm
from pipelines.sweeping.settings import CELLS, SECOND, TRIALS, SecondConfig, SweepConfig

PARENT = "mlflow.parentRunId"


class Walk(NamedTuple):
    """A path along which a trial's model was sampled, and its row of figures: of its texts, and
    where there is one of its headline."""

    cell: Cell
    row: Row


def require(config: SweepConfig) -> None:
    """A `Problem` for a second level that this data, or its readers, cannot meet."""
    if config.second is None:
        return
    settings = config.evaluation({"any": config.finetune.init})
    try:
        rows, uri = preparation.rows(settings), tracking.locate(config.tracking, config.root)
        for question in settings.questions:
            question.require(settings, rows, uri)
    except Problem as error:
        if error.where.partition(".")[0] not in {field.name for field in fields(Questions)}:
            raise  # the address of data or of a file, or a setting of the sweep itself
        raise type(error)(f"{SECOND}.{error.where}", error.why, error.fix) from None


def run(config: SweepConfig, ranked: Sequence[Arm], sweep: RunHandle) -> list[Walk]:
    """Evaluate the best arms on every path; none if the configuration has no second level.

    In MLflow, the evaluation is a child of the sweep, and each walk a child of its trial.
    """
    if config.second is None:
        return []
    kept = [arm.trial for arm in ranked[: config.second.keep]]
    models = {trial.name: (config.folder / TRIALS / trial.name).url for trial in kept}
    settings, folder = config.evaluation(models), config.folder / SECOND
    if _is_of_others(folder, models):
        settings = replace(settings, existing="restart")
    made = evaluate.execute(settings)
    handle = tracking.opened(folder.url)
    if handle and sweep.run_id:
        tracking.finish(handle, tags={PARENT: sweep.run_id})
    tables = json.loads((folder / "report").read_bytes("evaluation.json"))
    rows, length = tables["samples"], read_manifest(config.data).length
    heads = [row for row in tables.get("headline", ()) if "p" not in row]
    walks = []
    for cell in cells(models, settings.paths, length):
        own = [row for row in (*heads, *rows) if _is(cell, row)]
        walks += [Walk(cell, {key: row[key] for row in own for key in row})] if own else []
    for walk in walks:
        _show(config, walk, made["report"])
    return walks


def _is_of_others(folder: Folder, models: Mapping[str, str]) -> bool:
    """Whether an earlier attempt evaluated other trials: one that was lost may have ended since."""
    if not folder.exists(tracking.CONFIG):
        return False
    before = flatten(parse(folder.read_bytes(tracking.CONFIG), folder.url_of(tracking.CONFIG)))
    of = "evaluate.models."
    return models != {k.removeprefix(of): v for k, v in before.items() if k.startswith(of)}


def chosen(
    config: SecondConfig | None, ranked: Sequence[Arm], walks: Sequence[Walk]
) -> tuple[Arm, Walk | None]:
    """The arm that a sweep recommends, and the walk along which its model writes best, if any.

    By default the arm of the lowest bound, and its best walk by the first that was measured of the
    merits of which more is better: not by perplexity, which falls with entropy.
    """
    if config is None:
        return ranked[0], None
    if config.select:
        (merit,) = (merit for merit in config.merits if merit.key == config.select.merit)
        found = _best(walks, merit, config.select.calls)
        arms = {arm.trial.name: arm for arm in ranked}
        return (arms[found.cell.model], found) if found else (ranked[0], None)
    own = [walk for walk in walks if walk.cell.model == ranked[0].trial.name]
    best = (_best(own, merit) for merit in QUALITY if merit.better > 0)
    return ranked[0], next(filter(None, best), None)


def by(config: SecondConfig | None, walk: Walk | None) -> str:
    """By what `chosen` has chosen."""
    select = config.select if config else None
    if select is None:
        return "the lowest bound"
    if walk is None:
        most = f" of at most {select.calls} calls" if select.calls else ""
        return f"the lowest bound, as no walk{most} has {select.merit}"
    return f"{select.merit} {float(walk.row[select.merit]):.4g} along {walk.cell.name}"


def _best(walks: Sequence[Walk], merit: Merit, calls: int | None = None) -> Walk | None:
    """Of those that have the merit, which a report says as null where it is no finite number, and
    take no more calls."""
    fitting = (
        walk
        for walk in walks
        if walk.row.get(merit.key) is not None and (calls is None or walk.cell.budget <= calls)
    )
    return max(fitting, key=lambda walk: merit.better * float(walk.row[merit.key]), default=None)


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
    journal = Journal(handle.folder)
    journal.append(0, {key: value for key, value in walk.row.items() if _is_figure(key, value)})
    journal.close()
    tracking.finish(handle)


def _is_figure(key: str, value: Any) -> bool:
    return isinstance(value, int | float) and key not in ("budget", "split", "nucleus")
