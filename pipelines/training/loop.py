"""The training loop: from the last committed checkpoint to the last step.

A plain function of its parts, which knows nothing of Ray. A run that was killed goes on as if it
had not been.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dsl.objective import Objective
from infra import parallel
from infra.errors import ConfigError, DataError, InfraError
from infra.mixture import Schedule
from infra.parallel import ParallelConfig
from infra.preemption import Notice
from pipelines.kinds import Bounds
from pipelines.training.learner import Learner, Microbatches
from pipelines.training.monitor import Monitor
from pipelines.training.progress import Progress
from pipelines.training.settings import TrainConfig

if TYPE_CHECKING:  # torch's checkpoints take half a second to import, which `--help` is not to pay
    from infra.checkpoints import Checkpoints


@dataclass(frozen=True, kw_only=True)
class Data:
    """The rows of a run, as one worker reads them.

    batches: (lanes, steps done) -> the microbatches of the steps that follow. schedule: which
    source each of them is of. validation: held-out rows ``[N, L]`` of every source, the same on
    every worker. counts: what this worker has counted while it read; the sums over all workers are
    logged.
    """

    batches: Callable[[tuple[int, ...], int], Iterator[Microbatches]]
    schedule: Schedule
    validation: Mapping[str, np.ndarray]
    counts: Callable[[], Mapping[str, float]]


def train(
    objective: Objective,
    config: TrainConfig,
    sharding: ParallelConfig,
    *,
    data: Data,
    bounds: Bounds,
    checkpoints: Checkpoints,
    monitor: Monitor,
) -> None:
    """Train from the last committed checkpoint, or from the start, to `config.steps`.

    Args:
        objective: float32, the same weights on every worker; sharded in place.
        bounds: of the likelihood of the validation rows, by name.
        monitor: what the run tells and is told. A notice makes a checkpoint early, or the end.

    Raises:
        ConfigError: the loss or its gradient is no longer finite, or this machine would compute in
            another dtype than the steps so far: `auto` depends on the device.
        InfraError: several checkpoints in a row could not be written, or a worker hangs.
    """
    with parallel.join(sharding) as mesh:
        learner = Learner(objective, config, mesh, sharding)
        done, saved = checkpoints.resume(learner.tensors())
        dtype = str(sharding.dtype(learner.device)).removeprefix("torch.")
        saved = {"began": monitor.began, "compute_dtype": dtype, **saved}
        if saved["compute_dtype"] != dtype:
            raise ConfigError(
                "workers.parallel.compute_dtype",
                f"{dtype} here, but {saved['compute_dtype']} up to step {done}",
                f"Set it to {saved['compute_dtype']}, or train under a new name",
            )
        lanes = config.stream.lanes(*parallel.world())
        held_out = {n: _held_out(rows, config, lanes) for n, rows in data.validation.items()}
        length = next(iter(data.validation.values())).shape[1]
        every, mixture = range(config.stream.num_lanes), data.schedule.config
        progress = _progress(learner, sharding, done or 0, length, saved, monitor.what)
        batches, heeded = data.batches(lanes, done or 0), Notice.NONE
        before: Mapping[str, float] | None = None  # the metrics of the last step

        with monitor.following(done):
            while progress.step < config.steps and heeded is not Notice.END:
                step = progress.step + 1
                monitor.doing(f"waiting for the data of step {step}")
                with progress.waiting():
                    microbatches = _next(batches, checkpoints)
                monitor.doing(f"in step {step}")
                with progress.stepping():
                    names = data.schedule.names(every, step - 1)
                    metrics: Mapping[str, float] = learner.step(step, microbatches, names)
                    # Of a step whose metrics nobody needs, looked at while the next one computes.
                    if before:
                        _must_be_finite(step - 1, before, checkpoints)
                before = metrics
                monitor.finished(step)
                notice = monitor.notice()
                last = step == config.steps
                saving = last or config.checkpoint.due(step) or notice > heeded
                validated = last or step % config.validate_every == 0
                logging = validated or step % config.log_every == 0
                if saving or logging:
                    _must_be_finite(step, metrics, checkpoints)
                if validated:
                    monitor.doing(f"in the validation after step {step}")
                    found = learner.validate(held_out, mixture.shares(step), bounds)
                    metrics = {**metrics, **found}
                if logging:
                    counted = parallel.sum_over_ranks(data.counts())
                    speed = progress.metrics(checkpoints.last, checkpoints.failures)
                    monitor.log(step, {**metrics, **counted, **speed})
                if validated:
                    monitor.report(step, metrics)
                progress.line(metrics)
                if saving:
                    monitor.doing(f"in the checkpoint of step {step}")
                    monitor.sync()
                    checkpoints.save(step, learner.tensors(), meta={**saved, **progress.saving()})
                    heeded = notice
            monitor.doing("in the last checkpoint")
            checkpoints.wait()
        if checkpoints.last != progress.step:
            raise InfraError(
                checkpoints.folder.url,
                f"the last checkpoint could not be written; {_last_good(checkpoints)}",
                "Mend the store, then run the same command again: it resumes",
            )


def _must_be_finite(step: int, metrics: Mapping[str, float], checkpoints: Checkpoints) -> None:
    for name, what in (("loss", "loss"), ("grad_norm", "norm of the gradient")):
        if not math.isfinite(metrics[name]):
            checkpoints.wait()
            raise ConfigError(
                "train.optimizer.lr",
                f"the {what} of step {step} is {metrics[name]}; {_last_good(checkpoints)}",
                "Lower the learning rate or lengthen the warm-up; train under a new name",
            )


def _progress(
    learner: Learner,
    sharding: ParallelConfig,
    done: int,
    length: int,
    saved: Mapping[str, Any],
    what: str,
) -> Progress:
    tokens = learner.config.stream.rows_per_step * length
    # What data sheets give is the rate of bf16.
    peak = parallel.peak_flops() if sharding.dtype(learner.device) is torch.bfloat16 else None
    return Progress(
        learner.config.steps,
        done,
        tokens=tokens,
        flops=tokens * learner.objective.flops_per_token(length),
        peak=peak and peak * parallel.world()[1],
        saved=saved,
        what=what,
    )


def _next(batches: Iterator[Microbatches], checkpoints: Checkpoints) -> Microbatches:
    """The microbatches of the next step. An error of their store also names the last checkpoint;
    one of the data itself is raised when the checkpoint in flight has ended."""
    try:
        return next(batches)
    except DataError:
        with suppress(InfraError):  # the first error is the one to tell
            checkpoints.wait()
        raise
    except InfraError as error:
        why = f"{error.why}; {_last_good(checkpoints)}"
        raise InfraError(error.where, why, error.fix) from None


def _last_good(checkpoints: Checkpoints) -> str:
    step = checkpoints.last  # kept in memory: the store itself may be what fails
    return "there is no checkpoint" if step is None else f"the last good checkpoint is step {step}"


def _held_out(
    rows_NL: np.ndarray, config: TrainConfig, lanes: tuple[int, ...]
) -> list[tuple[int, np.ndarray]]:
    """This worker's numbered validation microbatches; the numbers do not depend on the workers."""
    size, lanes_all = config.stream.rows_per_microbatch, config.stream.num_lanes
    numbered = enumerate(np.split(rows_NL, range(size, len(rows_NL), size)))
    return [(number, rows) for number, rows in numbered if number % lanes_all in lanes]
