"""All that a run depends on, real and breakable, and the operator who starts the run again."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from infra import journal
from tests.faults import nodes, processes
from tests.faults.nodes import Nodes
from tests.faults.processes import Run
from tests.infra.common import until
from tests.infra.faulty import BUCKET, FaultyStore
from tests.pipelines import tiny
from tests.services import mlflow_server
from tests.services.mlflow_server import ADMIN, DeployedServer

ROOT, NAME = f"s3://{BUCKET}/runs", "run"
EVERY = 10  # steps from one checkpoint to the next
# How a run may end before its last step: the store or Ray failed, SIGTERM (before and after the
# verb listens to it), SIGKILL.
ENDS = {4, 143, -signal.SIGTERM, -signal.SIGKILL}


class Operator:
    """Gives the same command again whenever the run has ended before its last step."""

    def __init__(self, command: Callable[[], Run], store: FaultyStore) -> None:
        self._command, self._store = command, store
        self.run = command()
        self.codes: list[int] = []

    def done(self) -> bool:
        """Whether the run has ended well; a run that has ended otherwise is started again."""
        code = self.run.process.poll()
        if code is None:
            return False
        self.codes.append(code)
        if code == 0:
            return True
        assert code in ENDS, self.run.said
        self.run = self._command()
        return False

    def rows(self) -> list[dict[str, float]]:
        """The journal as the store has it, which is that of the last step or of the one before."""
        content = self._store.peek(f"runs/{NAME}/{journal.NAME}")
        return [row for row, _ in journal.parse(content, journal.NAME)]

    def workers(self) -> list[int]:
        """The two training processes, once there are two."""

        def both() -> list[int]:
            assert not self.done(), "the run has ended"
            found = nodes.workers()
            return found if len(found) == 2 else []

        found: list[int] = until(both, processes.PATIENCE_S)
        return found


@dataclass(frozen=True, kw_only=True)
class World:
    """disk: a small one that holds the temporary files of the run's processes. home: their home
    folder."""

    store: FaultyStore
    server: DeployedServer
    nodes: Nodes
    disk: Path
    home: Path

    def begin(self, root: Path | str, logs: Path, steps: int, *argv: str) -> Run:
        """Start the run in a process of its own."""
        data = f"s3://{BUCKET}/data"
        given = [
            f"train.steps={steps}", f"train.checkpoint.every={EVERY}",
            # They take their time, so that there is some for faults.
            "train.validate_every=1", "train.bound_samples=8",
        ]  # fmt: skip
        return processes.begin(self.nodes.address, data, root, logs, *given, *argv)

    def operator(self, logs: Path, steps: int) -> Operator:
        """Of the run on the store, which is shown on the server."""
        command = partial(self.begin, ROOT, logs, steps, f"tracking.uri={self.server.uri}")
        return Operator(command, self.store)


@contextmanager
def made(folder: Path) -> Iterator[World]:
    """Everything started, below a folder, for the duration of the block; no process outlives it."""
    disk, home, servers = (folder / name for name in ("disk", "home", "server"))
    home.mkdir()
    servers.mkdir()
    with (
        _small(disk),
        mlflow_server.deployed(servers) as server,
        FaultyStore() as store,
        pytest.MonkeyPatch.context() as patch,
    ):
        store.filesystem.put(f"{tiny.shards(folder / 'data')}/", f"{BUCKET}/data/", recursive=True)
        for name, value in {
            "TMPDIR": str(disk),
            "HOME": str(home),
            "MLFLOW_TRACKING_USERNAME": ADMIN[0],
            "MLFLOW_TRACKING_PASSWORD": ADMIN[1],
        }.items():
            patch.setenv(name, value)
        with nodes.started(dashboard=False) as cluster:
            yield World(store=store, server=server, nodes=cluster, disk=disk, home=home)
        until(lambda: not _with(disk))


@contextmanager
def _small(folder: Path) -> Iterator[None]:
    """A disk of 16 MiB, mounted at a folder."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted: run as root")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def _with(disk: Path) -> list[bytes]:
    """The command lines of the processes that have the disk for their temporary files."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has just ended, or belongs to another user
            if f"TMPDIR={disk}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append((process / "cmdline").read_bytes())
    return found
