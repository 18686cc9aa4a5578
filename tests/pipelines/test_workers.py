"""Training through Ray: what a killed worker loses, and what the number of workers changes.

Three runs of the same twenty steps: by two workers of Ray Train, of which one is killed with
SIGKILL in step 13, after the checkpoint of step 10; by two plain processes, without Ray; by this
process alone.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ray import cloudpickle
from torch import Tensor

from dsl.denoiser import Denoiser
from dsl.objective import DSLObjective, Loss
from dsl.support import LogNormal, Mixed
from infra.tracking import connect
from pipelines import runs as ritual
from pipelines.finetune import initial
from pipelines.training import worker
from pipelines.training.launch import TrainingTask
from tests.infra.workers import in_workers
from tests.pipelines import tiny
from tests.pipelines.tiny import curve

STEPS, KILLED_IN = 20, 13
SETTINGS = [
    "init=scratch", "backbone.width=32", f"train.steps={STEPS}", "train.validate_every=10",
    "train.validation_microbatches=4", "train.checkpoint.every=10", "train.optimizer.lr=0.001",
    "train.optimizer.ema=0.999", "tracking.uri=null",
]  # fmt: skip
SUPPORT = Mixed(continuous=LogNormal(mu=1.0, sigma=1.0), roar_share=0.5)


class KilledOnce(DSLObjective):
    """Dies with its process in the first forward of step `KILLED_IN`, once in the life of a run."""

    def __init__(self, denoiser: Denoiser, marker: Path) -> None:
        super().__init__(denoiser, SUPPORT)
        self.marker = marker
        self.forwards = 0

    def forward(self, tokens_BL: Tensor, generator: torch.Generator) -> Loss:
        self.forwards += self.training
        if self.forwards == KILLED_IN and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(tokens_BL, generator)


def in_two(assignment: worker.Assignment) -> None:
    in_workers(2, worker.train, assignment)


def run(
    root: Path,
    data: Path,
    name: str,
    workers: int,
    objective: Any,
    start: Callable[[worker.Assignment], None] | None,
) -> dict[str, Any]:
    argv = [f"name={name}", f"root={root}", f"data={data}", f"workers.count={workers}", *SETTINGS]
    config = tiny.load("finetune", *argv)
    task = TrainingTask(
        config=config,
        verb="finetune",
        kind="dsl",
        objective=objective,
        initial=partial(initial, config),
        tags={},
        start=start,
    )
    return ritual.carry_out(task)


@pytest.fixture(scope="module")
def runs(
    ray_cluster: None, tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path
) -> dict[str, Path]:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    root = tmp_path_factory.mktemp("runs")
    whole = partial(DSLObjective, support=SUPPORT)
    killed = partial(KilledOnce, marker=root / "was-killed")
    run(root, tiny_shards, "two", 2, whole, in_two)
    run(root, tiny_shards, "killed", 2, killed, None)
    run(root, tiny_shards, "one", 1, whole, worker.train)
    assert (root / "was-killed").exists()
    return {name: root / name for name in ("two", "killed", "one")}


def test_a_killed_worker_loses_nothing(runs: dict[str, Path]) -> None:
    """20 steps = 10 + SIGKILL + 10, and Ray's workers = plain processes, bit for bit."""
    tiny.assert_same(runs["killed"], runs["two"], STEPS)


def test_a_killed_run_is_one_mlflow_run_with_each_step_once(runs: dict[str, Path]) -> None:
    client = connect(f"sqlite:///{runs['killed'].parent / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("dsl")
    named = "attributes.run_name = 'killed'"
    (found,) = client.search_runs([experiment.experiment_id], named)
    assert found.info.status == "FINISHED"
    history = client.get_metric_history(found.info.run_id, "loss")
    assert [m.step for m in history] == list(range(1, STEPS + 1))
    assert [m.value for m in history] == [row["loss"] for row in curve(runs["killed"])]


def test_the_number_of_workers_changes_only_rounding(runs: dict[str, Path]) -> None:
    """Same rows, same noise: the first step's losses are identical, the last close to 1e-5."""
    two, one = curve(runs["two"]), curve(runs["one"])
    first = {k: v for k, v in two[0].items() if k not in ("grad_norm",)}
    assert first == {k: one[0][k] for k in first}
    assert two[-1]["loss"] == pytest.approx(one[-1]["loss"], rel=1e-5)
    for name in ("loss", "endpoint_bound", "hybrid_bound"):
        key = f"validation/{name}"
        assert two[-1][key] == pytest.approx(one[-1][key], rel=1e-5)
    assert two[0]["loss"] > two[-1]["loss"]
