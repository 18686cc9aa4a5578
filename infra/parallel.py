"""One model on many devices: FSDP2 over single-device code, an averaged copy, lanes of gradients.

The order of building a sharded model is: `averaged` copies it, then `shard` is called in the same
way on the model and on the copy, then the optimizer is built.

The root module's forward computes the loss, so that every parameter used outside the blocks is
gathered by the root. Under bf16 compute the blocks receive their floating inputs cast to bf16;
the root receives its own as they are (an SNR does not survive 8 bits) and casts what it must.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

# By a part of the name that the driver gives.
PEAK_FLOPS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}

Lane = TypeVar("Lane")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bf16 on GPU only
    activation_checkpointing: bool = False
    compile: bool = False
    threads: int | None = None  # of the CPU, per worker; None leaves torch's choice
    # The longest that a step, a validation or the wait for a checkpoint may take. Without a limit,
    # one worker that hangs would block the others for ever.
    stall_s: float = 1800.0

    def __post_init__(self) -> None:
        if not self.stall_s > 0:
            raise ValueError(f"stall_s must be positive, got {self.stall_s}")

    def dtype(self, device: torch.device) -> torch.dtype:
        """The dtype of matrix products on `device`; master weights are float32 regardless."""
        if self.compute_dtype == "auto":
            return torch.bfloat16 if device.type == "cuda" else torch.float32
        return getattr(torch, self.compute_dtype)


def world() -> tuple[int, int]:
    """(rank, size) of this process; (0, 1) where there is no process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def device() -> torch.device:
    """What this process computes on: the GPU, where its process group reaches one, else the CPU."""
    gpu = (
        "nccl" in dist.get_backend_config() if dist.is_initialized() else torch.cuda.is_available()
    )
    return torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")


def peak_flops() -> float | None:
    """The data sheet's dense bf16 FLOP/s of this GPU; None for a CPU or a GPU that is not known."""
    if device().type != "cuda":
        return None
    name = torch.cuda.get_device_name(device())
    return next((flops for model, flops in PEAK_FLOPS.items() if model in name), None)


@contextmanager
def join(config: ParallelConfig) -> Iterator[DeviceMesh]:
    """Pin this process's threads and yield a one-dimensional mesh over all workers.

    A launcher (Ray Train, torchrun) has made the process group already. A process without one gets
    a group of one for the duration, so that one device runs the same code as many.
    """
    pin(config.threads)
    alone = not dist.is_initialized()
    if alone:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh(device().type, (dist.get_world_size(),), mesh_dim_names=("data",))
    finally:
        if alone:
            dist.destroy_process_group()


def pin(threads: int | None) -> None:
    """Make a run repeatable bit for bit at equal world size and threads, as far as torch can."""
    if threads is not None:
        torch.set_num_threads(threads)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats only with this
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs time
    torch.backends.cudnn.benchmark = False


@contextmanager
def flushed() -> Iterator[None]:
    """Have this process treat denormal numbers, those below 1e-38, as zero.

    The gradients of confident predictions hold many of them, and a CPU computes some ten times as
    slowly with them. The setting reaches only threads that start later, so it belongs into a
    process that has not computed anything yet.
    """
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of `model`; `.module` holds it, without gradients.

    `update_parameters(model)` after each optimizer step; the first call copies. A sharded module
    cannot be copied, so this comes before `shard`, and `shard(average.module, …)` follows.
    """
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay)).requires_grad_(False)


def shard(
    root: nn.Module,
    blocks: Iterable[nn.Module],
    *,
    mesh: DeviceMesh,
    config: ParallelConfig,
    float32: Iterable[nn.Module] = (),
) -> None:
    """Shard `root` in place: per block activation checkpointing, compile, FSDP2; then the root.

    With one worker in float32 there is nothing to shard, gather or cast, and FSDP2, which would
    copy every weight and gradient, is not applied.

    root: float32, on the mesh's device type; parameters may be frozen. Parameter names stay.
    blocks: the repeated submodules, each gathered only while it computes.
    float32: small submodules, outside the blocks, that compute in float32 whatever the config says.
    """
    dtype = config.dtype(torch.device(mesh.device_type))
    blocks = list(blocks)
    for block in blocks:
        if config.activation_checkpointing:
            _recompute_in_backward(block)
        if config.compile:
            block.compile()
    if mesh.size() == 1 and dtype is torch.float32:
        return
    # Imported here because it takes half a second, which `--help` need not pay.
    from torch.distributed.fsdp import (
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    precision = functools.partial(MixedPrecisionPolicy, dtype, torch.float32)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=precision())
    for module in float32:
        fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    # The root is resharded after forward as well. Otherwise a forward without a backward (in
    # validation) would leave gathered weights where the average and checkpoints expect shards.
    root_precision = precision(cast_forward_inputs=False)
    fully_shard(root, mesh=mesh, mp_policy=root_precision, reshard_after_forward=True)
    # FSDP2 gathers parameters around methods of the root, and has no public way to do so around
    # another function. So the root gets a method that calls whatever function it is given.
    root.call = lambda function: function()
    register_fsdp_forward_method(root, "call")


def gathered(root: nn.Module, function: Callable[[], T]) -> T:
    """`function()` with the parameters of the root gathered as in its own forward.

    For functions that call submodules of a sharded root directly. Every rank must call it.
    """
    return root.call(function) if _is_sharded(root) else function()


def _recompute_in_backward(block: nn.Module) -> None:
    """Keep only the block's inputs in forward, and compute the rest again in backward.

    torch's public `checkpoint` wraps functions; its wrapper of modules is private and changes
    parameter names. So the block's own `forward` is replaced. `torch.compile` traces through a
    closure, but silently not through a `functools.partial`.
    """
    forward = block.forward

    def recomputed(*args: object, **kwargs: object) -> object:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    block.forward = recomputed


def _is_sharded(root: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return isinstance(root, FSDPModule)


def accumulate(
    root: nn.Module, lanes: Sequence[Lane], loss_of: Callable[[Lane], Tensor]
) -> list[Tensor]:
    """Backpropagate the mean loss over all lanes of all ranks; the detached losses of this rank's.

    root: what `shard` was called on; loss_of calls it and returns a scalar. Gradients of the lanes
    of a rank are summed in float32 and reduced once. Every rank must hold equally many lanes.
    """
    losses, sharded = [], _is_sharded(root)
    for i, lane in enumerate(lanes, start=1):
        if sharded:
            root.set_requires_gradient_sync(i == len(lanes))
        loss = loss_of(lane)
        (loss / len(lanes)).backward()
        losses.append(loss.detach())
    return losses


def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradients to a global 2-norm of at most `max_norm`; the norm before, a scalar."""
    norm = nn.utils.clip_grad_norm_(parameters, max_norm)
    return full(norm)


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded, detached, on every rank; collective if it is."""
    from torch.distributed.tensor import DTensor  # as slow to import as FSDP2

    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def mean_over_ranks(values: Mapping[str, float | Tensor]) -> dict[str, float]:
    """The mean over ranks of each scalar, in float64; every rank passes the same keys."""
    size = world()[1]
    return {key: value / size for key, value in sum_over_ranks(values).items()}


def sum_over_ranks(values: Mapping[str, float | Tensor]) -> dict[str, float]:
    """The sum over ranks of each scalar, in float64; every rank passes the same keys."""
    keys = sorted(values)
    packed = torch.tensor([float(values[key]) for key in keys], dtype=torch.float64)
    if dist.is_initialized() and keys:
        packed = packed.to(device())
        dist.all_reduce(packed)
    return dict(zip(keys, packed.tolist(), strict=True))


def highest(value: int) -> int:
    """The highest of the ranks' values, on every rank."""
    if not dist.is_initialized():
        return value
    found = torch.tensor(value, device=device())
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)
