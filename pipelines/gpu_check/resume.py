"""A run that goes on in a fresh process against one that was never interrupted, bit for bit."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import numpy as np
from torch import Tensor

from infra import parallel
from infra.checkpoints import Checkpoints
from infra.parallel import ParallelConfig
from pipelines.benchmarks import train
from pipelines.benchmarks.results import Bar
from pipelines.gpu_check.findings import Finding
from pipelines.gpu_check.settings import Check
from pipelines.training.learner import Learner
from pipelines.training.settings import TrainConfig

HALF, WHOLE = 3, 6  # steps


def run(check: Check) -> Iterator[Finding]:
    what = f"bits that differ: {WHOLE} steps, and {HALF}, a fresh process and {WHOLE - HALF} more"
    for deterministic in (True, False):
        sharding = ParallelConfig(deterministic=deterministic)
        with tempfile.TemporaryDirectory(dir=check.scratch()) as folder:
            differ, total = _compared(check, sharding, folder)
        how, bar = ("", Bar("≤", 0)) if deterministic else (" (not deterministic)", None)
        yield Finding(what + how, differ, f"of {total:,}", bar)


def _compared(check: Check, sharding: ParallelConfig, folder: str) -> tuple[int, int]:
    """How many bits of the weights, their average and AdamW's moments differ, and of how many."""
    checkpoints = Checkpoints(folder, keep=2)
    with parallel.join(sharding) as mesh:
        half = Learner(check.objective("dsl"), TrainConfig(), mesh, sharding)
        _train(half, check, 1, HALF)
        checkpoints.save(HALF, half.tensors(), meta={})
        checkpoints.wait()
        del half
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
            fresh.submit(_go_on, check, sharding, folder).result()
        learner = Learner(check.objective("dsl"), TrainConfig(), mesh, sharding)
        _train(learner, check, 1, WHOLE)
        whole = _bytes(learner.tensors())
        checkpoints.load(WHOLE, learner.tensors())
        resumed = _bytes(learner.tensors())
    differ = sum(int(np.bitwise_count(whole[name] ^ resumed[name]).sum()) for name in whole)
    return differ, sum(8 * len(tensor) for tensor in whole.values())


def _go_on(check: Check, sharding: ParallelConfig, folder: str) -> None:
    """From the last checkpoint to the end; in a process of its own."""
    checkpoints = Checkpoints(folder, keep=2)
    with parallel.flushed(), parallel.join(sharding) as mesh:
        learner = Learner(check.objective("dsl"), TrainConfig(), mesh, sharding)
        checkpoints.resume(learner.tensors())
        _train(learner, check, HALF + 1, WHOLE)
        checkpoints.save(WHOLE, learner.tensors(), meta={})
        checkpoints.wait()


def _train(learner: Learner, check: Check, first: int, last: int) -> None:
    rows_RL = train.microbatch(check.benchmark(rows=check.sizes.train_rows[0]))
    for step in range(first, last + 1):
        learner.step(step, {0: rows_RL})


def _bytes(tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """A copy of each tensor's bytes."""
    return {
        name: np.frombuffer(parallel.full(tensor).cpu().numpy().tobytes(), np.uint8)
        for name, tensor in tensors.items()
    }
