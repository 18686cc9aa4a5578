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
from pipelines.benchmarks.results import Bar
from pipelines.gpu_check import profiles
from pipelines.gpu_check.findings import Finding
from pipelines.gpu_check.settings import OBJECTIVES, Check, Named
from pipelines.training.learner import Learner
from pipelines.training.settings import TrainConfig

LEAST_MFU = {"mdlm": 45.0, "dsl": 35.0}  # percent
MOST_SYNCHRONISATIONS = 2  # of a step
STEPS = 5  # that are timed as one: the first of them starts with nothing ordered


def run(check: Check) -> Iterator[Finding]:
    # The bars are for the faster mode; beside it stands what determinism costs.
    for deterministic in (False, True):
        sharding = ParallelConfig(compile=check.gpu, deterministic=deterministic)
        with parallel.join(sharding) as mesh:
            learners = {
                name: Learner(check.objective(name), TrainConfig(), mesh, sharding)
                for name in OBJECTIVES
            }
            for name, learner in learners.items():
                measured = _deterministic if deterministic else _at_all_sizes
                yield from measured(check, name, learner)
            if not deterministic:
                for name, learner in learners.items():
                    yield from _inside(check, name, learner)
        del learners, learner
        torch.compiler.reset()


def _deterministic(check: Check, name: Named, learner: Learner) -> Iterator[Finding]:
    rows = check.sizes.train_rows[0]
    rows_RL = train.microbatch(check.benchmark(rows))
    rate = rows_RL.size / _seconds(check, learner, rows_RL)
    yield Finding(f"{name} step, B = {rows}, deterministic", rate, "tokens/s")


def _at_all_sizes(check: Check, name: Named, learner: Learner) -> Iterator[Finding]:
    peak, found = parallel.peak_flops(), []
    try:
        for rows in check.sizes.train_rows:
            config, what = check.benchmark(rows), f"{name} step, B = {rows}"
            rows_RL, flops = train.microbatch(config), train.flops(config, name, check.device)
            memory = profiles.peak_gib(partial(learner.step, 1, {0: rows_RL}), check.device)
            yield Finding(f"{what}: peak memory", memory, "GiB")
            seconds = _seconds(check, learner, rows_RL)
            yield Finding(what, rows_RL.size / seconds, "tokens/s")
            if peak:
                found.append(100 * flops / seconds / peak)
                yield Finding(f"{what}: MFU", found[-1], "%")
        for chunk in check.sizes.chunks:
            with mock.patch.object(chunks, "elements", lambda *_, size=chunk: size):
                seconds = _seconds(check, learner, rows_RL)
            how = f"chunks of 2^{chunk.bit_length() - 1}"
            yield Finding(f"{what}, {how}", rows_RL.size / seconds, "tokens/s")
    except torch.OutOfMemoryError:
        yield Finding(f"{what}, and all that would follow", "out of memory")
    bar = Bar("≥", LEAST_MFU[name], here=check.speed_counts)
    none = 0.0 if check.speed_counts else None  # on the card of the bar this is a failure
    yield Finding(f"{name} step: best MFU", max(found, default=none), "%", bar)


def _seconds(check: Check, learner: Learner, rows_RL: np.ndarray) -> float:
    """Of a step, the median. Training waits for no step either before it orders the next."""

    def some(number: int) -> None:
        for _ in range(STEPS):
            learner.step(1, {0: rows_RL})

    timed = interleaved({"steps": some}, check.sizes.rounds, check.device)
    return float(np.median(timed["steps"])) / STEPS


def _inside(check: Check, name: Named, learner: Learner) -> Iterator[Finding]:
    """After all that is timed: what was profiled once is slower from then on."""
    rows = check.sizes.train_rows[0]
    step = partial(learner.step, 1, {0: train.microbatch(check.benchmark(rows))})
    step()  # it may compile, and waits for each kernel that it tries
    waits = profiles.synchronisations(step, check.device)
    bar = Bar("≤", MOST_SYNCHRONISATIONS, here=check.gpu)
    yield Finding(f"{name} step: waits for the GPU", waits, "", bar)
    yield Finding(f"{name} step, B = {rows}: kernels", profiles.kernels(step, check.device))
