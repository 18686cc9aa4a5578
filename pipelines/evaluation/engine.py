"""Does the work of an evaluation: in three stages, each a list of parts that a pool makes.

A part that is there is not made again, so a restart does the rest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from infra import pool
from infra.console import Meter, say
from infra.pool import PoolConfig
from pipelines.evaluation.question import TEXTS, Part
from pipelines.evaluation.survey import Survey
from pipelines.evaluation.workspace import Workspace, device_of
from pipelines.report import Column, Table

if TYPE_CHECKING:
    from pipelines.evaluation.settings import EvaluateConfig

TIME = (
    Column("stage", "Stage"),
    Column("parts", "Parts"),
    Column("made", "Made just now"),
    Column("work", "Seconds of work", ".1f"),
    Column("wall", "Seconds waited just now", ".1f"),
)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a stage has cost. `work` is the sum of its parts' own seconds, whenever they were made;
    `wall` is how long this process waited for the `made` ones that were missing."""

    stage: str
    parts: int
    made: int
    work: float
    wall: float


def measure(survey: Survey) -> list[Cost]:
    """Ask every question. What the stages have cost."""
    config = survey.config
    with pool.connected(config.workers):
        costs = [_run("models", list(_of_models(survey)), survey, config.workers)]
        drawn = (*survey.sources, *(cell.name for cell in survey.further))
        texts = {source: survey.count(source) for source in drawn}
        here = replace(config.workers, count=0)
        # Few texts are read sooner than a process has started.
        few = sum(texts.values()) <= TEXTS and device_of(here) == device_of(config.workers)
        workers = here if few else config.workers
        for stage, ask in (("texts", "of_texts"), ("corpora", "of_corpus")):
            parts = [
                part
                for question in config.questions
                for source in survey.read_by(question)
                for part in getattr(question, ask)(survey, source, texts[source])
            ]
            costs.append(_run(stage, parts, survey, workers))
    return costs


def _of_models(survey: Survey) -> Iterator[Part]:
    """One model after the other, so that a process opens each once."""
    for subject in survey.subjects:
        for question in survey.config.questions:
            yield from question.of_model(survey, subject)


def worker(config: EvaluateConfig) -> Callable[[Part], int]:
    """How a process of the pool makes a part and keeps it; answers with its number of rows."""
    workspace = Workspace(config)

    def work(part: Part) -> int:
        began = time.perf_counter()
        table = part.work(workspace)
        seconds = time.perf_counter() - began
        workspace.parts.write(part.group, part.first, table, {"seconds": seconds})
        return len(table)

    return work


def _run(stage: str, parts: Sequence[Part], survey: Survey, workers: PoolConfig) -> Cost:
    """Make the parts of a stage that are not there yet."""
    kept = survey.parts
    present = {group: kept.present(group) for group in {part.group for part in parts}}
    missing = [part for part in parts if part.first not in present[part.group]]
    began = time.monotonic()
    if len(missing) < len(parts):
        say(f"{stage}: {len(parts) - len(missing)} of {len(parts)} parts are there already")
    meter = Meter(f"evaluate {stage}", len(missing), "parts")
    done = rows = 0
    for size in pool.run(missing, partial(worker, survey.config), workers):
        done, rows = done + 1, rows + size
        meter.show(done, lambda elapsed, rows=rows: f"{rows / elapsed:,.1f} rows/s")
    notes = (note for group in present for note in kept.notes(group))
    work = sum(note["seconds"] for note in notes if note)
    wall = time.monotonic() - began
    return Cost(stage=stage, parts=len(parts), made=done, work=work, wall=wall)


def time_table(costs: Sequence[Cost], *, wall: float, config: EvaluateConfig) -> Table:
    """Where the time went since the command began, and how much of it was work.

    Where an earlier attempt has done some of the work, its share of this time is not known.
    """
    processes = max(config.workers.count, 1)
    work = sum(cost.work for cost in costs)
    busy = f", busy {100 * work / processes / wall:.1f} % of the time"
    whole = all(cost.made == cost.parts for cost in costs)
    rows = [vars(cost) for cost in costs]
    rows.append({"stage": "everything", "work": work, "wall": wall})
    return Table(
        title="Time",
        note=f"Processes: {processes}{busy if whole else ''}. Everything: from the beginning of "
        "this command to its report.",
        columns=TIME,
        rows=rows,
    )
