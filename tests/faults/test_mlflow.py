"""An MLflow server that dies in the middle of a run and comes back."""

from __future__ import annotations

import time
from pathlib import Path

from infra import journal
from infra.tracking import connect, replay
from tests.faults.conftest import Cost
from tests.faults.processes import EVERY, STEPS, Begin
from tests.infra.common import MLflowServer
from tests.pipelines import tiny


def test_a_server_that_dies_and_comes_back(
    undisturbed: Path, finetune: Begin, tmp_path: Path, cost: Cost
) -> None:
    """Training takes no notice; one run, each metric of each step once."""
    server = MLflowServer(tmp_path, f"sqlite:///{tmp_path}/mlflow.db")
    server.up()
    try:
        slowly = "train.validate_every=1"
        with finetune(tmp_path, f"tracking.uri={server.uri}", slowly) as run:
            run.until(lambda: run.step >= EVERY)
            server.down()
            died = time.time()
            run.until(lambda: run.step >= 2 * EVERY)
            server.up()
            assert run.wait() == 0, run.said
        replay(str(run.folder))  # what a server too slow for the run's patience has not heard
        client = connect(server.uri)
        (experiment,) = [e for e in client.search_experiments() if e.name == "dsl"]
        (found,) = client.search_runs([experiment.experiment_id])
        assert found.info.status == "FINISHED"
        rows = journal.read(str(run.folder))
        for name in ("loss", "grad_norm", "speed/tokens_per_s"):
            history = client.get_metric_history(found.info.run_id, name)
            assert [metric.step for metric in history] == list(range(1, STEPS + 1))
            assert [metric.value for metric in history] == [row[name] for row in rows]
    finally:
        server.down()
    cost(
        "the MLflow server dies and comes back", "nothing; training never waits", time.time() - died
    )
    ours, theirs = tiny.tensors(run.folder, STEPS), tiny.tensors(undisturbed, STEPS)
    assert all(ours[name].equal(theirs[name]) for name in theirs)
