"""Training through Ray: what a killed worker loses, and what the number of workers changes.

Three runs of the same twenty steps: by two workers; by two workers of which one is killed with
SIGKILL in step 13, after the checkpoint of step 10; by one worker.
"""

from __future__ import annotations

import os
import signal
import sys
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
from infra import journal
from infra.checkpoints import consolidate
from infra.config import load
from infra.tracking import connect
from pipelines import runs as ritual
from pipelines.finetune import FinetuneConfig, initial
from pipelines.training.launch import TrainingTask
from pipelines.verb import PRESETS

STEPS, KILLED_IN = 20, 13
SETTINGS = [
    "init=scratch",
    "backbone.width=32", "backbone.blocks=2", "backbone.heads=2", "backbone.cond_dim=8",
    "converter.embed_dim=8", "converter.mask_prior=0.5",
    f"train.steps={STEPS}", "train.validate_every=10", "train.checkpoint.every=10",
    "train.stream.num_lanes=2", "train.stream.rows_per_microbatch=4",
    "train.optimizer.lr=0.001", "train.optimizer.warmup=5",
    "workers.parallel.threads=1",
]  # fmt: skip


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


SUPPORT = Mixed(continuous=LogNormal(mu=1.0, sigma=1.0), roar_share=0.5)


def run(root: Path, data: Path, name: str, workers: int, objective: Any) -> dict[str, Any]:
    argv = [f"name={name}", f"root={root}", f"data={data}", f"workers.count={workers}", *SETTINGS]
    config = load(FinetuneConfig, verb="finetune", argv=argv, presets=PRESETS)
    task = TrainingTask(
        config=config,
        verb="finetune",
        kind="dsl",
        objective=objective,
        initial=partial(initial, config),
        tags={},
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
    run(root, tiny_shards, "two", 2, whole)
    run(root, tiny_shards, "killed", 2, killed)
    run(root, tiny_shards, "one", 1, whole)
    assert (root / "was-killed").exists()
    return {name: root / name for name in ("two", "killed", "one")}


def tensors(run: Path) -> dict[str, Tensor]:
    return consolidate(str(run / "checkpoints"), STEPS, "")


def curve(run: Path) -> list[dict[str, float]]:
    """Every metric of every step that does not measure time."""
    rows = journal.read(str(run))
    return [
        {k: v for k, v in row.items() if k != "time" and not k.startswith("speed/")} for row in rows
    ]


def test_a_killed_worker_loses_nothing(runs: dict[str, Path]) -> None:
    """20 steps = 10 + SIGKILL + 10: weights, average, optimizer and metrics, bit for bit."""
    whole, killed = tensors(runs["two"]), tensors(runs["killed"])
    assert whole.keys() == killed.keys()
    assert any(name.startswith("ema.") for name in whole)
    assert any(name.startswith("optimizer.") for name in whole)
    different = [name for name in whole if not torch.equal(whole[name], killed[name])]
    assert not different
    assert curve(runs["two"]) == curve(runs["killed"])
    assert [row["step"] for row in curve(runs["killed"])] == list(range(1, STEPS + 1))


def test_a_killed_run_is_one_mlflow_run_with_each_step_once(runs: dict[str, Path]) -> None:
    client = connect(f"sqlite:///{runs['killed'].parent / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "dsl"]
    found = [
        r for r in client.search_runs([experiment.experiment_id]) if r.info.run_name == "killed"
    ]
    assert [r.info.status for r in found] == ["FINISHED"]
    history = client.get_metric_history(found[0].info.run_id, "loss")
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
