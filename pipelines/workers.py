"""Which processes train, and Ray Train's part in that: everything else works without it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from infra import cluster, parallel, stream
from infra.cluster import ClusterConfig
from infra.parallel import ParallelConfig
from pipelines.gauges import Gauges
from pipelines.training import TrainConfig


@dataclass(frozen=True, kw_only=True)
class WorkersConfig:
    """How many processes train, and on what. Restarts go on from the last checkpoint.

    `count` is a number, or [least, most]: as many as the cluster has room for, fewer when a node
    is lost and more when one joins, of which `resize_s` is how often it is asked.
    `gpu_share`: of a GPU, for a single process that leaves the rest to others.
    """

    count: int | tuple[int, int] = 1
    resize_s: float = 300.0
    gpu: bool = False
    gpu_share: float = 1.0
    max_failures: int = 3
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        if not self.counts or self.counts[0] < 1:
            raise ValueError(f"count must be at least 1, or [least, most], got {self.count}")
        if not self.resize_s > 0:
            raise ValueError(f"resize_s must be positive, got {self.resize_s}")
        if not 0 < self.gpu_share <= 1:
            raise ValueError(f"gpu_share must be in (0, 1], got {self.gpu_share}")
        if self.gpu_share < 1 and self.most > 1:
            raise ValueError(f"gpu_share is for one process, and count is {self.count}")

    @property
    def counts(self) -> range:
        """Each number of processes that may come to train."""
        least, most = (self.count, self.count) if isinstance(self.count, int) else self.count
        return range(least, most + 1)

    @property
    def most(self) -> int:
        return self.counts[-1]

    @property
    def shown(self) -> str:
        """The number, or both ends of the range, for a person."""
        return f"{self.counts[0]} to {self.most}" if len(self.counts) > 1 else f"{self.most}"

    @property
    def resources(self) -> dict[str, float]:
        """What each process reserves."""
        return {"CPU": 1.0, **({"GPU": self.gpu_share} if self.gpu else {})}


@dataclass(frozen=True, kw_only=True)
class Training:
    """How weights are trained, and on what."""

    train: TrainConfig = field(default_factory=TrainConfig)
    workers: WorkersConfig = field(default_factory=WorkersConfig)

    def __post_init__(self) -> None:
        for count in self.workers.counts:
            if self.train.stream.num_lanes % count:
                raise ValueError(
                    f"train.stream.num_lanes ({self.train.stream.num_lanes}) must be a multiple of "
                    f"workers.count ({count}), or workers would hold unequal shares"
                )


def fit(
    config: WorkersConfig,
    train: Callable[..., None],
    *,
    name: str,
    callbacks: Sequence[Any] = (),
) -> None:
    """Call `train(batches=, report=, show=)` in every worker of a group on the cluster.

    name: of the run; callbacks: of Ray Train.
    """
    with cluster.connected(config.cluster, needed_cpus=config.most):
        cluster.fit(
            worker,
            {"train": train, "name": name},
            name=name,
            num_workers=config.count,
            use_gpu=config.gpu,
            resources_per_worker=config.resources,
            max_failures=config.max_failures,
            resize_s=config.resize_s,
            callbacks=callbacks,
        )


def worker(payload: dict[str, Any]) -> None:
    """One of the training processes, inside Ray Train."""
    import ray.train

    # Ray announces every report on the console, in a logger that its own setting does not reach.
    logging.getLogger().setLevel(logging.WARNING)
    with parallel.flushed():
        payload["train"](
            batches=stream.ray_batches,
            report=lambda metrics: ray.train.report(metrics),
            show=None if parallel.world()[0] else Gauges(payload["name"]).log,
        )
