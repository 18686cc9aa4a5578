"""The configuration of a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from dsl.denoiser import BackboneShape, Denoiser
from dsl.huggingface import Adapt
from dsl.lora import Lora
from infra.cluster import ClusterConfig
from infra.config import at_least
from infra.mixture import MixtureConfig
from infra.parallel import ParallelConfig
from infra.stream import StreamConfig
from pipelines.models import SCRATCH
from pipelines.verb import RunSettings, require_model_name


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

    def __post_init__(self) -> None:
        wanted = {
            "lr": ("at least 0", 0 <= self.lr < math.inf),
            "betas": ("in [0, 1)", all(0 <= beta < 1 for beta in self.betas)),
            "weight_decay": ("at least 0", 0 <= self.weight_decay < math.inf),
            "clip": ("positive", self.clip > 0),
            "warmup": ("at least 0", self.warmup >= 0),
            "ema": ("in [0, 1)", 0 <= self.ema < 1),
        }
        for name, (what, fits) in wanted.items():
            if not fits:
                raise ValueError(f"{name} must be {what}, got {getattr(self, name)}")

    def lr_at(self, step: int, steps: int) -> float:
        """The learning rate of step 1 … `steps`."""
        rise = min(step / max(self.warmup, 1), 1.0)
        progress = max(step - self.warmup, 0) / max(steps - self.warmup, 1)
        fall = {"constant": 1.0, "cosine": 0.55 + 0.45 * math.cos(math.pi * progress)}
        return self.lr * rise * fall[self.schedule]


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """A checkpoint every so many steps, and at every milestone; the last `keep` stay, and all
    milestones.

    A `corrupt` one stops a run that resumes; "skip" has it resume from the one before.
    """

    every: int = 500
    keep: int = 2
    milestone_every: int | None = None
    max_failures: int = 3
    corrupt: Literal["stop", "skip"] = "stop"

    def __post_init__(self) -> None:
        at_least(1, self, "every", "keep", "milestone_every", "max_failures")

    def due(self, step: int) -> bool:
        """Whether there is to be a checkpoint after a step."""
        return any(step % every == 0 for every in (self.every, self.milestone_every) if every)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """`steps` global steps of `stream.num_lanes` microbatches; `stream.seed` seeds everything.

    A validation looks at `validation_microbatches` of each lane, and takes `bound_samples` terms
    of each bound on their likelihood (see `pipelines.kinds`).
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
        at_least(2, self, "bound_samples")
        at_least(1, self, "steps", "log_every", "validate_every", "validation_microbatches")


@dataclass(frozen=True, kw_only=True)
class WorkersConfig:
    """How many processes train, and on what. Restarts go on from the last checkpoint.

    `count` is a number, or [least, most]: as many as the cluster has room for, fewer when a node
    is lost and more when one joins; every `resize_s` seconds the cluster is asked for more.
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
        if self.max_failures < -1:
            why = "must be at least 0, or -1 for no limit"
            raise ValueError(f"max_failures {why}, got {self.max_failures}")
        if not self.resize_s > 0:
            raise ValueError(f"resize_s must be positive, got {self.resize_s}")
        if not 0 < self.gpu_share <= 1:
            raise ValueError(f"gpu_share must be in (0, 1], got {self.gpu_share}")
        if self.gpu_share < 1 and self.most > 1:
            raise ValueError(f"gpu_share is for one process, and count is {self.count}")
        if self.gpu_share < 1 and not self.gpu:
            raise ValueError("gpu_share is of a GPU, and gpu is false")

    @property
    def counts(self) -> range:
        """Each number of processes that may train."""
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
class TrainingConfig:
    """How weights are trained, from what, and on what.

    `init` is the address of a model, or `scratch`. `backbone` is that of `scratch`; any other
    `init` brings its own, dropout included, and what is said here must agree with it. `adapt` is
    for a causal model of the transformers library, which is to see both sides: `shift` has it
    answer for the next position, as it was trained to, `no_shift` for the position itself.
    `trust_remote_code` runs code that comes with the weights, for a network that only it knows.
    `lora` trains adapters in the place of the backbone; the model that is made has them merged.
    """

    init: str
    adapt: Adapt | None = None
    trust_remote_code: bool = False
    lora: Lora | None = None
    backbone: BackboneShape | None = None
    train: TrainConfig = field(default_factory=TrainConfig)
    workers: WorkersConfig = field(default_factory=WorkersConfig)

    def __post_init__(self) -> None:
        if self.adapt and self.init == SCRATCH:
            raise ValueError("adapt is for a causal model at init, and init is scratch")
        if self.lora and self.init == SCRATCH:
            raise ValueError("lora adds to a model at init, and init is scratch")
        for count in self.workers.counts:
            if self.train.stream.num_lanes % count:
                raise ValueError(
                    f"train.stream.num_lanes ({self.train.stream.num_lanes}) must be a multiple of "
                    f"workers.count ({count}), or workers would hold unequal shares"
                )

    def trained(self, denoiser: Denoiser) -> Denoiser:
        """The denoiser at the start of training, with adapters where `lora` asks for them."""
        return self.lora.attached(denoiser, self.train.stream.seed) if self.lora else denoiser


@dataclass(frozen=True, kw_only=True)
class RunConfig(TrainingConfig, RunSettings):
    """What every training run has. `data` are prepared shards, or a mixture of several. `register`
    names the model in the registry; null registers nothing."""

    data: str | MixtureConfig
    register: str | None = None

    def __post_init__(self) -> None:
        TrainingConfig.__post_init__(self)
        RunSettings.__post_init__(self)
        require_model_name(self.register)
        changes, steps = self.mixture.changes, self.train.steps
        if changes and changes[-1].step > steps:
            why = f"comes after the last, {steps} (train.steps)"
            raise ValueError(f"step {changes[-1].step} (data.changes) {why}")

    @property
    def mixture(self) -> MixtureConfig:
        """The sources of the rows."""
        return MixtureConfig.alone(self.data) if isinstance(self.data, str) else self.data
