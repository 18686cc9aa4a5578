"""Sampler calls against the bare network and against the reference procedure, on a GPU all of
them compiled.

Shapes: B rows, L positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import dsl
from dsl import narrow
from dsl.denoiser import Denoiser
from dsl.noise import Draws
from dsl.paths.clock import Clock, Path
from dsl.posterior import Denoises, Posterior
from dsl.precision import dtype_of, products_in
from dsl.state import State
from dsl.truncation import Truncated
from pipelines.benchmarks import reference, sampler
from pipelines.benchmarks.measure import Procedure, interleaved
from pipelines.benchmarks.results import Bar
from pipelines.benchmarks.settings import SamplerConfig, build
from pipelines.gpu_check import profiles
from pipelines.gpu_check.findings import Finding
from pipelines.gpu_check.settings import Check

SPLIT = (4, 4)
HYBRID = dsl.paths.Hybrid(sampler.SDE, sampler.MASKED, split=SPLIT)
REFERENCE_ROWS = 4  # at a time: the procedure holds several numbers for every token and position
MOST_WAITS = 3  # of a call for the GPU
# (what, against what, the ratio's bar), judged at the most rows.
MOST = (("masked", "head", 1.15), ("remask", "head", 1.15), ("sde", "masked_full", 1.3))
LEAST = (("reference", "masked", 10.0), ("reference", "remask", 10.0))
SAID = {
    "backbone": "backbone",
    "head": "backbone and head",
    "masked": "Masked",
    "masked_full": "Masked with a full posterior",
    "remask": "Remask",
    "sde": "SDE",
    "hybrid": f"Hybrid, the mean of its {sum(SPLIT)} calls",
    "reference": "reference procedure",
}


def run(check: Check) -> Iterator[Finding]:
    denoiser = build(check.sizes.model.dsl(), check.device).eval()
    denoiser = denoiser.computing_in(dtype_of("auto", check.device))
    denoiser = denoiser.compiled() if check.gpu else denoiser
    with torch.no_grad():
        for rows in check.sizes.sampler_rows:
            yield from _of_rows(check, denoiser, check.benchmark(rows).sampler)


def _of_rows(check: Check, denoiser: Denoiser, size: SamplerConfig) -> Iterator[Finding]:
    timed = procedures(denoiser, size)
    seconds = interleaved(timed, check.sizes.rounds, check.device)
    calls = dict.fromkeys(timed, 1) | {"hybrid": sum(SPLIT)}
    ms = {name: 1e3 * float(np.median(spent)) / calls[name] for name, spent in seconds.items()}
    for name, said in SAID.items():
        call, procedure = f"{said}, B = {size.rows}", timed[name]
        yield Finding(f"{call}: a call", ms[name], "ms")
        memory = profiles.peak_gib(lambda p=procedure: p(0), check.device)
        yield Finding(f"{call}: peak memory", memory, "GiB")
        if name in ("masked", "remask", "sde"):
            waits = profiles.synchronisations(lambda p=procedure: p(0), check.device)
            bar = Bar("≤", MOST_WAITS, here=check.gpu)
            yield Finding(f"{call}: waits for the GPU", waits, "", bar)
    yield from _ratios(check, ms, size.rows)


def _ratios(check: Check, ms: Mapping[str, float], rows: int) -> Iterator[Finding]:
    here = check.speed_counts and rows == max(check.sizes.sampler_rows)
    for ratios, sign in ((MOST, "≤"), (LEAST, "≥")):
        for ours, theirs, limit in ratios:
            what = f"{SAID[ours]} / {SAID[theirs]}, B = {rows}"
            yield Finding(what, ms[ours] / ms[theirs], "x", Bar(sign, limit, here=here))


def procedures(denoiser: Denoiser, size: SamplerConfig) -> dict[str, Procedure]:
    """One call each, halfway through a budget; of `hybrid` a whole run."""
    endpoints, evidence = sampler.states(denoiser, size)
    endpoints, evidence = (state.like(denoiser.table_VD) for state in (endpoints, evidence))
    sharp = Truncated(denoiser, 1.0, size.nucleus, "drop")
    clock = Clock(call=size.budget // 2, budget=size.budget, draws=Draws(0, 0, size.budget // 2))
    device = denoiser.table_VD.device
    with products_in(dtype_of("auto", device), device):  # of the dtype that calls give the network
        inputs_BLW = denoiser.converter(endpoints, denoiser.table_VD, denoiser.backbone.values_UW)
    draws, chances = torch.Generator(device), sampler.REMASK.chances(clock)
    everywhere_N = torch.arange(endpoints.gamma_BL.numel())

    def call(denoises: Denoises, path: Path, state: State) -> Procedure:
        return lambda number: sampler.one_call(denoises, path, state, clock)

    def asked_everywhere(state: State) -> Posterior:
        posterior = denoiser(state)
        posterior.summarise(lambda log_probs_NV: log_probs_NV.amax(-1), everywhere_N)
        return posterior

    def backbone(number: int) -> Tensor:
        with products_in(dtype_of("auto", device), device):
            return denoiser.backbone(inputs_BLW)

    weight_VW, bias_V = denoiser.backbone.head
    head = narrow.padded(weight_VW), narrow.padded(bias_V[:, None])[:, 0]

    def with_head(number: int) -> Tensor:
        with products_in(dtype_of("auto", device), device):
            return F.linear(denoiser.backbone(inputs_BLW), *head)

    def hybrid(number: int) -> object:
        empty = State.masked(size.rows, size.length, denoiser.config.embed_dim)
        return dsl.sample(sharp, HYBRID, empty, budget=sum(SPLIT), seed=0)

    def public(number: int) -> None:
        for rows_R in torch.arange(size.rows).split(REFERENCE_ROWS):
            reference.step(denoiser, endpoints.rows(rows_R), chances, size.nucleus, draws)

    return {
        "backbone": backbone,
        "head": with_head,
        "masked": call(sharp, sampler.MASKED, endpoints),
        "masked_full": call(asked_everywhere, sampler.MASKED, endpoints),
        "remask": call(sharp, sampler.REMASK, endpoints),
        "sde": call(denoiser, sampler.SDE, evidence),
        "hybrid": hybrid,
        "reference": public,
    }
