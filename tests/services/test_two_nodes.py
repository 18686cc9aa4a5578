"""Two nodes by Ray's own commands, as infra/README.md describes them, and one that is lost."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra import journal
from infra.cluster import QUIET
from infra.head import EXCLUDES, RAY
from tests.conftest import ROOT
from tests.faults import nodes
from tests.faults.processes import PATIENCE_S, Run
from tests.infra.common import free_port, until
from tests.pipelines import tiny

STEPS, EVERY = 120, 10
SETTINGS = [
    *tiny.SETTINGS["finetune"], "init=scratch", f"train.steps={STEPS}", "train.validate_every=1",
    f"train.checkpoint.every={EVERY}", "train.stream.num_lanes=6",
]  # fmt: skip


class Cluster:
    """A head and a second node with 2 CPUs each, on 127.0.0.1 behind a token."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[subprocess.Popen[bytes]] = []
        token = folder / "token"
        token.touch(0o600)
        token.write_text(secrets.token_hex(32))
        kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        python = str(Path(sys.executable).parent)  # the one that jobs find first
        self.address = f"127.0.0.1:{free_port()}"
        self.without = {
            **kept, **QUIET, "PATH": os.pathsep.join([python, os.environ["PATH"]]),
            "RAY_AUTH_MODE": "token", "RAY_ADDRESS": self.address,
        }  # fmt: skip
        self.environment = {**self.without, "RAY_AUTH_TOKEN_PATH": str(token)}
        self.token = token.read_text()
        self.page = f"http://127.0.0.1:{free_port()}"

    def up(self) -> None:
        """Returns once both nodes are there."""
        self.start(
            "--head", f"--port={self.address.partition(':')[2]}", "--dashboard-host=127.0.0.1",
            f"--dashboard-port={self.page.rpartition(':')[2]}",
            f"--ray-client-server-port={free_port()}",
        )  # fmt: skip
        until(lambda: self.ask(self.token) == 200, PATIENCE_S)
        self.start(f"--address={self.address}")
        until(lambda: self.status().count(" node_") == 2, PATIENCE_S)

    def start(self, *arguments: str) -> None:
        folder = self.folder / f"ray{len(self.started)}"
        with (self.folder / f"{folder.name}.log").open("wb") as output:
            node = subprocess.Popen(
                [RAY, "start", "--block", "--node-ip-address=127.0.0.1", "--min-worker-port=0",
                 "--max-worker-port=0", "--num-cpus=2", "--object-store-memory=200000000",
                 "--dashboard-agent-listen-port=0", f"--temp-dir={folder}", *arguments],
                env=self.environment, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
        self.started.append(node)

    def lose(self, index: int) -> None:
        """SIGKILL for everything on a node."""
        node = self.started[index]
        for pid in (node.pid, *nodes.descendants(node.pid)):
            os.kill(pid, signal.SIGKILL)
        node.wait()

    def submit(self, environment: dict[str, str], log: Path, *command: str) -> Run:
        """`ray job submit` of a verb that works on `run` beside the log."""
        with log.open("wb") as output:
            process = subprocess.Popen(
                [RAY, "job", "submit", "--address", self.page, "--working-dir", ROOT,
                 "--runtime-env-json", json.dumps({"excludes": EXCLUDES}), "--", *command],
                env=environment, stdout=output, stderr=output,
            )  # fmt: skip
        return Run(log.parent / "run", process, log)

    def status(self) -> str:
        """What `ray status` says."""
        done = subprocess.run([RAY, "status"], env=self.environment, capture_output=True, text=True)
        return done.stdout

    def ask(self, token: str) -> int:
        """The HTTP status of the Jobs API."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        request = urllib.request.Request(f"{self.page}/api/jobs/", headers=headers)
        try:
            return urllib.request.urlopen(request, timeout=60).status
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def down(self) -> None:
        """SIGTERM as for a `ray start` of one's own, and the end of whatever is left after it."""
        for node in self.started:
            if node.poll() is None:
                left = nodes.descendants(node.pid)
                node.terminate()
                node.wait(PATIENCE_S)
                for pid in filter(nodes.alive, left):
                    os.kill(pid, signal.SIGKILL)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="two-") as folder:  # short, as sockets need
        found = Cluster(Path(folder))
        try:
            found.up()
            yield found
        finally:
            found.down()


def test_a_job_of_more_workers_than_a_node_has_room_for_outlives_a_node(
    cluster: Cluster, tmp_path: Path
) -> None:
    data = tiny.shards(tmp_path / "data")
    command = [
        "python", "pipelines/finetune.py", "name=run", f"root={tmp_path}", f"data={data}",
        "workers.count=[1, 3]", *SETTINGS,
    ]  # fmt: skip
    assert [cluster.ask(token) for token in ("", "wrong")] == [401, 403]
    refused = cluster.submit(cluster.without, tmp_path / "refused.txt", *command)
    assert refused.wait() != 0
    assert not refused.folder.exists()

    run = cluster.submit(cluster.environment, tmp_path / "said.txt", *command)
    run.until(lambda: run.checkpoints and len(nodes.workers()) == 3)
    spread = [set(nodes.workers()) & nodes.descendants(node.pid) for node in cluster.started]
    assert sorted(map(len, spread)) == [1, 2], "the workers fit on one node"
    cluster.lose(1)
    assert run.wait() == 0, run.said

    rows = journal.read(str(run.folder))
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[0]["speed/workers"] == 3
    assert rows[-1]["speed/workers"] in (1, 2)
    # Whatever the number of workers, the same rows and noise.
    tiny.execute("finetune", "name=alone", f"root={tmp_path}", f"data={data}", *SETTINGS)
    alone = journal.read(str(tmp_path / "alone"))
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in alone], rel=1e-3)
