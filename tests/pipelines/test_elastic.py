"""One run on 1, 2, 8 and again 1 workers: the same rows and noise, and the same weights.

Eight processes on any machine: what they compute is tiny.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch

from infra import mixture
from infra.mixture import Mixture
from infra.shards import read_manifest
from infra.storage import Folder
from infra.stream import Plan
from pipelines import finetune
from pipelines.training import worker
from pipelines.training.learner import Microbatches
from pipelines.training.worker import Assignment
from tests.infra.common import alone
from tests.infra.workers import in_workers
from tests.pipelines import tiny

LANES = 8
STAGES = ((1, 3), (2, 6), (8, 9), (1, 12))  # workers, and the step at which they end

Seen = dict[tuple[int, int], np.ndarray]  # (step, lane) -> rows [R, L]


def trained(payload: bytes) -> Seen:
    """Train as one worker of a group; the rows that it was given."""
    assignment: Assignment = cloudpickle.loads(payload)
    seen: Seen = {}

    def watched(order: Mixture, lanes: tuple[int, ...], done: int) -> Iterator[Microbatches]:
        for step, batch in enumerate(mixture.read(order, lanes, done), done + 1):
            seen.update({(step, lane): rows_RL for lane, rows_RL in batch.items()})
            yield batch

    worker.train(assignment, batches=watched)
    return seen


def run(root: Path, data: Path, stages: tuple[tuple[int, int], ...]) -> list[Seen]:
    """What the workers of every stage were given."""
    found: list[Seen] = []

    def start(assignment: Assignment) -> None:
        for workers, last in stages:
            config = assignment.config
            part = replace(config, train=replace(config.train, steps=last))
            payload = cloudpickle.dumps(replace(assignment, config=part))
            found.extend(in_workers(workers, trained, payload))

    argv = [f"data={data}", f"root={root}", "name=run", "init=scratch"]
    more = [f"train.stream.num_lanes={LANES}", "train.stream.rows_per_microbatch=1"]
    with tiny.bare():
        finetune.execute(tiny.load("finetune", *argv, *more), start=start)
    return found


@pytest.mark.long
def test_other_numbers_of_workers_change_nothing(tmp_path: Path, data: Path) -> None:
    changing = run(tmp_path / "changing", data, STAGES)
    constant = run(tmp_path / "constant", data, ((1, 12),))
    assert len(changing) == sum(workers for workers, _ in STAGES)

    # Every microbatch was trained on by one worker, once.
    (whole,) = constant
    together: Seen = {}
    for seen in changing:
        assert not set(seen) & set(together)
        together |= seen
    assert set(together) == set(whole) == {(s, k) for s in range(1, 13) for k in range(LANES)}
    for place, rows_RL in whole.items():
        np.testing.assert_array_equal(together[place], rows_RL)

    # And the rows are those of the plan, none lost and none repeated.
    config: Any = tiny.load("finetune", "name=x", f"data={data}", "init=scratch")
    order = replace(config.train.stream, num_lanes=LANES, rows_per_microbatch=1)
    plan = Plan.of(Folder.at(str(data)), read_manifest(str(data)), "train", order)
    read = mixture.read(alone(plan), tuple(range(LANES)))
    for step, batch in zip(range(1, 13), read, strict=False):
        for lane, rows_RL in batch.items():
            np.testing.assert_array_equal(together[step, lane], rows_RL)

    curves = [tiny.curve(tmp_path / name / "run") for name in ("changing", "constant")]
    assert [row["step"] for row in curves[0]] == list(range(1, 13))
    for ours, theirs in zip(*curves, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    ours, theirs = (tiny.tensors(tmp_path / name / "run") for name in ("changing", "constant"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=2e-5, msg=name)
