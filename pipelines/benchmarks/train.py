"""One optimizer step of each objective, against the reference loss and the machine's arithmetic.

Shapes: R rounds, B rows, L positions, V tokens, D table dimension, W backbone width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from dsl.noise import generator
from dsl.objective import DSLObjective, MDLMObjective, Objective
from dsl.support import Mixed
from infra import parallel
from infra.parallel import ParallelConfig
from pipelines.benchmarks import measure, reference
from pipelines.benchmarks.measure import Matmul, Procedure, interleaved
from pipelines.benchmarks.results import Bar, ratio, table
from pipelines.benchmarks.settings import BenchmarkConfig, ModelConfig, StepConfig, build
from pipelines.report import Row, Table
from pipelines.training.learner import Learner
from pipelines.training.settings import TrainConfig

LOSSES = ("mdlm", "reference", "dsl")
DECAY = 0.999
STEP, LANE = 1, 0  # the key of the noise: the same noise in every round


def run(config: BenchmarkConfig) -> Table:
    device = parallel.device()
    # All in one process group, so that its settings of determinism hold for all of them.
    with parallel.join(ParallelConfig(threads=config.threads)) as mesh:
        work = {name: flops(config, name, device) for name in ("mdlm", "dsl")}
        bare = {name: procedure(config, name, device) for name in LOSSES}
        product = Matmul(device)
        work["matmul"] = product.flops
        timed = interleaved({**bare, "matmul": product}, config.rounds, device)
        del bare["reference"], bare["dsl"], product  # room for one more set of weights
        workers = {**bare, "sharded": sharded(config, mesh)}
        looped = interleaved(workers, config.rounds, device)
        del bare, workers
        utilised = list(_utilisation(config, mesh))
    peaks = {name: measure.peak_gib(two_steps, config, name) for name in LOSSES}
    size = config.train
    note = (
        f"B={size.rows}, L={size.length}, V={config.model.tokens}. A step is the loss and gradient "
        "of one microbatch, clipping, AdamW and the average of the weights. FLOPs are those of the "
        "loss, without what its backward pass recomputes."
    )
    rows = [*_steps(config, timed, work), *_memory(config, peaks)]
    return table("Training step", note, [*rows, *_worker(config, looped), *utilised])


def procedure(config: BenchmarkConfig, name: str, device: torch.device) -> Procedure:
    """One step of a bare loop: one device, nothing sharded, always the same microbatch."""
    tokens_BL = torch.from_numpy(microbatch(config)).to(device)
    objective = _objective(config, name, device)
    public = name == "reference"
    bare = BareLoop(objective, device, fused=not public)

    def loss() -> Tensor:
        if public:
            return reference.mdlm_loss(objective.denoiser, tokens_BL, _draws())
        return objective(tokens_BL, _draws()).value

    return lambda number: bare.step(loss)


class BareLoop:
    """Weights, their average and AdamW as workers have them, and nothing else.

    fused: one kernel each for AdamW and the average; otherwise several passes, as in public code.
    """

    def __init__(self, module: nn.Module, device: torch.device, *, fused: bool) -> None:
        self.module, self.device, self.fused = module, device, fused
        self.average = parallel.averaged(module, DECAY)
        self.trained = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=3e-4, weight_decay=0.0, fused=fused or None
        )

    def step(self, loss: Callable[[], Tensor]) -> None:
        with torch.autocast(self.device.type, torch.bfloat16, self.device.type == "cuda"):
            value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.fused:
            self.average.update_parameters(self.module)
            return
        pairs = zip(self.average.module.parameters(), self.module.parameters(), strict=True)
        with torch.no_grad():
            for average, parameter in pairs:
                average.sub_((1 - DECAY) * (average - parameter))


def two_steps(config: BenchmarkConfig, name: str) -> None:
    """For their memory: during the first step, AdamW's moments and the average do not exist."""
    step = procedure(config, name, parallel.device())
    step(0)
    step(1)


def sharded(config: BenchmarkConfig, mesh: DeviceMesh, *, compile: bool = False) -> Procedure:
    """The step that runs under Ray Train, in this one process."""
    device, sharding = parallel.device(), ParallelConfig(compile=compile)
    learner = Learner(_objective(config, "mdlm", device), TrainConfig(), mesh, sharding)
    microbatch_BL = microbatch(config)
    return lambda number: learner.step(STEP, {LANE: microbatch_BL})


@torch.no_grad()
def flops(config: BenchmarkConfig, name: str, device: torch.device) -> float:
    """Floating-point operations of a step with the draws that are timed."""
    objective = _objective(config, name, device)
    tokens_BL = torch.from_numpy(microbatch(config)).to(device)
    metrics = objective(tokens_BL, _draws()).metrics
    evidence = float(metrics.get("evidence_share", 0.0))
    predicted = evidence + float(metrics["masked_share"])
    return tokens_BL.numel() * objective.denoiser.flops_per_token(
        config.train.length, predicted=predicted, evidence=evidence
    )


def microbatch(config: BenchmarkConfig) -> np.ndarray:
    shape = (config.train.rows, config.train.length)
    return np.random.default_rng(0).integers(config.model.tokens, size=shape)


def _objective(config: BenchmarkConfig, name: str, device: torch.device) -> Objective:
    if name == "dsl":
        return DSLObjective(build(config.model.dsl(), device), Mixed())
    return MDLMObjective(build(config.model.mdlm(), device))


def _draws() -> torch.Generator:
    """The learner's, on the CPU whatever the device."""
    return generator(TrainConfig().stream.seed, STEP, LANE)


def _here(config: BenchmarkConfig) -> bool:
    """Whether these are the sizes for which the bars were set."""
    return (config.model, config.train) == (ModelConfig(), StepConfig())


def _steps(
    config: BenchmarkConfig, timed: Mapping[str, np.ndarray], work: Mapping[str, float]
) -> Iterator[Row]:
    here = _here(config)
    mdlm, dsl, public = timed["mdlm"], timed["dsl"], timed["reference"]
    extra = work["dsl"] / work["mdlm"]
    against = f"MDLM step ({extra:.2f} x its FLOPs)"
    yield ratio("dsl", "DSL step", against, dsl, mdlm, bar=Bar("≤", 1.1 * extra, here))
    yield ratio("mdlm", "MDLM step", "reference step", mdlm, public, bar=Bar("≤", 0.6, here))
    rate, most = (work[name] / timed[name] / 1e9 for name in ("mdlm", "matmul"))
    yield ratio("matmul", "MDLM step's FLOPs", "a bare product's", rate, most, unit="GFLOP/s")


def _memory(config: BenchmarkConfig, peaks: Mapping[str, float]) -> Iterator[Row]:
    mdlm, here = peaks["mdlm"], _here(config)
    for name, what, other, most in (
        ("dsl", "MDLM step", mdlm, 1.1),
        ("mdlm", "reference step", peaks["reference"], 0.75),
    ):
        title, bar = f"{name.upper()} step, peak", Bar("≤", most, here)
        yield ratio(f"{name}_memory", title, what, peaks[name], other, unit="GiB", bar=bar)


def _worker(config: BenchmarkConfig, timed: Mapping[str, np.ndarray]) -> Iterator[Row]:
    tokens = config.train.rows * config.train.length
    bare_R, sharded_R = (tokens / timed[name] / 1e3 for name in ("mdlm", "sharded"))
    what, bar = "the worker's loop, one worker", Bar("≥", 0.98, _here(config))
    yield ratio("sharded", what, "bare loop", sharded_R, bare_R, unit="k tokens/s", bar=bar)


def _utilisation(config: BenchmarkConfig, mesh: DeviceMesh) -> Iterator[Row]:
    """Of a GPU that is known: compiled, at a size that fills it."""
    if not (peak := parallel.peak_flops()):
        return
    device, config = parallel.device(), replace(config, train=config.filled)
    timed = interleaved({"mfu": sharded(config, mesh, compile=True)}, config.rounds, device)
    rate_R = flops(config, "mdlm", device) / timed["mfu"] / 1e12
    bar = Bar("≥", 0.4, config.model == ModelConfig() and config.train.length == 1024)
    what = f"MFU, compiled, B={config.train.rows}, L={config.train.length}"
    yield ratio("mfu", what, "data sheet", rate_R, peak / 1e12, unit="TFLOP/s", bar=bar)
