"""An MLflow server that dies in the middle of a run and comes back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

from infra import journal
from infra.tracking import connect, replay
from tests.faults import processes
from tests.faults.conftest import Cost
from tests.faults.nodes import free_port
from tests.faults.processes import EVERY, STEPS, Begin
from tests.pipelines import tiny


class Server:
    """A real one; started again, it has the same database and the same port."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Returns once it answers."""
        with (self.folder / "mlflow.log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable, "-m", "mlflow", "server",
                    "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1",
                    "--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db",
                    "--artifacts-destination", str(self.folder / "artifacts"),
                ],
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        processes.until(self._answers)

    def kill(self) -> None:
        """SIGKILL for it and the processes it serves with, which are one group."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _answers(self) -> bool:
        assert self.process.poll() is None, (self.folder / "mlflow.log").read_text()
        with suppress(OSError):
            return urllib.request.urlopen(f"{self.uri}/health", timeout=5).status == 200
        return False


def test_a_server_that_dies_and_comes_back(
    undisturbed: Path, finetune: Begin, tmp_path: Path, cost: Cost
) -> None:
    """Training takes no notice; one run, each metric of each step once."""
    server = Server(tmp_path)
    server.start()
    try:
        slowly = "train.validate_every=1"
        with finetune(tmp_path, f"tracking.uri={server.uri}", slowly) as run:
            run.until(lambda: run.step >= EVERY)
            server.kill()
            died = time.time()
            run.until(lambda: run.step >= 2 * EVERY)
            server.start()
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
        server.kill()
    cost(
        "the MLflow server dies and comes back", "nothing; training never waits", time.time() - died
    )
    ours, theirs = tiny.tensors(run.folder, STEPS), tiny.tensors(undisturbed, STEPS)
    assert all(ours[name].equal(theirs[name]) for name in theirs)
