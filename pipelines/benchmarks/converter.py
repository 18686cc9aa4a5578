"""The converter by itself, beside the two bare products that it cannot do without.

Shapes: N positions, D table dimension, W backbone width, V tokens, U = V + 1 slots.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from dsl.converter import weights
from dsl.denoiser import Denoiser
from dsl.state import State
from infra import parallel
from pipelines.benchmarks import flops, timing
from pipelines.benchmarks.results import ratio, table
from pipelines.benchmarks.settings import BenchmarkConfig, build
from pipelines.report import Table

SNR = 10.0


def cost(config: BenchmarkConfig) -> float:
    """FLOPs of one round: forward and a step, of the converter and of its products."""
    per_position = flops.converter(config.model.dsl())
    return 2 * (1 + flops.STEP) * config.converter.positions * per_position


def run(config: BenchmarkConfig) -> Table:
    device = parallel.device()
    parts = procedures(config, device)
    timed = timing.interleaved(
        {name: lambda number, part=part: part() for name, part in parts.items()},
        config.rounds,
        device,
    )
    peaks = {name: timing.peak_gib(once, config, name) for name in ("backward", "plain_backward")}
    two, whole, each = "its two bare products", "the same at one go", "a row of the values each"
    backward, plain = timed["backward"], timed["plain_backward"]
    memory = [peaks[name] for name in ("backward", "plain_backward")]
    rows = [
        ratio("forward", "forward", two, timed["forward"], timed["products"]),
        ratio("backward", "and backward", two, backward, timed["products_backward"]),
        ratio("plain", "and backward", whole, backward, plain),
        ratio("memory", "and backward, peak", whole, *memory, unit="GiB"),
        ratio("endpoints", "endpoints only", each, timed["endpoints"], timed["lookup"]),
    ]
    note = (
        f"{config.converter.positions} tokens at SNR {SNR:g}, V={config.model.tokens}. In chunks "
        "that the backward pass computes again: a product more than the bare ones have."
    )
    return table("Converter", note, rows)


def procedures(config: BenchmarkConfig, device: torch.device) -> Mapping[str, Callable[[], object]]:
    """What is timed, by name."""
    denoiser = build(config.model.dsl(), device)
    table_VD, values_UW = denoiser.table_VD.detach(), denoiser.backbone.values_UW
    draws = torch.Generator().manual_seed(0)
    tokens_1N = torch.randint(len(table_VD), (1, config.converter.positions), generator=draws)
    nothing_1N = torch.zeros_like(tokens_1N, dtype=torch.bool)

    def state(gamma_1N: Tensor) -> State:
        return State.from_tokens(table_VD, tokens_1N, nothing_1N, gamma_1N)

    evidence = state(torch.full(tokens_1N.shape, SNR))
    half_1N = torch.arange(tokens_1N.shape[1])[None] % 2 == 0
    endpoints = state(torch.where(half_1N, torch.inf, 0.0))
    z_ND = evidence.z_BLD[0].clone().requires_grad_()
    ids_N = endpoints.tokens_BL[0]

    def products() -> Tensor:
        return F.linear(z_ND, table_VD) @ values_UW[:-1]

    def ours(of: State) -> Tensor:
        return denoiser.converter(of, table_VD, values_UW)

    return {
        "forward": _without_gradient(lambda: ours(evidence)),
        "products": _without_gradient(products),
        "backward": _with_gradient(lambda: ours(evidence), denoiser),
        "products_backward": _with_gradient(products, denoiser),
        "plain_backward": _with_gradient(
            lambda: weights(*denoiser.converter.asked(z_ND, table_VD)) @ values_UW, denoiser
        ),
        "endpoints": _without_gradient(lambda: ours(endpoints)),
        "lookup": _without_gradient(lambda: F.embedding(ids_N, values_UW)),
    }


def once(config: BenchmarkConfig, name: str) -> None:
    """One procedure by itself, for its memory."""
    procedures(config, parallel.device())[name]()


def _without_gradient(function: Callable[[], Tensor]) -> Callable[[], object]:
    return torch.no_grad()(function)


def _with_gradient(function: Callable[[], Tensor], denoiser: Denoiser) -> Callable[[], object]:
    def both() -> None:
        function().sum().backward()
        denoiser.zero_grad(set_to_none=True)

    return both
