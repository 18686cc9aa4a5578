"""Does the work of an evaluation: in three stages, each a list of tasks that a pool works off.

A task whose part is there is done already, so a restart does the rest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from infra import pool
from infra.pool import PoolConfig
from pipelines.evaluation.evaluation import Evaluation
from pipelines.evaluation.question import TEXTS, Task
from pipelines.evaluation.workspace import Workspace
from pipelines.report import Column, Table
from pipelines.runs import clock, say

if TYPE_CHECKING:
    from pipelines.evaluation.settings import EvaluateConfig

EVERY_S = 5.0  # seconds between two lines of progress
TIME = (
    Column("stage", "Stage"),
    Column("tasks", "Tasks"),
    Column("made", "Made just now"),
    Column("work", "Seconds of work", ".1f"),
    Column("wall", "Seconds waited just now", ".1f"),
)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a stage has cost. `work` is the sum of its tasks' own seconds, whenever they were done;
    `wall` is how long this process waited for the `made` tasks that it had to do."""

    stage: str
    tasks: int
    made: int
    work: float
    wall: float


def measure(evaluation: Evaluation) -> list[Cost]:
    """Ask every question. What the stages have cost."""
    config = evaluation.config
    with pool.connected(config.workers):
        costs = [_run("models", list(_of_models(evaluation)), evaluation, config.workers)]
        texts = {source: evaluation.count(source) for source in evaluation.sources}
        # Few texts are read sooner than a process has started.
        few = sum(texts.values()) <= TEXTS
        workers = replace(config.workers, count=0) if few else config.workers
        for stage, ask in (("texts", "of_texts"), ("corpora", "of_corpus")):
            tasks = [
                task
                for question in config.questions
                for source, count in texts.items()
                for task in getattr(question, ask)(evaluation, source, count)
            ]
            costs.append(_run(stage, tasks, evaluation, workers))
    return costs


def _of_models(evaluation: Evaluation) -> Iterator[Task]:
    """One model after the other, so that a process opens each once."""
    for subject in evaluation.subjects:
        for question in evaluation.config.questions:
            yield from question.of_model(evaluation, subject)


def worker(config: EvaluateConfig) -> Callable[[Task], int]:
    """What a process of the pool does with a task: do it and keep the part. The rows of that."""
    workspace = Workspace(config)

    def work(task: Task) -> int:
        began = time.perf_counter()
        table = task.work(workspace)
        seconds = time.perf_counter() - began
        workspace.parts.write(task.group, task.first, table, {"seconds": seconds})
        return len(table)

    return work


def _run(stage: str, tasks: Sequence[Task], evaluation: Evaluation, workers: PoolConfig) -> Cost:
    """Do the tasks of a stage that are not done yet."""
    parts = evaluation.parts
    present = {group: parts.present(group) for group in {task.group for task in tasks}}
    missing = [task for task in tasks if task.first not in present[task.group]]
    began = shown = time.monotonic()
    if len(missing) < len(tasks):
        say(f"{stage}: {len(tasks) - len(missing)} of {len(tasks)} parts are there already")
    done = rows = 0
    for size in pool.run(missing, partial(worker, evaluation.config), workers):
        done, rows = done + 1, rows + size
        now = time.monotonic()
        if now - shown >= EVERY_S or done == len(missing):
            shown, speed = now, rows / (now - began)
            left = (now - began) / done * (len(missing) - done)
            say(f"{stage}: {done}/{len(missing)}  {speed:,.1f} rows/s  ETA {clock(left)}")
    notes = (note for group in present for note in parts.notes(group))
    work = sum(note["seconds"] for note in notes if note)
    wall = time.monotonic() - began
    return Cost(stage=stage, tasks=len(tasks), made=done, work=work, wall=wall)


def time_table(costs: Sequence[Cost], *, wall: float, config: EvaluateConfig) -> Table:
    """Where the time went since the command began, and how much of it was work.

    Where an earlier attempt has done some of the work, its share of this time is not known.
    """
    processes = max(config.workers.count, 1)
    work = sum(cost.work for cost in costs)
    busy = f", busy {100 * work / processes / wall:.1f} % of the time"
    whole = all(cost.made == cost.tasks for cost in costs)
    rows = [vars(cost) for cost in costs]
    rows.append({"stage": "everything", "work": work, "wall": wall})
    return Table(
        title="Time",
        note=f"Processes: {processes}{busy if whole else ''}. Everything: from the beginning of "
        "this command to its report.",
        columns=TIME,
        rows=rows,
    )
