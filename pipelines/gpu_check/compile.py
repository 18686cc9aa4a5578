"""What `torch.compile` makes of the blocks, with and without activation checkpointing.

On a CPU the graphs are traced and not compiled, which would take a minute and a C++ compiler.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch._dynamo.utils import counters  # private; torch has no public counter of graphs

from infra import parallel
from infra.mixture import ALONE
from infra.parallel import ParallelConfig
from pipelines.benchmarks import train
from pipelines.benchmarks.results import Bar
from pipelines.gpu_check.findings import Finding
from pipelines.gpu_check.settings import Check
from pipelines.training.learner import Learner
from pipelines.training.settings import TrainConfig


def run(check: Check) -> Iterator[Finding]:
    if not check.gpu:
        torch.compiler.set_stance(force_backend="aot_eager")
    rows_RL = train.microbatch(check.benchmark(rows=check.sizes.train_rows[0]))
    for checkpointing in (False, True):
        torch.compiler.reset()
        counters.clear()
        sharding = ParallelConfig(compile=True, activation_checkpointing=checkpointing)
        with parallel.join(sharding) as mesh:
            learner = Learner(check.objective("dsl"), TrainConfig(), mesh, sharding)
            began = time.perf_counter()
            learner.step(1, {0: rows_RL})
            learner.validate({ALONE: [(0, rows_RL)]}, {ALONE: 1.0}, {})
            seconds = time.perf_counter() - began
        how = "a step and a validation" + ", blocks recomputed" * checkpointing
        graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
        yield Finding(f"graphs of {how}", graphs, "", Bar("≥", 1))
        yield Finding(f"graph breaks of {how}", breaks, "", Bar("≤", 0))
        yield Finding(f"{how}, compilation included", seconds, "s")
