"""Independent jobs on a pool of processes, each result as soon as it is ready.

`make` is called once in each process and returns the function that does a job, so that models are
loaded once. A job must be deterministic: if its process dies, it is done again in another.
"""

from __future__ import annotations

import logging
import os
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from infra import cluster
from infra.cluster import ClusterConfig
from infra.errors import ConfigError, InfraError

ATTEMPTS = 4  # at a job whose process dies each time
START_S = 600  # the time an autoscaler has to bring machines

J = TypeVar("J")
R = TypeVar("R")
Make = Callable[[], Callable[[J], R]]


@dataclass(frozen=True, kw_only=True)
class PoolConfig:
    """`count` processes, each with a GPU if `gpu`; 0: this very process, without Ray.

    `threads`: of each process, which reserves as many CPUs. By default it reserves one CPU and
    uses the node's number of cores divided by `count`.
    """

    count: int = 1
    gpu: bool = False
    threads: int | None = None
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ConfigError("pool.count", f"{self.count} is negative", "0 means this process")
        if self.threads is not None and self.threads < 1:
            raise ConfigError("pool.threads", f"{self.threads} is not positive")

    @property
    def cpus(self) -> int:
        """CPUs that a process reserves."""
        return self.threads or 1


class RemoteTraceback(Exception):
    """The traceback of another process, as the cause of an exception in this one."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


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
    if not config.count:
        yield from map(make(), jobs)
    elif jobs:
        with connected(config):
            yield from _through_ray(jobs, make, config)


class _Worker(Generic[J, R]):
    """The actor in a process of the pool; a batch is one job.

    Jobs and results are sent as pickled bytes, because Arrow would turn tuples into lists and
    refuse unknown types. Errors are sent as results, because Ray would wrap them.
    """

    def __init__(self, make: Make[J, R], config: PoolConfig, ledger: Any) -> None:
        import torch

        torch.set_num_threads(config.threads or max(1, (os.cpu_count() or 1) // config.count))
        self._make, self._ledger = make, ledger
        self._work: Callable[[J], R] | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[bytes]]:
        import ray
        from ray import cloudpickle

        (nth,), (job,) = batch["nth"], batch["job"]
        try:
            me = ray.get_runtime_context()
            begun = self._ledger.begin.remote(me.get_actor_id(), me.current_actor, int(nth))
            if ray.get(begun) > ATTEMPTS:
                why = f"the process died at each of {ATTEMPTS} attempts"
                raise InfraError(f"job {nth}", why, "Out of memory? Try smaller batches")
            self._work = self._work or self._make()
            answer = self._work(cloudpickle.loads(job)), None, ""
        except Exception as error:
            answer = None, _portable(error), traceback.format_exc()
        return {"answer": [cloudpickle.dumps(answer)]}


class _Ledger:
    """An actor that knows the processes, and how often each job was begun.

    Ray Data repeats a job whose process dies without a limit. When it is interrupted, it waits for
    every process to finish its job. With the ledger, the limit is ours and processes are killed.
    """

    def __init__(self) -> None:
        self._workers: dict[str, Any] = {}
        self._begun: Counter[int] = Counter()

    def begin(self, worker_id: str, worker: Any, nth: int) -> int:
        self._workers[worker_id] = worker
        self._begun[nth] += 1
        return self._begun[nth]

    def workers(self) -> list[Any]:
        return list(self._workers.values())


def _portable(error: Exception) -> Exception:
    """The error, or one with the same message if it cannot be pickled."""
    from ray import cloudpickle

    try:
        return cloudpickle.loads(cloudpickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


def _through_ray(jobs: Sequence[J], make: Make[J, R], config: PoolConfig) -> Iterator[R]:
    import ray.data
    from ray import cloudpickle

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # errors are raised here as well
    ledger = ray.remote(num_cpus=0, max_restarts=-1)(_Ledger).remote()
    size = min(config.count, len(jobs))
    dataset = ray.data.from_items(
        [{"nth": nth, "job": cloudpickle.dumps(job)} for nth, job in enumerate(jobs)],
        override_num_blocks=len(jobs),
    ).map_batches(
        _Worker,
        fn_constructor_args=(make, config, ledger),
        batch_size=1,
        batch_format="numpy",
        # With more in flight, a job would wait behind a long one while another process is idle.
        compute=ray.data.ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=1),
        num_cpus=config.cpus,
        num_gpus=int(config.gpu),
    )
    dataset.context.execution_options.preserve_order = False
    dataset.context.enable_progress_bars = False
    dataset.context.print_on_execution_start = False
    dataset.context.wait_for_min_actors_s = START_S
    dataset.context.execution_no_progress_timeout_s = -1  # a job may take hours
    # Reading ahead would delay each result until the next one is ready.
    blocks = dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    try:
        for block in blocks:
            for answer in block["answer"].to_pylist():
                result, error, where = cloudpickle.loads(answer)
                if error:
                    raise error from RemoteTraceback(where)
                yield result
    except ray.exceptions.GetTimeoutError as error:
        needs = f"{config.cpus} CPUs" + " and a GPU" * config.gpu
        why = f"no room for {size} processes of {needs} within {START_S / 60:g} minutes"
        raise InfraError("pool", why, "Ask for fewer, or add machines") from error
    except ray.exceptions.RayActorError as error:
        raise InfraError("pool", "a process died while it started", "Out of memory?") from error
    finally:
        with suppress(ray.exceptions.RayError):
            for actor in [*ray.get(ledger.workers.remote()), ledger]:
                ray.kill(actor)
