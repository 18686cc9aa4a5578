"""Independent jobs on a pool of processes, each result as soon as it is ready.

`make` is called once in each process and returns the function that does a job, so that models are
loaded once. A job must be deterministic: if its process dies, it is done again in another.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from infra import cluster
from infra.cluster import ClusterConfig
from infra.errors import InfraError

ATTEMPTS = 4  # at a job whose process dies each time

J = TypeVar("J")
R = TypeVar("R")
Make = Callable[[], Callable[[J], R]]


@dataclass(frozen=True, kw_only=True)
class PoolConfig:
    """`count` processes, each with a GPU if `gpu`, without any otherwise; 0: this very process,
    without Ray.

    `threads`: of each process, which reserves as many CPUs. By default it reserves one CPU and
    uses the number of its node's CPUs divided by `count`.
    """

    count: int = 1
    gpu: bool = False
    threads: int | None = None
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError(f"count must be at least 0 (this process), got {self.count}")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads must be at least 1, got {self.threads}")

    @property
    def cpus(self) -> int:
        """CPUs that a process reserves."""
        return self.threads or 1


@contextmanager
def connected(config: PoolConfig) -> Iterator[None]:
    """One Ray for several runs in a row; a run outside of it connects for itself."""
    if not config.count:
        yield
        return
    with cluster.connected(config.cluster, needed_cpus=config.count * config.cpus):
        yield


def run(jobs: Sequence[J], make: Make[J, R], config: PoolConfig) -> Iterator[R]:
    """The result of every job, in the order in which they finish.

    The first exception of a job is raised here and ends the run. InfraError for a job whose process
    dies at every attempt, and for a cluster without room for the processes. The processes end with
    the iterator, also when it is closed early.
    """
    if not jobs:
        return
    if not config.count:
        yield from map(make(), jobs)
    else:
        with connected(config):
            yield from _through_ray(jobs, make, config)


class _Worker:
    """The actor in a process of the pool.

    Jobs and results are sent as pickled bytes, because Ray would make their arrays read-only.
    Errors are sent as results, because Ray would wrap them.
    """

    def __init__(self, make: Make[J, R], config: PoolConfig) -> None:
        if not config.gpu:  # Ray hides a node's GPUs only from processes that have reserved some
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        import torch

        torch.set_num_threads(config.threads or max(1, _cpus_of_node() // config.count))
        self._make = make
        self._work: Callable[[Any], Any] | None = None

    def ready(self) -> None:
        """Returns once the process has started."""

    def work(self, job: bytes) -> bytes:
        from ray import cloudpickle

        try:
            self._work = self._work or self._make()
            answer = self._work(cloudpickle.loads(job)), None, ""
        except Exception as error:
            answer = None, _portable(error), traceback.format_exc()
        return cloudpickle.dumps(answer)


def _cpus_of_node() -> int:
    """As many as Ray says, which knows a container's limit, and no more than there are cores."""
    import ray

    mine = ray.get_runtime_context().get_node_id()
    told = [node["Resources"].get("CPU", 1) for node in ray.nodes() if node["NodeID"] == mine]
    return min(int(told[0]), os.cpu_count() or 1)


def _portable(error: Exception) -> Exception:
    """The error, or one with the same message if it cannot be pickled."""
    from ray import cloudpickle

    try:
        return cloudpickle.loads(cloudpickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


def _through_ray(jobs: Sequence[J], make: Make[J, R], config: PoolConfig) -> Iterator[R]:
    import ray
    from ray import cloudpickle
    from ray.exceptions import OutOfMemoryError, RayActorError

    actor = ray.remote(
        num_cpus=config.cpus,
        num_gpus=int(config.gpu),
        max_restarts=-1,  # of a process, whose job is what is given up
        max_task_retries=ATTEMPTS - 1,
    )(_Worker)
    actors = [actor.remote(make, config) for _ in range(min(config.count, len(jobs)))]
    waiting = list(range(len(jobs)))[::-1]
    running: dict[Any, tuple[int, Any]] = {}  # what a call returns: its job and its actor

    def assign(worker: Any) -> None:
        if waiting:
            nth = waiting.pop()
            running[worker.work.remote(cloudpickle.dumps(jobs[nth]))] = nth, worker

    try:
        _wait_for_room(actors, config)
        for worker in actors:
            assign(worker)
        while running:
            (done,), _ = ray.wait(list(running))
            nth, worker = running.pop(done)
            try:
                result, error, where = cloudpickle.loads(ray.get(done))
            except (RayActorError, OutOfMemoryError) as error:
                why = f"the process died at each of {ATTEMPTS} attempts"
                fix = "Out of memory? Try smaller batches"
                raise InfraError(f"job {nth}", why, fix) from error
            if error:
                error.add_note(f"\nIn the process of the pool:\n{where}")
                raise error
            assign(worker)  # first, so that the process works on while the result is used
            yield result
    finally:
        for worker in actors:
            ray.kill(worker)


def _wait_for_room(actors: Sequence[Any], config: PoolConfig) -> None:
    """Wait until every process has started; InfraError if the cluster has no room for them."""
    import ray

    try:
        ray.get([worker.ready.remote() for worker in actors], timeout=cluster.START_S)
    except ray.exceptions.GetTimeoutError as error:
        needs = f"{config.cpus} CPUs" + " and a GPU" * config.gpu
        within = f"within {cluster.START_S / 60:g} minutes"
        why = f"no room for {len(actors)} processes of {needs} {within}"
        raise InfraError("pool", why, "Ask for fewer, or add machines") from error
    except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError) as error:
        raise InfraError("pool", "a process died while it started", "Out of memory?") from error
