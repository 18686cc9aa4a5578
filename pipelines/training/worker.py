"""What one training process does. Ray Train calls `in_ray`; without Ray, call `train`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np

from dsl.denoiser import Denoiser
from dsl.objective import Objective
from infra import parallel, ranklog, readahead, stream
from infra.errors import DataError
from infra.mixture import Mixture, MixtureConfig, read
from infra.shards import Manifest
from infra.storage import Folder
from pipelines import models
from pipelines.kinds import KINDS
from pipelines.runs import Run
from pipelines.training import loop
from pipelines.training.learner import Microbatches
from pipelines.training.monitor import Monitor, Show
from pipelines.training.progress import gauges
from pipelines.training.settings import RunConfig, TrainConfig

# (order of the rows, lanes, steps done) -> the microbatches of the steps that follow
Batches = Callable[[Mixture, tuple[int, ...], int], Iterator[Microbatches]]


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """What every training process of a run is sent.

    kind: what the weights are trained for. began: when the run was first started, seconds since
    the epoch.
    """

    verb: str
    config: RunConfig
    kind: str
    manifests: Mapping[str, Manifest]
    objective: Callable[[Denoiser], Objective]
    run: Run
    began: float


def _unseen(step: int, metrics: Mapping[str, float]) -> None:
    """Show nothing."""


def in_ray(assignment: Assignment) -> None:
    """Train as one process of the group that Ray Train has started."""
    import ray.train

    # Ray announces every report on the console, in a logger that its own setting does not reach.
    logging.getLogger().setLevel(logging.WARNING)
    first = parallel.world()[0] == 0
    shown = gauges(assignment.config.name) if first else nullcontext(_unseen)
    with parallel.flushed(), shown as show:
        train(assignment, batches=readahead.ray_batches, reports=ray.train.report, show=show)


def train(
    assignment: Assignment,
    *,
    batches: Batches = read,
    reports: Callable[[dict[str, float]], None] = lambda metrics: None,
    show: Show = _unseen,
) -> None:
    """Train as one process of a group, or as the only one; `reports` and `show` as Monitor has
    them."""
    from infra.checkpoints import Checkpoints  # half a second that `--help` is not to pay

    config, run = assignment.config, assignment.run
    settings, mixture = config.train, config.mixture
    order = Mixture.of(mixture, assignment.manifests, "train", settings.stream)
    checkpoints = Checkpoints(
        run.folder / "checkpoints",
        keep=settings.checkpoint.keep,
        milestone_every=settings.checkpoint.milestone_every,
        max_failures=settings.checkpoint.max_failures,
        permit=run.lease.confirm,
        corrupt=settings.checkpoint.corrupt,
    )
    trusted = config.trust_remote_code
    initial = models.load_folder(run.folder / "init", trust_remote_code=trusted).denoiser
    with ranklog.kept(run.folder):
        loop.train(
            assignment.objective(config.trained(initial)),
            settings,
            config.workers.parallel,
            data=loop.Data(
                batches=partial(batches, order),
                schedule=order,
                validation=validation_rows(mixture, assignment.manifests, settings),
                counts=partial(_skipped, order),
            ),
            bounds=KINDS[assignment.kind].bounds,
            checkpoints=checkpoints,
            monitor=Monitor(
                run=run,
                what=f"{assignment.verb} {config.name}",
                began=assignment.began,
                stall_s=config.workers.parallel.stall_s,
                reports=reports,
                show=show,
            ),
        )


def _skipped(order: Mixture) -> Mapping[str, float]:
    """How many rows this worker has skipped, where damaged shards do not stop the run."""
    if order.plans[0].config.corrupt == "stop":
        return {}
    return {"data/skipped_rows": sum(sum(plan.skipped.values()) for plan in order.plans)}


def validation_rows(
    mixture: MixtureConfig, manifests: Mapping[str, Manifest], config: TrainConfig
) -> dict[str, np.ndarray]:
    """Held-out rows ``[N, L]`` of every source: whole microbatches, equally many for every lane."""
    share = config.stream.rows_per_step
    made = {}
    for name, url in mixture.sources.items():
        data, manifest = Folder.at(url), manifests[name]
        held = sum(file.rows for file in manifest.splits.get("validation", ()))
        wanted = min(config.validation_microbatches, held // share) * share
        if not wanted:
            raise DataError(
                (data / "validation").url,
                f"{held} rows, where the lanes take {share} at a time",
                "Prepare a larger validation split, or train with fewer lanes or rows per "
                "microbatch",
            )
        seed = config.stream.seed
        made[name] = stream.holdout(data, manifest, "validation", wanted, seed)
    return made
