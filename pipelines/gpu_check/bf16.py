"""Training in bfloat16 against training in float32: as one worker computes, and as one of several,
through FSDP2, over NCCL on a GPU.

Here the world is of one either way, so that nothing but the precision differs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dsl.noise import generator
from infra import parallel
from infra.parallel import ParallelConfig
from pipelines.benchmarks import train
from pipelines.benchmarks.results import Bar
from pipelines.gpu_check.findings import Finding
from pipelines.gpu_check.settings import Check
from pipelines.training.learner import Learner
from pipelines.training.settings import OptimizerConfig, TrainConfig

Dtype = Literal["float32", "bfloat16"]
STEPS = 20
CONFIG = TrainConfig(steps=STEPS, optimizer=OptimizerConfig(warmup=5))
MOST_GAP, LEAST_COSINE = 0.02, 0.98


def run(check: Check) -> Iterator[Finding]:
    rows_RL = train.microbatch(check.benchmark(rows=check.sizes.train_rows[0]))
    full = _trained(check, "float32", rows_RL, shared=False)
    yield Finding(f"loss of step {STEPS}, float32", full.losses[-1], "nats")
    for how, shared in (("bf16", False), ("bf16 through FSDP2", True)):
        half = _trained(check, "bfloat16", rows_RL, shared=shared)
        what = f"loss in {how}: largest relative gap in {STEPS} steps"
        yield Finding(what, _gap(full.losses, half.losses), "", Bar("≤", MOST_GAP))
        for group, cosine in _cosines(full.gradients, half.gradients).items():
            what = f"gradient in {how}: cosine, {group}"
            yield Finding(what, cosine, "", Bar("≥", LEAST_COSINE))


class _Trained(NamedTuple):
    """The loss of each step, and the gradients of the first by parameter."""

    losses: list[float]
    gradients: dict[str, Tensor]


def _trained(check: Check, dtype: Dtype, rows_RL: np.ndarray, *, shared: bool) -> _Trained:
    """shared: as one of several workers."""
    compiled = check.gpu and dtype == "bfloat16"  # as it trains there; a compiler rounds otherwise
    sharding = ParallelConfig(compute_dtype=dtype, compile=compiled)
    with (
        mock.patch.object(parallel, "shared", return_value=shared),
        parallel.join(sharding) as mesh,
    ):
        learner = Learner(check.objective("dsl"), CONFIG, mesh, sharding)
        gradients = _gradients(learner, torch.from_numpy(rows_RL).to(check.device))
        steps = range(1, STEPS + 1)
        losses = [learner.step(step, {0: rows_RL})["loss"] for step in steps]
    return _Trained(losses, gradients)


def _gap(full: Sequence[float], half: Sequence[float]) -> float:
    """The largest relative difference; NaN where one is NaN, which `max` may pass over."""
    return float(np.abs(np.array(half) / np.array(full) - 1).max())


def _gradients(learner: Learner, tokens_BL: Tensor) -> dict[str, Tensor]:
    """By parameter, of one microbatch, in float32 on the CPU."""

    def loss_of(tokens_BL: Tensor) -> Tensor:
        return learner.objective(tokens_BL, generator(0, 1, 0)).value

    parallel.accumulate(learner.objective, [tokens_BL], loss_of)
    found = {
        name: parallel.full(parameter.grad).cpu()
        for name, parameter in learner.objective.named_parameters()
        if parameter.grad is not None
    }
    learner.optimizer.zero_grad(set_to_none=True)
    return found


def _cosines(full: dict[str, Tensor], half: dict[str, Tensor]) -> dict[str, float]:
    """Between the gradients of a group: the table, the converter, and the backbone's parts."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in full:
        # denoiser.table.…, denoiser.converter.…, denoiser.backbone.blocks.…
        parts = name.split(".")[1:3]
        groups[parts[0] if parts[0] != "backbone" else parts[1]].append(name)

    def joined(side: dict[str, Tensor], names: list[str]) -> Tensor:
        return torch.cat([side[name].double().flatten() for name in names])

    return {
        group: F.cosine_similarity(joined(full, names), joined(half, names), dim=0).item()
        for group, names in groups.items()
    }
