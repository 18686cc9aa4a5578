"""One optimizer step of every objective, beside the reference loss and the limit of the machine.

Shapes: R rounds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import numpy as np

from infra import parallel
from infra.parallel import ParallelConfig
from pipelines.benchmarks import flops, steps, timing
from pipelines.benchmarks.machine import Matmul
from pipelines.benchmarks.results import Bar, ratio, table, unmeasured
from pipelines.benchmarks.settings import BenchmarkConfig, ModelConfig, StepConfig
from pipelines.report import Row, Table

LOSSES = ("mdlm", "reference", "dsl")
Timed = Mapping[str, np.ndarray]


def cost(config: BenchmarkConfig) -> float:
    """FLOPs of one round: MDLM thrice (bare twice, then sharded), the reference, DSL."""
    mdlm, dsl, length = config.model.mdlm(), config.model.dsl(), config.train.length
    per_token = (
        3 * flops.forward(mdlm, length, predicted=0.5)
        + flops.forward(mdlm, length)
        + flops.forward(dsl, length, predicted=0.875, evidence=0.75)
    )
    return flops.STEP * config.train.rows * length * per_token


def run(config: BenchmarkConfig) -> Table:
    device = parallel.device()
    # All in one process group, whose settings of determinism then hold for all of them.
    with parallel.join(ParallelConfig(threads=config.threads)) as mesh:
        work = {name: steps.work(config, name, device) for name in ("mdlm", "dsl")}
        bare = {name: steps.procedure(config, name, device) for name in LOSSES}
        timed = timing.interleaved({**bare, "matmul": Matmul(device)}, config.rounds, device)
        del bare["reference"], bare["dsl"]  # room for one more set of weights
        sides = {**bare, "sharded": steps.sharded(config, mesh)}
        sharded = timing.interleaved(sides, config.rounds, device)
    peaks = {name: timing.peak_gib(steps.once, config, name) for name in LOSSES}
    size = config.train
    note = (
        f"B={size.rows}, L={size.length}, V={config.model.tokens}; a step is one microbatch's loss "
        "and gradient, clipping, AdamW and the average of the weights. FLOPs are the loss's: what "
        "its backward pass computes again is not counted."
    )
    rows = [*_of_steps(config, timed, work), *_of_memory(config, peaks)]
    return table("Training step", note, [*rows, *_of_sharding(config, sharded, work["mdlm"])])


def _of_steps(config: BenchmarkConfig, timed: Timed, work: Mapping[str, float]) -> Iterator[Row]:
    here = _here(config)
    mdlm, dsl, public = timed["mdlm"], timed["dsl"], timed["reference"]
    extra = work["dsl"] / work["mdlm"]
    against = f"MDLM step ({extra:.2f} x its FLOPs)"
    yield ratio("dsl", "DSL step", against, dsl, mdlm, bar=Bar("≤", 1.1 * extra, here))
    yield ratio("mdlm", "MDLM step", "reference step", mdlm, public, bar=Bar("≤", 0.6, here))
    rate, most = work["mdlm"] / mdlm / 1e9, Matmul.flops / timed["matmul"] / 1e9
    yield ratio("matmul", "MDLM step's FLOPs", "a bare product's", rate, most, unit="GFLOP/s")


def _of_memory(config: BenchmarkConfig, peaks: Mapping[str, float]) -> Iterator[Row]:
    here = _here(config)
    memory = partial(ratio, unit="GiB")
    less, equal = Bar("≤", 0.75, here), Bar("≤", 1.1, here)
    mdlm, public = peaks["mdlm"], peaks["reference"]
    yield memory("dsl_memory", "DSL step, peak", "MDLM step", peaks["dsl"], mdlm, bar=equal)
    yield memory("mdlm_memory", "MDLM step, peak", "reference step", mdlm, public, bar=less)


def _of_sharding(config: BenchmarkConfig, timed: Timed, work: float) -> Iterator[Row]:
    tokens = config.train.rows * config.train.length
    bare_R, sharded_R = (tokens / timed[name] / 1e3 for name in ("mdlm", "sharded"))
    what, bar = "FSDP2 on one worker", Bar("≥", 0.98, _here(config))
    yield ratio("sharded", what, "bare loop", sharded_R, bare_R, unit="k tokens/s", bar=bar)
    yield unmeasured("data_wait", "data wait ≤ 1 %", "every run logs speed/data_wait_percent")
    peak = parallel.peak_flops()
    if peak is None:
        yield unmeasured("mfu", "MFU ≥ 40 %, compiled", "no GPU whose peak is known")
        return
    here = config.model == ModelConfig() and config.train.length == 1024
    rate_R = work / timed["sharded"] / 1e12
    mfu = Bar("≥", 0.4, here)
    yield ratio("mfu", "MFU, compiled", "data sheet", rate_R, peak / 1e12, unit="TFLOP/s", bar=mfu)


def _here(config: BenchmarkConfig) -> bool:
    """Whether these are the sizes of the bars."""
    return (config.model, config.train) == (ModelConfig(), StepConfig())
