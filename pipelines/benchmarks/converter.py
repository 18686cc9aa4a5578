"""The converter against the two matrix products that it cannot do without.

Shapes: N positions, D table dimension, W backbone width, V tokens, U = V + 1 slots.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dsl.state import State
from infra import parallel
from pipelines.benchmarks.measure import Procedure, interleaved
from pipelines.benchmarks.results import ratio, table
from pipelines.benchmarks.settings import BenchmarkConfig, build
from pipelines.report import Table

SNR = 10.0


def run(config: BenchmarkConfig) -> Table:
    device = parallel.device()
    timed = interleaved(procedures(config, device), config.rounds, device)
    against = "its two bare products"
    rows = [
        ratio("forward", "forward", against, timed["forward"], timed["products"]),
        ratio("backward", "and backward", against, timed["backward"], timed["products_backward"]),
    ]
    note = (
        f"{config.converter.positions} tokens at SNR {SNR:g}, V={config.model.tokens}. The "
        "converter works in chunks and recomputes them in the backward pass, which is one product "
        "more than the bare products need."
    )
    return table("Converter", note, rows)


def procedures(config: BenchmarkConfig, device: torch.device) -> dict[str, Procedure]:
    """What is timed, by name."""
    denoiser = build(config.model.dsl(), device)
    # Training asks for the gradients of evidence, table and values.
    table_VD = denoiser.table_VD.detach().clone().requires_grad_()
    values_UW = denoiser.backbone.values_UW
    draws = torch.Generator().manual_seed(0)
    tokens_1N = torch.randint(len(table_VD), (1, config.converter.positions), generator=draws)
    nothing_1N = torch.zeros_like(tokens_1N, dtype=torch.bool)
    gamma_1N = torch.full(tokens_1N.shape, SNR)
    evidence = State.from_tokens(table_VD.detach(), tokens_1N, nothing_1N, gamma_1N)
    z_ND = evidence.z_BLD[0].clone().requires_grad_()

    def converter() -> Tensor:
        return denoiser.converter(evidence, table_VD, values_UW)

    def products() -> Tensor:
        return F.linear(z_ND, table_VD) @ values_UW[:-1]

    def forward(of: Callable[[], Tensor]) -> Procedure:
        return torch.no_grad()(lambda number: of())

    def backward(of: Callable[[], Tensor]) -> Procedure:
        def both(number: int) -> None:
            of().sum().backward()
            denoiser.zero_grad(set_to_none=True)
            table_VD.grad = z_ND.grad = None

        return both

    return {
        "forward": forward(converter),
        "products": forward(products),
        "backward": backward(converter),
        "products_backward": backward(products),
    }
