"""What the check is made on: the device, the sizes, and where a speed counts.

Shapes: V tokens, W backbone width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import torch

from dsl.dit import DiTShape
from dsl.objective import DSLObjective, MDLMObjective, Objective
from dsl.support import Mixed
from pipelines.benchmarks.settings import (
    BenchmarkConfig,
    ModelConfig,
    SamplerConfig,
    StepConfig,
    build,
)
from pipelines.gpu_check import SCRATCH

CARD = "H100"  # for which the bars of speed were set, by a part of the driver's name


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """`train_rows`: of a microbatch. `chunks`: logits computed at a time, in elements.
    `parity_length`: the CPU computes this in float64. `matmul`: rows and columns of a product."""

    model: ModelConfig
    length: int
    parity_length: int
    train_rows: tuple[int, ...]
    chunks: tuple[int, ...]
    sampler_rows: tuple[int, ...]
    budget: int
    rounds: int
    matmul: int


FULL = Sizes(
    model=ModelConfig(),
    length=1024,
    parity_length=128,
    train_rows=(16, 32, 64),
    chunks=(2**26, 2**28, 2**30),
    sampler_rows=(1, 32),
    budget=64,
    rounds=5,
    matmul=8192,
)
SMALL = Sizes(
    model=ModelConfig(
        backbone=DiTShape(width=32, blocks=2, heads=2, cond_dim=16), tokens=61, embed_dim=8
    ),
    length=32,
    parity_length=32,
    train_rows=(2, 4),
    chunks=(2**10, 2**24),
    sampler_rows=(1, 4),
    budget=8,
    rounds=2,
    matmul=256,
)

Named = Literal["mdlm", "dsl"]
OBJECTIVES: Mapping[Named, Callable[[ModelConfig, torch.device], Objective]] = MappingProxyType(
    {
        "mdlm": lambda model, device: MDLMObjective(build(model.mdlm(), device)),
        "dsl": lambda model, device: DSLObjective(build(model.dsl(), device), Mixed()),
    }
)


@dataclass(frozen=True, kw_only=True)
class Check:
    """One run of the check: its folder, its sizes, and the device that it is about."""

    out: Path
    device: torch.device
    sizes: Sizes

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    def scratch(self) -> Path:
        """A folder for files of a stage, which is removed when the stage ends, however it does."""
        folder = self.out / SCRATCH
        folder.mkdir(exist_ok=True)
        return folder

    def objective(self, name: Named, device: torch.device | None = None) -> Objective:
        """With random weights, the same on every device of a kind."""
        return OBJECTIVES[name](self.sizes.model, device or self.device)

    def benchmark(self, rows: int, length: int | None = None) -> BenchmarkConfig:
        """The sizes in the words of `pipelines.benchmarks`."""
        length = length or self.sizes.length
        return BenchmarkConfig(
            model=self.sizes.model,
            train=StepConfig(rows=rows, length=length),
            sampler=replace(SamplerConfig(), rows=rows, length=length, budget=self.sizes.budget),
        )

    @property
    def speed_counts(self) -> bool:
        """Whether this is the card and these are the sizes that bars of speed were set for."""
        return self.gpu and self.sizes == FULL and CARD in torch.cuda.get_device_name(self.device)
