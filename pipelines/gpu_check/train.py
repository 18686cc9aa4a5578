"""Steps of training, as a worker takes them: their rate, memory, synchronisations and kernels."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch

from dsl import head
from infra import parallel
from infra.parallel import ParallelConfig
from pipelines.benchmarks import train
from pipelines.benchmarks.measure import interleaved
from pipelines.gpu_check import profiles
from pipelines.gpu_check.findings import Finding
from pipelines.gpu_check.settings import OBJECTIVES, Check, Named
from pipelines.training.learner import Learner
from pipelines.training.settings import TrainConfig

LEAST_MFU = {"mdlm": 45.0, "dsl": 35.0}  # percent
MOST_SYNCHRONISATIONS = 2  # of a step


def run(check: Check) -> Iterator[Finding]:
    sharding = ParallelConfig(compile=check.gpu)
    for name in OBJECTIVES:
        with parallel.join(sharding) as mesh:
            learner = Learner(check.objective(name), TrainConfig(), mesh, sharding)
            yield from _of_objective(check, name, learner)
        del learner
        torch.compiler.reset()


def _of_objective(check: Check, name: Named, learner: Learner) -> Iterator[Finding]:
    best, ours = 0.0, head.CHUNK_ELEMENTS
    peak = parallel.peak_flops()
    for rows in check.sizes.train_rows:
        config = check.benchmark(rows)
        rows_RL = train.microbatch(config)
        flops = train.flops(config, name, check.device)
        for chunk in check.sizes.chunks:
            head.CHUNK_ELEMENTS = chunk
            what = f"{name} step, B = {rows}, chunks of 2^{chunk.bit_length() - 1}"
            try:
                seconds = _seconds(check, learner, rows_RL)
            except torch.OutOfMemoryError:
                yield Finding(what, "out of memory")
                continue
            yield Finding(what, rows_RL.size / seconds, "tokens/s")
            if peak:
                mfu = 100 * flops / seconds / peak
                best = max(best, mfu)
                yield Finding(f"{what}: MFU", mfu, "%")
        head.CHUNK_ELEMENTS = ours
        try:
            memory = profiles.peak_gib(partial(learner.step, 1, {0: rows_RL}), check.device)
            yield Finding(f"{name} step, B = {rows}: peak memory", memory, "GiB")
        except torch.OutOfMemoryError:
            yield Finding(f"{name} step, B = {rows}: peak memory", "out of memory")
    bar = check.at_least(LEAST_MFU[name], here=check.speed_counts)
    yield Finding(f"{name} step: best MFU", best or None, "%", bar)
    yield from _inside(check, name, learner)


def _seconds(check: Check, learner: Learner, rows_RL: np.ndarray) -> float:
    """Of a step, the median."""
    steps = {"step": lambda number: learner.step(1, {0: rows_RL})}
    return float(np.median(interleaved(steps, check.sizes.rounds, check.device)["step"]))


def _inside(check: Check, name: Named, learner: Learner) -> Iterator[Finding]:
    rows = check.sizes.train_rows[0]
    rows_RL = train.microbatch(check.benchmark(rows))
    step = partial(learner.step, 1, {0: rows_RL})
    waits = profiles.synchronisations(step, check.device)
    bar = check.at_most(MOST_SYNCHRONISATIONS, here=check.gpu)
    yield Finding(f"{name} step: waits for the GPU", waits, "", bar)
    yield Finding(f"{name} step, B = {rows}: kernels", profiles.kernels(step, check.device))
