"""One denoiser call of every kind of sampler, beside the bare network and the reference procedure.

Shapes: B rows, L positions, D table dimension, W backbone width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

import dsl
from dsl.channel import transition
from dsl.denoiser import Denoiser
from dsl.dit import DiTShape
from dsl.noise import Draws
from dsl.paths.clock import Clock, Path
from dsl.posterior import Denoises, Posterior
from dsl.state import State
from dsl.truncation import Truncated
from infra import parallel
from pipelines.benchmarks import flops, reference, timing
from pipelines.benchmarks.results import Bar, ratio, table
from pipelines.benchmarks.settings import (
    BenchmarkConfig,
    ModelConfig,
    SamplerConfig,
    build,
)
from pipelines.benchmarks.timing import Procedure
from pipelines.report import Row, Table

REMASK = dsl.paths.Remask(rule="cap")
SDE = dsl.paths.SentenceSDE(gamma_max=100.0)
MEASURED_IN_MEMORY = ("backbone", "remask", "sde", "reference")


def cost(config: BenchmarkConfig) -> float:
    """FLOPs of one round."""
    model, size = config.model.dsl(), config.sampler
    whole = flops.backbone(model, size.length) + flops.head(model)
    sde = whole + flops.converter(model) + flops.mean(model)
    # The bare backbone and the two paths of endpoints; with a head; the reference; two SDE calls.
    calls = 3 * flops.backbone(model, size.length) + 2 * whole + 2 * sde
    return size.rows * size.length * calls


def run(config: BenchmarkConfig) -> Table:
    device = parallel.device()
    with _inference(device):
        timed = timing.interleaved(procedures(config, device), config.rounds, device)
        rows = [*_of_time(config, timed), *_of_calls(config.sampler)]
    peaks = {name: timing.peak_gib(once, config, name) for name in MEASURED_IN_MEMORY}
    rows += _of_memory(peaks)
    size = config.sampler
    note = (
        f"One call at the middle of {size.budget}, B={size.rows}, L={size.length}, "
        f"V={config.model.tokens}, nucleus {size.nucleus}. Reference: ReMDM cap by the procedure "
        "of public code."
    )
    return table("Sampler", note, rows)


def procedures(config: BenchmarkConfig, device: torch.device) -> dict[str, Procedure]:
    """What is timed, by name; each takes the number of the round."""
    size = config.sampler
    denoiser = build(config.model.dsl(), device).eval()
    sharp = Truncated(denoiser, 1.0, size.nucleus, "drop")
    endpoints, evidence = _states(denoiser, size)
    inputs_BLW = denoiser.converter(endpoints, denoiser.table_VD, denoiser.backbone.values_UW)
    draws = torch.Generator(device)

    def clock(number: int) -> Clock:
        call = size.budget // 2 + number % max(size.budget // 2, 1)
        return Clock(call=call, budget=size.budget, draws=Draws(0, 0, call))

    def call(denoises: Denoises, path: Path, state: State) -> Procedure:
        return lambda number: one_call(denoises, path, state, clock(number))

    return {
        "backbone": lambda number: denoiser.backbone(inputs_BLW),
        "masked": call(sharp, dsl.paths.Masked(), endpoints),
        "remask": call(sharp, REMASK, endpoints),
        "head": lambda number: F.linear(denoiser.backbone(inputs_BLW), *denoiser.backbone.head),
        "sde": call(denoiser, SDE, evidence),
        "sde_nucleus": call(sharp, SDE, evidence),
        "reference": lambda number: reference.step(
            denoiser, endpoints, REMASK.chances(clock(number)), size.nucleus, draws
        ),
    }


def one_call(denoises: Denoises, path: Path, state: State, clock: Clock) -> State:
    """One step of `dsl.sample`, whose network is evaluated whether a token moves or not."""
    posterior = denoises(state)
    gamma_next_BL, _ = path.target(state, posterior, path.init(state), clock)
    return transition(state, gamma_next_BL, posterior, clock.draws)


def once(config: BenchmarkConfig, name: str) -> None:
    """One procedure by itself, for its memory."""
    device = parallel.device()
    with _inference(device):
        procedures(config, device)[name](0)


def _of_time(config: BenchmarkConfig, timed: Mapping[str, Any]) -> Iterator[Row]:
    here = (config.model, config.sampler) == (ModelConfig(), SamplerConfig())
    gpu = parallel.device().type == "cuda"
    bare, head, public = timed["backbone"], timed["head"], timed["reference"]
    limit = "backbone without head"
    endpoint = Bar("≤", 1.1, here)
    full = Bar("≤", 1.5, here)
    yield ratio("masked", "Masked call", limit, timed["masked"], bare, bar=endpoint)
    yield ratio("remask", "Remask call", limit, timed["remask"], bare, bar=endpoint)
    yield ratio("reference", "reference call", limit, public, bare)
    yield ratio("sde", "SDE call, no nucleus", "backbone and head", timed["sde"], head, bar=full)
    yield ratio("sde_nucleus", "SDE call", "backbone and head", timed["sde_nucleus"], head)
    bar = Bar("≤", 0.1, here and gpu)
    yield ratio("remask_public", "Remask call", "reference call", timed["remask"], public, bar=bar)


def _of_calls(size: SamplerConfig) -> Iterator[Row]:
    """Calls of a whole run, which do not depend on the network: any will do."""
    tiny = ModelConfig(
        backbone=DiTShape(width=8, blocks=1, heads=1, cond_dim=4),
        tokens=16,
        embed_dim=4,
    )
    denoiser = build(tiny.dsl(), torch.device("cpu")).eval()
    reveals = Reveals()
    state = State.masked(1, size.length, 4)
    budget = size.budget
    path = dsl.paths.Masked()
    made = dsl.sample(denoiser, path, state, budget=budget, seed=0, recorders=[reveals])
    bar = Bar("≤", 1.0, here=True)
    what, steps = f"calls of Masked, T={budget}", float(made.recorded[reveals.name])
    yield ratio("calls", what, "steps with a reveal", made.calls, steps, unit="calls", bar=bar)
    yield ratio("calls_public", what, "reference", made.calls, budget, unit="calls")


def _of_memory(peaks: Mapping[str, float]) -> Iterator[Row]:
    sides = {"": ("backbone, peak", "backbone"), "_public": ("reference, peak", "reference")}
    for name, what in (("remask", "Remask call, peak"), ("sde", "SDE call, peak")):
        for end, (against, other) in sides.items():
            key = f"{name}_memory{end}"
            yield ratio(key, what, against, peaks[name], peaks[other], unit="GiB")


class Reveals:
    """Counts the steps at which a token is revealed."""

    name = "reveals"

    def __init__(self) -> None:
        self.steps = 0

    def observe(self, clock: Clock, before: State, posterior: Posterior, after: State) -> None:
        self.steps += bool((after.revealed_BL & ~before.revealed_BL).any())

    def result(self) -> int:
        return self.steps


def _states(denoiser: Denoiser, size: SamplerConfig) -> tuple[State, State]:
    """Half of the tokens revealed, and all of them at an SNR in the middle of the grid."""
    table_VD = denoiser.table_VD
    shape = (size.rows, size.length)
    draws = torch.Generator().manual_seed(0)
    tokens_BL = torch.randint(len(table_VD), shape, generator=draws)
    revealed_BL = torch.rand(shape, generator=draws) < 0.5
    nothing_BL = torch.zeros_like(revealed_BL)
    gamma_BL = torch.where(revealed_BL, torch.inf, 0.0)
    # The next call is the first of the second half, which goes on from here.
    midway_BL = torch.full(shape, SDE.gamma(0.5))
    return (
        State.from_tokens(table_VD, tokens_BL, nothing_BL, gamma_BL),
        State.from_tokens(table_VD, tokens_BL, nothing_BL, midway_BL),
    )


@contextmanager
def _inference(device: torch.device) -> Iterator[None]:
    """No gradients; on a GPU, products in bf16."""
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, device.type == "cuda"):
        yield
