"""One denoiser call of each kind of sampler, against the bare network and the reference procedure.

Shapes: B rows, L positions, D table dimension, W backbone width.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F

import dsl
from dsl.channel import transition
from dsl.denoiser import Denoiser
from dsl.noise import Draws
from dsl.paths.clock import Clock, Path
from dsl.posterior import Denoises
from dsl.recorders import Schedule
from dsl.state import State
from dsl.truncation import Truncated
from infra import parallel
from pipelines.benchmarks import reference
from pipelines.benchmarks.measure import Procedure, interleaved
from pipelines.benchmarks.results import Bar, ratio, table
from pipelines.benchmarks.settings import BenchmarkConfig, ModelConfig, SamplerConfig
from pipelines.benchmarks.settings import build as build_denoiser
from pipelines.report import Row, Table

MASKED = dsl.paths.Masked()
REMASK = dsl.paths.Remask(rule="cap")
SDE = dsl.paths.SentenceSDE(gamma_max=100.0)


def run(config: BenchmarkConfig) -> Table:
    device, size = parallel.device(), config.sampler
    # On a GPU, matrix products are in bf16.
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, device.type == "cuda"):
        timed = interleaved(procedures(config, device), config.rounds, device)
    note = (
        f"One call halfway through {size.budget}, B={size.rows}, L={size.length}, "
        f"V={config.model.tokens}, nucleus {size.nucleus}. The reference call is ReMDM cap by the "
        "procedure of public code."
    )
    rows = [*_calls(config, timed), _budget(size)]
    return table("Sampler", note, rows)


def procedures(config: BenchmarkConfig, device: torch.device) -> dict[str, Procedure]:
    """What is timed, by name."""
    size = config.sampler
    denoiser = build_denoiser(config.model.dsl(), device).eval()
    sharp = Truncated(denoiser, 1.0, size.nucleus, "drop")
    endpoints, evidence = states(denoiser, size)
    inputs_BLW = denoiser.converter(endpoints, denoiser.table_VD, denoiser.backbone.values_UW)
    draws = torch.Generator(device)

    def clock(number: int) -> Clock:
        call = size.budget // 2 + number % max(size.budget // 2, 1)
        return Clock(call=call, budget=size.budget, draws=Draws(0, 0, call))

    def call(denoises: Denoises, path: Path, state: State) -> Procedure:
        return lambda number: one_call(denoises, path, state, clock(number))

    return {
        "backbone": lambda number: denoiser.backbone(inputs_BLW),
        "masked": call(sharp, MASKED, endpoints),
        "remask": call(sharp, REMASK, endpoints),
        "head": lambda number: F.linear(denoiser.backbone(inputs_BLW), *denoiser.backbone.head),
        "sde": call(denoiser, SDE, evidence),
        "sde_nucleus": call(sharp, SDE, evidence),
        "reference": lambda number: reference.step(
            denoiser, endpoints, REMASK.chances(clock(number)), size.nucleus, draws
        ),
    }


def one_call(denoises: Denoises, path: Path, state: State, clock: Clock) -> State:
    """One step of `dsl.sample`, except that the network is evaluated even if no token moves."""
    posterior = denoises(state)
    gamma_next_BL, _ = path.target(state, posterior, path.init(state), clock)
    return transition(state, gamma_next_BL, posterior, clock.draws)


def states(denoiser: Denoiser, size: SamplerConfig) -> tuple[State, State]:
    """A state with half of the tokens revealed, and one with all of them at the SNR that the SDE
    has reached halfway."""
    draws, shape = torch.Generator().manual_seed(0), (size.rows, size.length)
    tokens_BL = torch.randint(len(denoiser.table_VD), shape, generator=draws)
    gamma_BL = torch.where(torch.rand(shape, generator=draws) < 0.5, torch.inf, 0.0)
    nothing_BL = torch.zeros(shape, dtype=torch.bool)
    halfway_BL = torch.full(shape, SDE.gamma(0.5))
    return (
        State.from_tokens(denoiser.table_VD, tokens_BL, nothing_BL, gamma_BL),
        State.from_tokens(denoiser.table_VD, tokens_BL, nothing_BL, halfway_BL),
    )


def _calls(config: BenchmarkConfig, timed: dict[str, np.ndarray]) -> Iterator[Row]:
    here = (config.model, config.sampler) == (ModelConfig(), SamplerConfig())
    gpu = parallel.device().type == "cuda"
    bare, head, public = timed["backbone"], timed["head"], timed["reference"]
    limit, endpoint, full = "backbone without head", Bar("≤", 1.1, here), Bar("≤", 1.5, here)
    yield ratio("masked", "Masked call", limit, timed["masked"], bare, bar=endpoint)
    yield ratio("remask", "Remask call", limit, timed["remask"], bare, bar=endpoint)
    yield ratio("reference", "reference call", limit, public, bare)
    yield ratio("sde", "SDE call, no nucleus", "backbone and head", timed["sde"], head, bar=full)
    yield ratio("sde_nucleus", "SDE call", "backbone and head", timed["sde_nucleus"], head)
    bar = Bar("≤", 0.1, here and gpu)
    yield ratio("remask_public", "Remask call", "reference call", timed["remask"], public, bar=bar)


def _budget(size: SamplerConfig) -> Row:
    """Calls of a whole run against steps that reveal a token. Any law will do."""
    law = dsl.ExactDenoiser(torch.eye(2), torch.zeros(1, size.length, dtype=torch.long))
    state = State.masked(1, size.length, 2)
    made = dsl.sample(law, MASKED, state, budget=size.budget, seed=0, recorders=[Schedule()])
    steps = np.count_nonzero(made.recorded["schedule"]["reveals"])
    what, against = f"calls of Masked, T={size.budget}", "steps with a reveal"
    bar = Bar("≤", 1.0, here=True)
    return ratio("calls", what, against, made.calls, steps, unit="calls", bar=bar)
