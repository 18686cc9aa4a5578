"""From a configuration to a registered model: what `pretrain` and `finetune` share on the driver.

The driver checks the data, writes the initial weights into the run directory, opens the MLflow
run, starts the workers, and turns the last checkpoint's averaged weights into a model. Every step
of it may be cut off: the same command picks up what is there.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np

from dsl.denoiser import Denoiser
from dsl.objective import Objective
from dsl.vocabulary import Vocabulary
from infra import journal, ranklog, stream, tracking
from infra.errors import DataError
from infra.lease import Lease
from infra.notices import Notices, node_is_going
from infra.parallel import world
from infra.shards import Manifest, read_manifest
from infra.storage import Folder
from infra.stream import Plan
from infra.termination import Terminated, noticed
from infra.tracking import RunHandle
from pipelines import models, runs, workers
from pipelines.kinds import KINDS
from pipelines.runs import RESULT, say
from pipelines.training import Log, TrainConfig, train
from pipelines.verb import TrackingConfig
from pipelines.workers import Training

H100_FLOPS = 0.4 * 989e12  # bf16, at a model FLOPs utilisation of 40 %


@dataclass(frozen=True, kw_only=True)
class RunConfig(Training):
    """What every training run has.

    `name` is its directory in `root`. If that exists, `existing` says whether to go on from there
    or to wipe it. `register` names the model in the registry; null registers nothing.
    """

    name: str
    data: str
    root: str = "runs"
    existing: Literal["resume", "restart"] = "resume"
    register: str | None = None
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", self.name):
            raise ValueError(f"name must be letters, digits, _ . - only, got {self.name!r}")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker is sent."""

    config: RunConfig
    kind: str
    manifest: Manifest
    objective: Callable[[Denoiser], Objective]
    handle: RunHandle
    lease: Lease
    began: float  # seconds since the epoch


def plan(config: RunConfig, denoiser: Denoiser) -> dict[str, Any]:
    """What a run would take, for `--dry-run`."""
    manifest = read_manifest(config.data)
    rows = config.train.stream.num_lanes * config.train.stream.rows_per_microbatch
    tokens = config.train.steps * rows * manifest.length
    parameters = sum(p.numel() for p in denoiser.parameters())
    flops = denoiser.backbone.flops_per_token(manifest.length) * tokens
    return {
        "run": (Folder.at(config.root) / config.name).url,
        "workers": config.workers.shown,
        "parameters": parameters,
        "steps": config.train.steps,
        "tokens": tokens,
        "epochs": round(config.train.steps * rows / manifest.rows("train"), 2),
        # Weights, their average and AdamW's two moments, in float32.
        "checkpoint_bytes": 4 * 4 * parameters,
        "training_flops": flops,
        "h100_hours_at_40_percent": round(flops / H100_FLOPS / 3600, 4),
    }


def launch(
    config: RunConfig,
    *,
    verb: str,
    kind: str,
    objective: Callable[[Denoiser], Objective],
    initial: Callable[[Manifest, Vocabulary], Denoiser],
    tags: Mapping[str, str],
    parent: str | None = None,
    fit: Callable[[Job], None] | None = None,
) -> dict[str, Any]:
    """Run `verb` to its end, from wherever an earlier attempt left it; what was made.

    kind: what the weights are trained for, written beside them. initial: the starting weights,
    asked for once in the life of a run. tags: lineage for the MLflow run. parent: the id of the
    MLflow run to show it under. fit: what to train with instead of Ray Train on a cluster.
    """
    from infra.checkpoints import committed, drop_damaged  # half a second, not for `--help`

    with runs.opened(config, verb) as held:
        folder = held.run
        if folder.exists(RESULT):
            before = runs.result(folder, "run", "register")
            if before["register"] == config.register:
                say(f"{folder.url} is finished; existing=restart would make it anew")
                return before
        manifest = read_manifest(config.data)
        vocabulary = models.vocabulary_of(manifest, Folder.at(config.data))
        # What the workers would stumble over is found here, before any of them is started.
        Plan.of(Folder.at(config.data), manifest, "train", config.train.stream)
        _validation_rows(Folder.at(config.data), manifest, config.train)
        with runs.beginning(folder, config, verb):
            init, length = folder / "init", manifest.length
            if not models.exists(init):
                models.save(
                    init, initial(manifest, vocabulary), vocabulary, kind=kind, length=length
                )
            handle = runs.start(config, verb, manifest, tags, parent)
        say(f"run {folder.url}; metrics: {tracking.page(handle)}")
        with runs.ending(handle):
            if config.train.checkpoint.corrupt == "skip":
                drop_damaged(folder / "checkpoints", config.train.steps)
            if config.train.steps not in committed(folder / "checkpoints"):
                job = Job(
                    config=config,
                    kind=kind,
                    manifest=manifest,
                    objective=objective,
                    handle=handle,
                    lease=held.lease,
                    began=time.time(),
                )
                with noticed(held.end):
                    (fit or fit_on_cluster)(job)
                if config.train.steps not in committed(folder / "checkpoints"):
                    raise Terminated  # by a notice that the workers have heeded
            held.lease.confirm()
            result = _conclude(config, folder, vocabulary, kind, length)
        handle = tracking.finish(handle)
        result |= {"run_id": handle.run_id, "register": config.register}
        result |= _register(config, folder / "model", kind, handle)
        if handle.run_id or not config.register:  # else the same command is to try again
            folder.write_bytes(RESULT, json.dumps(result).encode())
        return result


def fit_on_cluster(job: Job, callbacks: Sequence[Any] = ()) -> None:
    """Train on the cluster; callbacks: of Ray Train."""
    on_a_worker = partial(run_on_this_process, job)
    workers.fit(job.config.workers, on_a_worker, name=job.config.name, callbacks=callbacks)


def run_on_this_process(
    job: Job,
    *,
    batches: Callable[[Plan, tuple[int, ...], int], Iterator[Mapping[int, np.ndarray]]],
    report: Callable[[dict[str, float]], None] = lambda metrics: None,
    show: Callable[[int, Mapping[str, float]], None] | None = None,
) -> None:
    """Train as one of the workers, or as the only one: bare Python is a world of one.

    report: hears of validation, on every rank; show: of all that is logged, on the first.
    """
    from infra.checkpoints import Checkpoints

    config = job.config
    folder, data = Folder.at(config.root) / config.name, Folder.at(config.data)
    order = Plan.of(data, job.manifest, "train", config.train.stream)
    checkpoints = Checkpoints(
        folder / "checkpoints",
        keep=config.train.checkpoint.keep,
        milestone_every=config.train.checkpoint.milestone_every,
        max_failures=config.train.checkpoint.max_failures,
        permit=job.lease.confirm,
        corrupt=config.train.checkpoint.corrupt,
    )
    logs: list[tracking.Logger] = []

    def open_log(resumed: int | None) -> Log:
        if world()[0]:
            return _Silent()
        job.lease.confirm()
        logs.append(tracking.Logger(tracking.Journal(folder, resume=resumed), job.handle))
        return _Kept(logs[0], job.lease, show)

    # All look after their own machines, one asks for all whether the run is to end.
    notices = Notices(going=node_is_going, **({} if world()[0] else {"ending": job.lease.ending}))
    with ranklog.kept(folder), notices.listening(), _closing(logs):
        train(
            job.objective(models.load_folder(folder / "init").denoiser),
            config.train,
            config.workers.parallel,
            batches=partial(batches, order),
            validation_NL=_validation_rows(data, job.manifest, config.train),
            bounds=KINDS[job.kind].bounds,
            checkpoints=checkpoints,
            open_log=open_log,
            report=report,
            counts=partial(_counts, order),
            notices=notices,
            began=job.began,
        )


def _counts(order: Plan) -> dict[str, float]:
    """What this worker has met on its way, where a run is to go on all the same."""
    if order.config.corrupt == "stop":
        return {}
    return {"data/skipped_rows": sum(order.skipped.values())}


@contextmanager
def _closing(logs: Sequence[tracking.Logger]) -> Iterator[None]:
    try:
        yield
    finally:
        for log in logs:
            log.close()


@dataclass(frozen=True)
class _Kept:
    """A log that is kept as long as the run is this one's, and shown as it is written."""

    logger: tracking.Logger
    lease: Lease
    show: Callable[[int, Mapping[str, float]], None] | None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.logger.log(step, metrics)
        if self.show:
            self.show(step, metrics)

    def sync(self) -> None:
        self.lease.confirm()  # before what comes next is committed
        self.logger.sync()


class _Silent:
    """The log of every rank but the first."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        return None

    def sync(self) -> None:
        return None


def _validation_rows(data: Folder, manifest: Manifest, config: TrainConfig) -> np.ndarray:
    """Held-out rows ``[N, L]``: whole microbatches, equally many for every lane."""
    share = config.stream.num_lanes * config.stream.rows_per_microbatch
    wanted = min(config.validation_microbatches, manifest.rows("validation") // share) * share
    if not wanted:
        raise DataError(
            (data / "validation").url,
            f"{manifest.rows('validation')} rows, where the lanes take {share} at a time",
            "Prepare a larger validation split, or train with fewer lanes or rows per microbatch",
        )
    return stream.holdout(data, manifest, "validation", wanted, config.stream.seed)


def _conclude(
    config: RunConfig, folder: Folder, vocabulary: Vocabulary, kind: str, length: int
) -> dict[str, Any]:
    """Turn the averaged weights of the last checkpoint into a model folder."""
    from infra.checkpoints import consolidate

    model, step = folder / "model", config.train.steps
    if not models.exists(model):
        denoiser = models.load_folder(folder / "init").denoiser
        denoiser.load_state_dict(consolidate(folder / "checkpoints", step, "ema.denoiser."))
        models.save(model, denoiser, vocabulary, kind=kind, length=length)
    last = journal.read(folder)[-1]
    return {
        "run": folder.url,
        "checkpoint": (folder / "checkpoints" / f"step_{step:06d}").url,
        "model": model.url,
        "metrics": {k: v for k, v in last.items() if k not in journal.CLOCK and math.isfinite(v)},
    }


def _register(config: RunConfig, model: Folder, kind: str, handle: RunHandle) -> dict[str, Any]:
    """Register the model as a candidate, where that is asked for and a server is there."""
    if not config.register:
        return {}
    if handle.run_id is None:
        say(f"not registered: {handle.uri} does not answer; the same command tries again")
        return {"model_uri": None}
    version = models.register(model, config.register, handle, tags={"objective": kind})
    return {"model_uri": version.uri, "alias_uri": version.alias_uri("candidate")}
