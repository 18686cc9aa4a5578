"""The training loop that `pretrain` and `finetune` share: a plain function of its parts.

Ray only wraps it (see `pipelines.launch`), so it runs bare on one device as well. A step is a
function of (seed, step, lane): neither the order of the data nor the corruption noise knows how
many workers share the lanes, and a run that was killed goes on as if it had not been.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from dsl.denoiser import geometry_report
from dsl.noise import generator
from dsl.objective import Loss, Objective
from infra import parallel, stall
from infra.errors import ConfigError, InfraError
from infra.notices import Notice, Notices
from infra.parallel import ParallelConfig
from infra.stream import StreamConfig
from pipelines.bounds import Bounds
from pipelines.progress import Progress

if TYPE_CHECKING:  # torch's checkpoints take half a second to import, which `--help` is not to pay
    from infra.checkpoints import Checkpoints

# Steps are counted from 1; the noise of validation is keyed where no training step can be.
VALIDATION = 0

Microbatches = Mapping[int, np.ndarray]  # lane -> [R, L] token ids


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, its schedule, and the average of the weights that is evaluated and registered.

    The learning rate rises linearly over `warmup` steps, then stays, or falls along a cosine to
    a tenth of its peak at the last step.
    """

    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip: float = 1.0
    warmup: int = 100
    schedule: Literal["constant", "cosine"] = "constant"
    ema: float = 0.999

    def lr_at(self, step: int, steps: int) -> float:
        """The learning rate of step 1 … `steps`."""
        rise = min(step / max(self.warmup, 1), 1.0)
        progress = max(step - self.warmup, 0) / max(steps - self.warmup, 1)
        fall = {"constant": 1.0, "cosine": 0.55 + 0.45 * math.cos(math.pi * progress)}
        return self.lr * rise * fall[self.schedule]


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """A checkpoint every so many steps; the last `keep` stay, and every milestone.

    A `corrupt` one stops a run that resumes; "skip" has it resume from the one before.
    """

    every: int = 500
    keep: int = 2
    milestone_every: int | None = None
    max_failures: int = 3
    corrupt: Literal["stop", "skip"] = "stop"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """`steps` global steps of `stream.num_lanes` microbatches; `stream.seed` seeds everything.

    A validation looks at `validation_microbatches` of each lane, and takes `bound_samples` terms
    of each bound on their likelihood (see `pipelines.bounds`).
    """

    steps: int = 1000
    stream: StreamConfig = field(default_factory=StreamConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log_every: int = 1
    validate_every: int = 500
    validation_microbatches: int = 4
    bound_samples: int = 4

    def __post_init__(self) -> None:
        if self.bound_samples < 2:
            raise ValueError(f"bound_samples must be at least 2, got {self.bound_samples}")
        for name in ("steps", "log_every", "validate_every", "validation_microbatches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


class Log(Protocol):
    """Who hears of the metrics; rank 0's writes them down, the others' ignore them."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def sync(self) -> None: ...


class Learner:
    """An objective with its average and its optimizer, sharded over the workers."""

    def __init__(
        self, objective: Objective, config: TrainConfig, mesh: object, sharding: ParallelConfig
    ) -> None:
        self.config = config
        self.device = parallel.device()
        self.objective = objective.to(self.device)
        self.average = parallel.averaged(self.objective, config.optimizer.ema)
        for module in (self.objective, self.average.module):
            denoiser = module.denoiser
            parallel.shard(
                module,
                denoiser.backbone.blocks,
                mesh=mesh,
                config=sharding,
                # Directions and biases must not be rounded to 8 bits: they are what an SNR is of.
                float32=(denoiser.table, denoiser.converter),
            )
        trained = [p for p in self.objective.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            trained,
            lr=config.optimizer.lr,
            betas=config.optimizer.betas,
            weight_decay=config.optimizer.weight_decay,
            fused=True,
        )

    def tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint holds, live: loading into them restores the run."""
        from infra.checkpoints import training_tensors

        return training_tensors(self.objective, self.average, self.optimizer)

    def step(self, step: int, microbatches: Microbatches) -> dict[str, float]:
        """One optimizer step over all lanes of all workers; the means of its metrics."""
        optimizer = self.config.optimizer
        lr = optimizer.lr_at(step, self.config.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.objective.train()
        losses: list[Loss] = []

        def loss_of(lane: int) -> Tensor:
            losses.append(self._loss(self.objective, step, lane, microbatches[lane]))
            return losses[-1].value

        parallel.accumulate(self.objective, sorted(microbatches), loss_of)
        norm = parallel.clip_grad_norm(
            [p for group in self.optimizer.param_groups for p in group["params"]], optimizer.clip
        )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.average.update_parameters(self.objective)
        return _means(losses) | {"grad_norm": norm.item(), "lr": lr}

    @torch.no_grad()
    def validate(
        self, microbatches: Sequence[tuple[int, np.ndarray]], bounds: Bounds
    ) -> dict[str, float]:
        """Metrics of the averaged weights on numbered microbatches, at noise that never changes."""
        module = self.average.module.eval()
        losses = [self._loss(module, VALIDATION, key, rows) for key, rows in microbatches]
        nats = [self._bounds(module, bounds, key, rows) for key, rows in microbatches]
        found = _means(losses)
        if bounds:
            on_average = parallel.mean_over_ranks(_mean(nats))
            found |= on_average | {"bound": sum(on_average.values()) / len(bounds)}
        return {f"validation/{name}": value for name, value in found.items()}

    def _bounds(
        self, module: Objective, bounds: Bounds, number: int, rows_RL: np.ndarray
    ) -> dict[str, float]:
        """Nats per token of the rows of a microbatch, whose number says which rows they are."""
        tokens_RL = torch.from_numpy(rows_RL).to(self.device, torch.int64)
        first_row = number * len(rows_RL)

        def values() -> dict[str, float]:
            samples = self.config.bound_samples
            return {
                name: bound(module.denoiser, tokens_RL, samples, first_row)
                for name, bound in bounds.items()
            }

        return parallel.gathered(module, values)

    def _loss(self, module: Objective, step: int, lane: int, rows_RL: np.ndarray) -> Loss:
        draws = generator(self.config.stream.seed, step, lane, self.device)
        # Dropout, where there is any, draws from torch's own generator.
        torch.manual_seed(draws.initial_seed())
        tokens_RL = torch.from_numpy(rows_RL).to(self.device, torch.int64)
        return module(tokens_RL, draws)


def train(
    objective: Objective,
    config: TrainConfig,
    sharding: ParallelConfig,
    *,
    batches: Callable[[tuple[int, ...], int], Iterator[Microbatches]],
    validation_NL: np.ndarray,
    bounds: Bounds,
    checkpoints: Checkpoints,
    open_log: Callable[[int | None], Log],
    report: Callable[[dict[str, float]], None] = lambda metrics: None,
    counts: Callable[[], Mapping[str, float]] = dict,
    notices: Notices | None = None,
    began: float | None = None,
) -> None:
    """Train from the last committed checkpoint, or from the start, to `config.steps`.

    Args:
        objective: float32, the same weights on every worker; sharded in place.
        batches: `(lanes, steps done) -> microbatches of the steps that follow`.
        validation_NL: held-out rows, the same on every worker; shared out among the lanes.
        bounds: of their likelihood, by name.
        open_log: called with the step that training resumes from (None: from the start).
        report: hears of each validation, on every worker at the same steps; the log has by then.
        counts: what this worker has counted; the sums over all workers are logged.
        notices: what makes for a checkpoint ahead of its time, or for an end after it.
        began: when the run was first started, seconds since the epoch; None: now.

    Raises:
        ConfigError: the loss or its gradient is no longer finite.
        InfraError: several checkpoints in a row could not be written, or a worker hangs.
    """
    with parallel.join(sharding) as mesh:
        learner = Learner(objective, config, mesh, sharding)
        done, kept = checkpoints.resume(learner.tensors())
        log = open_log(done)
        lanes = config.stream.lanes(*parallel.world())
        held_out = _held_out(validation_NL, config, lanes)
        progress = _progress(learner, sharding, done or 0, validation_NL.shape[1], kept, began)
        notices, heeded = notices or Notices(), Notice.NONE

        stream = batches(lanes, done or 0)
        with stall.watched(sharding.stall_s, done or 0) as watch:
            while progress.step < config.steps and heeded is not Notice.END:
                step = progress.step + 1
                watch.doing(f"waiting for the data of step {step}")
                with progress.waiting():
                    microbatches = _next(stream, checkpoints)
                watch.doing(f"in step {step}")
                with progress.stepping():
                    metrics = learner.step(step, microbatches)
                _must_be_finite(step, metrics, checkpoints)
                watch.finished(step)
                # The same on all workers, so that they save, or end, after the same step.
                notice = Notice(parallel.highest(notices.latest))
                last = step == config.steps
                validated = last or step % config.validate_every == 0
                if validated:
                    watch.doing(f"in the validation after step {step}")
                    metrics |= learner.validate(held_out, bounds) | _table_metrics(learner)
                if validated or step % config.log_every == 0:
                    counted = parallel.sum_over_ranks(counts())
                    log.log(step, metrics | counted | progress.metrics(checkpoints.last))
                if validated:
                    log.sync()
                    report(metrics | {"step": step})
                progress.line(metrics)
                if last or step % config.checkpoint.every == 0 or notice > heeded:
                    watch.doing(f"in the checkpoint of step {step}")
                    log.sync()
                    checkpoints.save(step, learner.tensors(), meta=progress.saving())
                    heeded = notice
            watch.doing("in the last checkpoint")
            checkpoints.wait()
        if checkpoints.latest() != progress.step:
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
    kept: Mapping[str, Any],
    began: float | None,
) -> Progress:
    stream = learner.config.stream
    tokens = stream.num_lanes * stream.rows_per_microbatch * length
    # What data sheets give is the rate of bf16.
    peak = parallel.peak_flops() if sharding.dtype(learner.device) is torch.bfloat16 else None
    return Progress(
        learner.config.steps,
        done,
        tokens=tokens,
        flops=tokens * learner.objective.denoiser.backbone.flops_per_token(length),
        peak=peak and peak * parallel.world()[1],
        before=kept,
        began=time.time() if began is None else began,
    )


def _next(stream: Iterator[Microbatches], checkpoints: Checkpoints) -> Microbatches:
    """The microbatches of the next step; where their store is away, what is kept is said."""
    try:
        return next(stream)
    except InfraError as error:
        why = f"{error.why}; {_last_good(checkpoints)}"
        raise InfraError(error.where, why, error.fix) from None


def _last_good(checkpoints: Checkpoints) -> str:
    step = checkpoints.last  # the store itself may be what fails
    return "there is no checkpoint" if step is None else f"the last good checkpoint is step {step}"


def _held_out(
    rows_NL: np.ndarray, config: TrainConfig, lanes: tuple[int, ...]
) -> list[tuple[int, np.ndarray]]:
    """This worker's numbered validation microbatches; the numbers do not depend on the workers."""
    size, lanes_all = config.stream.rows_per_microbatch, config.stream.num_lanes
    numbered = enumerate(np.split(rows_NL, range(size, len(rows_NL), size)))
    return [(number, rows) for number, rows in numbered if number % lanes_all in lanes]


def _means(losses: list[Loss]) -> dict[str, float]:
    """Means over this worker's microbatches, then over the workers, which hold equally many."""
    rows = [{"loss": loss.value.detach(), **loss.metrics} for loss in losses]
    return parallel.mean_over_ranks(_mean(rows))


def _mean(rows: Sequence[Mapping[str, float | Tensor]]) -> dict[str, float]:
    return {key: sum(float(row[key]) for row in rows) / len(rows) for key in rows[0]}


def _table_metrics(learner: Learner) -> dict[str, float]:
    """The converter's scale and the spread of the table, which long training can collapse."""
    denoiser = learner.average.module.denoiser
    if not learner.objective.denoiser.table.direction_VD.requires_grad:
        return {}
    table_VD = parallel.full(denoiser.table.direction_VD)
    table_VD = torch.nn.functional.normalize(table_VD, dim=-1)
    beta = parallel.full(denoiser.converter.beta).item()
    report = {f"table/{name}": value for name, value in geometry_report(table_VD).items()}
    return report | {"converter/beta": beta}
