"""What the machine is: card, versions, kernels of attention, rates of matrix products.

Shapes: B rows, L positions, H heads, K head dimension.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from infra import parallel
from infra.parallel import ParallelConfig
from pipelines.benchmarks import train
from pipelines.benchmarks.measure import interleaved
from pipelines.gpu_check.findings import Finding
from pipelines.gpu_check.profiles import attention
from pipelines.gpu_check.settings import Check
from pipelines.training.learner import Learner
from pipelines.training.settings import TrainConfig

# The dtype of the factors, and torch's own setting for products of float32.
ARITHMETIC = {
    "float32": (torch.float32, "highest"),
    "TF32": (torch.float32, "high"),
    "bfloat16": (torch.bfloat16, "highest"),
}
KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def run(check: Check) -> Iterator[Finding]:
    yield from _versions(check)
    for sharding in (ParallelConfig(), ParallelConfig(deterministic=False)):
        how = "" if sharding.deterministic else ", not deterministic"
        yield Finding(f"attention of a training step{how}", _attention(check, sharding))
    yield from _kernels(check)
    yield from _products(check)


def _versions(check: Check) -> Iterator[Finding]:
    yield Finding("Python", platform.python_version())
    yield Finding("torch", torch.__version__)
    yield Finding("threads of the CPU", torch.get_num_threads())
    if not check.gpu:
        yield Finding("card", "none: this is the CPU")
        return
    card = torch.cuda.get_device_properties(check.device)
    yield Finding("card", card.name)
    yield Finding("compute capability", f"{card.major}.{card.minor}")
    yield Finding("memory of the card", card.total_memory / 2**30, "GiB")
    yield Finding("CUDA of torch", str(torch.version.cuda))
    yield Finding("cuDNN", str(torch.backends.cudnn.version()))
    yield Finding("NCCL", ".".join(map(str, torch.cuda.nccl.version())))
    peak = parallel.peak_flops()
    yield Finding("peak of the data sheet, bf16", peak and peak / 1e12, "TFLOP/s")


def _attention(check: Check, sharding: ParallelConfig) -> str:
    """The operators of attention in a step of one block of the network."""
    model = check.sizes.model
    model = replace(model, backbone=replace(model.backbone, blocks=1))
    small = replace(check, sizes=replace(check.sizes, model=model))
    rows_RL = train.microbatch(small.benchmark(rows=2))
    with parallel.join(sharding) as mesh:
        learner = Learner(small.objective("mdlm"), TrainConfig(), mesh, sharding)
        return attention(lambda: learner.step(1, {0: rows_RL}), check.device)


def _kernels(check: Check) -> Iterator[Finding]:
    """The rate of each kernel that torch chooses among, at the sizes of a training step."""
    network, length, rows = (
        check.sizes.model.backbone,
        check.sizes.length,
        check.sizes.train_rows[-1],
    )
    # Queries, keys and values lie side by side at each position, as the network makes them.
    size = rows, length, 3, network.heads, network.width // network.heads
    qkv_3BHLK = torch.randn(size, device=check.device).bfloat16().permute(2, 0, 3, 1, 4)
    leaves = [heads_BHLK.requires_grad_() for heads_BHLK in qkv_3BHLK]
    grad_BHLK = torch.randn_like(leaves[0])

    def attend(kernel: SDPBackend) -> tuple[torch.Tensor, ...]:
        with sdpa_kernel(kernel):
            mixed_BHLK = F.scaled_dot_product_attention(*leaves)
        return torch.autograd.grad(mixed_BHLK, leaves, grad_BHLK)

    for name, kernel in KERNELS.items():
        what = f"attention, forward and backward, {name}"
        try:
            timed = interleaved(
                {name: lambda number, kernel=kernel: attend(kernel)},
                check.sizes.rounds,
                check.device,
            )
        except RuntimeError as error:
            yield Finding(what, f"did not run: {str(error).partition('.')[0]}")
            continue
        # Two products forward, five backward, which computes the scores again.
        operations = 7 * 2 * rows * length**2 * network.width
        yield Finding(what, operations / float(np.median(timed[name])) / 1e12, "TFLOP/s")


def _products(check: Check) -> Iterator[Finding]:
    size = check.sizes.matmul
    factor = torch.randn(size, size, device=check.device)

    def product(dtype: torch.dtype, precision: str) -> torch.Tensor:
        torch.set_float32_matmul_precision(precision)
        return typed[dtype] @ typed[dtype]

    typed = {dtype: factor.to(dtype) for dtype, _ in ARITHMETIC.values()}
    timed = interleaved(
        {name: lambda number, how=how: product(*how) for name, how in ARITHMETIC.items()},
        check.sizes.rounds,
        check.device,
    )
    for name, seconds_R in timed.items():
        rate = 2 * size**3 / float(np.median(seconds_R)) / 1e12
        yield Finding(f"matrix product, {name}", rate, "TFLOP/s")
