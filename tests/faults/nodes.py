"""A Ray cluster of several nodes on this machine, each with processes that can be killed."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.infra.common import free_port


class Nodes:
    """A head with no room for workers, and nodes with room for one each."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0,
                # Without one Ray Train complains of it in every second line.
                "include_dashboard": True,
                "dashboard_port": free_port(),
                # Ray's default is the lowest priority, with which a busy machine starts nothing.
                "_system_config": {"worker_niceness": 0},
            },
        )
        for _ in range(2):
            self.add()

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def add(self) -> None:
        self.cluster.add_node(num_cpus=1)

    def lose(self, pid: int) -> None:
        """SIGKILL for everything on the node of a process."""
        self.cluster.remove_node(self._node_of(pid), allow_graceful=False)

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
