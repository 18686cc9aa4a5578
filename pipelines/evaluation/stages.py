"""The stages of an evaluation: lists of jobs, done by a pool, of which a restart does the rest."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from infra import pool
from infra.pool import PoolConfig
from pipelines.evaluation import jobs
from pipelines.evaluation.jobs import Job
from pipelines.evaluation.parts import Parts
from pipelines.evaluation.settings import EvaluateConfig
from pipelines.runs import clock, say

EVERY_S = 5.0  # seconds between two lines of progress


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What a stage has cost: `work` is the sum of its jobs' own seconds, whenever they were done,
    `wall` what this process waited for those that it did."""

    name: str
    jobs: int
    made: int
    work: float
    wall: float


def run(
    name: str, todo: Sequence[Job], config: EvaluateConfig, parts: Parts, workers: PoolConfig
) -> Stage:
    """Do what is not done yet of a stage."""
    present = {group: parts.present(group) for group in {job.group for job in todo}}
    missing = [job for job in todo if job.first not in present[job.group]]
    began = shown = time.monotonic()
    if len(missing) < len(todo):
        say(f"{name}: {len(todo) - len(missing)} of {len(todo)} parts are there already")
    done = rows = 0
    for result in pool.run(missing, partial(jobs.worker, config), workers):
        done, rows = done + 1, rows + result.rows
        now = time.monotonic()
        if now - shown >= EVERY_S or done == len(missing):
            shown, speed = now, rows / (now - began)
            left = (now - began) / done * (len(missing) - done)
            say(f"{name}: {done}/{len(missing)}  {speed:,.1f} rows/s  ETA {clock(left)}")
    return Stage(
        name=name,
        jobs=len(todo),
        made=done,
        work=sum(_seconds(parts, present)),
        wall=time.monotonic() - began,
    )


def _seconds(parts: Parts, groups: Mapping[str, object]) -> list[float]:
    return [note["seconds"] for group in groups for note in parts.notes(group) if note]
