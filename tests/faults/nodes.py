"""A Ray cluster of several nodes on this machine, each with processes that can be killed."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import pytest

from tests.conftest import ROOT
from tests.infra.common import free_port

T = TypeVar("T")


class Nodes:
    """A head with no room for workers, and nodes with room for one each.

    dashboard: ten processes. Without them Ray Train complains in every second line.
    """

    def __init__(self, *, dashboard: bool = True) -> None:
        self.port = free_port()
        self.head = {
            "gcs_server_port": self.port,
            "dashboard_port": free_port(),
            "include_dashboard": dashboard,
        }

    def start(self) -> None:
        from ray.cluster_utils import Cluster

        given = {
            **self.head,
            "num_cpus": 0,
            # Ray's default is the lowest priority, with which a busy machine starts nothing.
            "_system_config": {"worker_niceness": 0},
        }
        self.cluster = patiently(lambda: Cluster(initialize_head=True, head_node_args=given))
        for _ in range(2):
            self.add()

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def add(self) -> None:
        patiently(lambda: self.cluster.add_node(num_cpus=1))

    def lose(self, pid: int) -> None:
        """SIGKILL for everything on the node of a process."""
        self.cluster.remove_node(self._node_of(pid), allow_graceful=False)

    def lose_all(self) -> None:
        """SIGKILL for everything on all nodes; then a cluster as new, at the same address."""
        for node in reversed(self.cluster.list_all_nodes()):  # the head last
            self.cluster.remove_node(node, allow_graceful=False)
        self.start()

    def id_of(self, pid: int) -> str:
        """Ray's id of the node of a process."""
        return str(self._node_of(pid).node_id)

    def shutdown(self) -> None:
        self.cluster.shutdown()

    def _node_of(self, pid: int) -> Any:
        parents = ancestors(pid)
        for node in self.cluster.worker_nodes:
            raylets = {info.process.pid for info in node.all_processes["raylet"]}
            if raylets & parents:
                return node
        raise LookupError(f"process {pid} is on none of the nodes")


@contextmanager
def started(*, dashboard: bool = True) -> Iterator[Nodes]:
    """The cluster, for the duration of the block."""
    with (
        tempfile.TemporaryDirectory(prefix="ray-") as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        # Workers unpickle functions of this repository by name, so they must find it.
        patch.setenv("PYTHONPATH", str(ROOT))
        # Other Rays of this machine are not to find this one, which they would ask of themselves.
        patch.setenv("RAY_TMPDIR", folder)
        found = Nodes(dashboard=dashboard)
        # Nor is Ray Train to look for its controller in one of those, which would have none.
        patch.setenv("RAY_ADDRESS", f"127.0.0.1:{found.port}")
        found.start()
        try:
            yield found
        finally:
            found.shutdown()


def patiently(start: Callable[[], T]) -> T:
    """What `start` returns. Ray gives a node 30 s, in which a busy machine may not start it; then
    what was started is ended, and started again."""
    for _ in range(9):
        before = descendants(os.getpid())
        try:
            return start()
        except Exception as error:  # Ray's is of no other class; see `ray._private.node`
            if "timed out" not in str(error) and not isinstance(error, TimeoutError):
                raise
            for pid in descendants(os.getpid()) - before:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    return start()


def workers() -> list[int]:
    """The training processes on the nodes, in the order in which they were started."""
    return sorted(pid for pid in descendants(os.getpid()) if _is_worker(pid))


def alive(pid: int) -> bool:
    return _stat(pid)[0] not in "ZX"


def descendants(pid: int) -> set[int]:
    """The pids of a process's children, theirs, and so on."""
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    parents = {child: _stat(child)[1] for child in pids}
    found, new = set(), {pid}
    while new:
        new = {child for child, parent in parents.items() if parent in new} - found
        found |= new
    return found


def ancestors(pid: int) -> set[int]:
    found: set[int] = set()
    while pid > 1:
        pid = _stat(pid)[1]
        found.add(pid)
    return found


def _stat(pid: int) -> tuple[str, int]:
    """State and parent of a process; X is gone."""
    with suppress(FileNotFoundError, ProcessLookupError):
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
        return state, int(parent)
    return "X", 0


def _is_worker(pid: int) -> bool:
    with suppress(FileNotFoundError, ProcessLookupError):
        return b"RayTrainWorker" in Path(f"/proc/{pid}/cmdline").read_bytes() and alive(pid)
    return False
