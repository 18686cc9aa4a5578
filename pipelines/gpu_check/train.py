"""Steps of training, as a worker takes them: their rate, memory, synchronisations and kernels."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from unittest import mock

import numpy as np
import torch

from dsl import chunks
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
    for name in OBJECTIVES:
        # The bars are for the faster mode; beside it stands what determinism costs.
        for deterministic, measured in ((False, _at_all_sizes), (True, _at_one_size)):
            sharding = ParallelConfig(compile=check.gpu, deterministic=deterministic)
            with parallel.join(sharding) as mesh:
                learner = Learner(check.objective(name), TrainConfig(), mesh, sharding)
                yield from measured(check, name, learner)
            del learner
            torch.compiler.reset()


def _at_one_size(check: Check, name: Named, learner: Learner) -> Iterator[Finding]:
    rows = check.sizes.train_rows[0]
    rows_RL = train.microbatch(check.benchmark(rows))
    rate = rows_RL.size / _seconds(check, learner, rows_RL)
    yield Finding(f"{name} step, B = {rows}, deterministic", rate, "tokens/s")


def _at_all_sizes(check: Check, name: Named, learner: Learner) -> Iterator[Finding]:
    yield from _inside(check, name, learner)
    best, peak = 0.0, parallel.peak_flops()
    try:
        for rows in check.sizes.train_rows:
            config = check.benchmark(rows)
            rows_RL = train.microbatch(config)
            flops = train.flops(config, name, check.device)
            what = f"{name} step, B = {rows}"
            memory = profiles.peak_gib(partial(learner.step, 1, {0: rows_RL}), check.device)
            yield Finding(f"{what}: peak memory", memory, "GiB")
            for chunk in check.sizes.chunks:
                how = f"chunks of 2^{chunk.bit_length() - 1}"
                with mock.patch.object(chunks, "elements", lambda *_, size=chunk: size):
                    seconds = _seconds(check, learner, rows_RL)
                yield Finding(f"{what}, {how}", rows_RL.size / seconds, "tokens/s")
                if peak:
                    mfu = 100 * flops / seconds / peak
                    best = max(best, mfu)
                    yield Finding(f"{what}, {how}: MFU", mfu, "%")
    except torch.OutOfMemoryError:
        yield Finding(f"{what}, and all that would follow", "out of memory")
    bar = check.at_least(LEAST_MFU[name], here=check.speed_counts)
    yield Finding(f"{name} step: best MFU", best or None, "%", bar)


def _seconds(check: Check, learner: Learner, rows_RL: np.ndarray) -> float:
    """Of a step, the median."""
    steps = {"step": lambda number: learner.step(1, {0: rows_RL})}
    return float(np.median(interleaved(steps, check.sizes.rounds, check.device)["step"]))


def _inside(check: Check, name: Named, learner: Learner) -> Iterator[Finding]:
    rows = check.sizes.train_rows[0]
    rows_RL = train.microbatch(check.benchmark(rows))
    step = partial(learner.step, 1, {0: rows_RL})
    step()  # it compiles, and waits for each kernel that it tries
    waits = profiles.synchronisations(step, check.device)
    bar = check.at_most(MOST_SYNCHRONISATIONS, here=check.gpu)
    yield Finding(f"{name} step: waits for the GPU", waits, "", bar)
    yield Finding(f"{name} step, B = {rows}: kernels", profiles.kernels(step, check.device))
