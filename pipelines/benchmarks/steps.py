"""Optimizer steps to be timed: of the bare loop with any loss, and of the one that workers run.

Shapes: B rows, L positions.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from dsl.noise import generator
from dsl.objective import DSLObjective, MDLMObjective, Objective
from dsl.support import Mixed
from infra import parallel
from infra.parallel import ParallelConfig
from pipelines.benchmarks import flops, reference
from pipelines.benchmarks.settings import BenchmarkConfig, build
from pipelines.benchmarks.timing import Procedure
from pipelines.training.learner import Learner
from pipelines.training.settings import TrainConfig

DECAY = 0.999
STEP, LANE = 1, 0  # the key of the noise, the same for all and in every round


def procedure(config: BenchmarkConfig, name: str, device: torch.device) -> Procedure:
    """One step of the bare loop: one device, nothing sharded, always the same microbatch."""
    tokens_BL = torch.from_numpy(_microbatch(config)).to(device)
    objective = _objective(config, "dsl" if name == "dsl" else "mdlm", device)
    bare = (Public if name == "reference" else Bare)(objective, device)

    def ours() -> Tensor:
        return objective(tokens_BL, _draws(device)).value

    def public() -> Tensor:
        return reference.mdlm_loss(objective.denoiser, tokens_BL, _draws(device))

    loss = public if name == "reference" else ours
    return lambda number: bare.step(loss)


class Bare:
    """Weights, their average and AdamW as workers have them; a step without anything around it."""

    fused = True

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.module, self.device = module, device
        self.average = parallel.averaged(module, DECAY)
        self.trained = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=3e-4, weight_decay=0.0, fused=self.fused
        )

    def step(self, loss: Callable[[], Tensor]) -> None:
        with torch.autocast(self.device.type, torch.bfloat16, self.device.type == "cuda"):
            value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.update_average()

    def update_average(self) -> None:
        self.average.update_parameters(self.module)


class Public(Bare):
    """AdamW as torch has it by default, and the average in three passes, as in public code."""

    fused = None

    @torch.no_grad()
    def update_average(self) -> None:
        pairs = zip(self.average.module.parameters(), self.module.parameters(), strict=True)
        for average, parameter in pairs:
            average.sub_((1 - DECAY) * (average - parameter))


def once(config: BenchmarkConfig, name: str) -> None:
    """Two steps by themselves, for their memory: the first has no moments and no average yet."""
    step = procedure(config, name, parallel.device())
    step(0)
    step(1)


def sharded(config: BenchmarkConfig, mesh: object) -> Procedure:
    """The step that runs under Ray Train, in this one process; compiled where there is a GPU."""
    device = parallel.device()
    objective = _objective(config, "mdlm", device)
    sharding = ParallelConfig(compile=device.type == "cuda")
    learner = Learner(objective, TrainConfig(), mesh, sharding)
    microbatch_BL = _microbatch(config)
    return lambda number: learner.step(STEP, {LANE: microbatch_BL})


def _objective(config: BenchmarkConfig, name: str, device: torch.device) -> Objective:
    if name == "dsl":
        return DSLObjective(build(config.model.dsl(), device), Mixed())
    return MDLMObjective(build(config.model.mdlm(), device))


def _microbatch(config: BenchmarkConfig) -> np.ndarray:
    shape = (config.train.rows, config.train.length)
    return np.random.default_rng(0).integers(config.model.tokens, size=shape)


def _draws(device: torch.device) -> torch.Generator:
    return generator(TrainConfig().stream.seed, STEP, LANE, device)


@torch.no_grad()
def work(config: BenchmarkConfig, name: str, device: torch.device) -> float:
    """FLOPs of a step, by how many positions the draws predict and how many have evidence."""
    objective = _objective(config, name, device)
    tokens_BL = torch.from_numpy(_microbatch(config)).to(device)
    metrics = objective(tokens_BL, _draws(device)).metrics
    evidence = float(metrics.get("evidence_share", 0.0))
    predicted = evidence + float(metrics["masked_share"])
    per_token = flops.forward(
        objective.denoiser.config, config.train.length, predicted=predicted, evidence=evidence
    )
    return flops.STEP * tokens_BL.numel() * per_token
