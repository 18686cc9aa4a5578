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
import re
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

# Of dense bf16 products, by a part of the name that the driver gives, which ends where a word does;
# the first that fits counts. GH200 is an H200, and an A800 or H800 computes as the A100 or H100.
PEAK_FLOPS = {
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H800": 989e12,
    "GB200": 2500e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
}

LONGEST_STALL_S = 1e8  # three years, which torch can still count as a timeout

Lane = TypeVar("Lane")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bf16 on GPU only
    activation_checkpointing: bool = False
    compile: bool = False
    # A run repeats bit for bit. Without it a GPU may add in another order each time, which is
    # faster: attention's backward pass above all.
    deterministic: bool = True
    threads: int | None = None  # of the CPU, per worker; None leaves torch's choice
    # The longest that a step, a validation or the wait for a checkpoint may take. Without a limit,
    # one worker that hangs would block the others for ever.
    stall_s: float = 1800.0

    def __post_init__(self) -> None:
        if not 0 < self.stall_s <= LONGEST_STALL_S:
            why = f"must be positive, and {LONGEST_STALL_S:g} at most"
            raise ValueError(f"stall_s {why}, got {self.stall_s}")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads must be at least 1, got {self.threads}")

    def dtype(self, device: torch.device) -> torch.dtype:
        """The dtype of matrix products on `device`; master weights are float32 regardless."""
        if self.compute_dtype == "auto":
            return torch.bfloat16 if device.type == "cuda" else torch.float32
        return getattr(torch, self.compute_dtype)


def world() -> tuple[int, int]:
    """(rank, size) of this process; (0, 1) where there is no process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def device() -> torch.device:
    """What this process computes on: the GPU, where its process group reaches one, else the CPU.

    Launchers number the processes of a machine in LOCAL_RANK. Some show each process its own GPU
    alone, where the number says nothing, others all GPUs, of which its own has that number.
    """
    gpu = (
        "nccl" in dist.get_backend_config() if dist.is_initialized() else torch.cuda.is_available()
    )
    if not gpu:
        return torch.device("cpu")
    rank = os.environ.get("LOCAL_RANK")
    number = torch.cuda.current_device() if rank is None else int(rank) % torch.cuda.device_count()
    return torch.device("cuda", number)


def peak_flops() -> float | None:
    """The data sheet's dense bf16 FLOP/s of this GPU; None for a CPU, a part of a GPU (MIG), or a
    GPU that is not known."""
    if device().type != "cuda":
        return None
    name = torch.cuda.get_device_name(device())
    fitting = (flops for model, flops in PEAK_FLOPS.items() if re.search(rf"{model}\b", name))
    return None if "MIG" in name else next(fitting, None)


@contextmanager
def join(config: ParallelConfig) -> Iterator[DeviceMesh]:
    """Pin this process's threads and yield a one-dimensional mesh over all workers.

    A launcher (Ray Train, torchrun) has made the process group already. A process without one gets
    a group of one for the duration, so that one device runs the same code as many.
    """
    before = torch.are_deterministic_algorithms_enabled()
    pin(config.threads, deterministic=config.deterministic)
    alone = not dist.is_initialized()
    if alone:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if device().type == "cuda":
        torch.cuda.set_device(device())
    try:
        yield init_device_mesh(device().type, (dist.get_world_size(),), mesh_dim_names=("data",))
    finally:
        # What comes after training may need an operation that has no deterministic kernel.
        torch.use_deterministic_algorithms(before)
        if alone:
            dist.destroy_process_group()


def pin(threads: int | None, *, deterministic: bool = True) -> None:
    """Make a run repeatable bit for bit at equal world size and threads, unless it need not be.

    On a GPU, only if it were an error to do otherwise does torch choose kernels of attention that
    repeat: a mere warning leaves flash and memory-efficient attention as they are, and cuDNN's in.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats only with this
    torch.use_deterministic_algorithms(deterministic)
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
    return Average(model, multi_avg_fn=get_ema_multi_avg_fn(decay)).requires_grad_(False)


class Average(AveragedModel):
    """torch's, without a copy of `n_averaged` to the GPU, which every step would wait for, and
    without work for frozen parameters, which are their own average."""

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        first = self.n_averaged == 0
        pairs = zip(self.module.parameters(), model.parameters(), strict=True)
        moving = [(a.detach(), p.detach()) for a, p in pairs if first or p.requires_grad]
        mine, theirs = zip(*moving, strict=True)
        if first:
            for average, parameter in zip(mine, theirs, strict=True):
                average.copy_(parameter)
        else:
            self.multi_avg_fn(mine, theirs, self.n_averaged)
        self.n_averaged += 1


def shard(
    root: nn.Module,
    blocks: Iterable[nn.Module],
    *,
    mesh: DeviceMesh,
    config: ParallelConfig,
    float32: Iterable[nn.Module] = (),
) -> None:
    """Shard `root` in place: per block activation checkpointing, compile, FSDP2; then the root.

    With one worker there is nothing to shard and gather, and FSDP2, which would copy every weight
    and gradient and halve the rate of a GPU, is not applied. So nothing is cast either: such a root
    has to compute in `config.dtype` by itself, see `shared`.

    root: float32, on the mesh's device type; parameters may be frozen. Parameter names stay.
    blocks: the repeated submodules, each gathered only while it computes.
    float32: small submodules, outside the blocks, that compute in float32 whatever the config says.
    """
    blocks = list(blocks)
    for block in blocks:
        if config.activation_checkpointing:
            _recompute_in_backward(block)
        if config.compile:
            block.compile()
    if not shared(mesh):
        return
    # Imported here because it takes half a second, which `--help` need not pay.
    from torch.distributed.fsdp import (
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    dtype = config.dtype(torch.device(mesh.device_type))
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


def shared(mesh: DeviceMesh) -> bool:
    """Whether several workers train one model, which `shard` then casts as it gathers."""
    return mesh.size() > 1


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
    of a rank are summed in float32 and reduced once, and weights are gathered for the first lane
    and kept until the last. Every rank must hold equally many lanes.
    """
    losses, sharded = [], _is_sharded(root)
    for i, lane in enumerate(lanes, start=1):
        if sharded:
            last = i == len(lanes)
            root.set_requires_gradient_sync(last)
            root.set_reshard_after_forward(last)
            root.set_reshard_after_backward(last)
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


def mean_over_ranks(values: Mapping[str, float | Tensor]) -> Reduced:
    """The mean over ranks of each scalar, in float64; every rank passes the same keys."""
    return Reduced(values, world()[1])


def sum_over_ranks(values: Mapping[str, float | Tensor]) -> Reduced:
    """The sum over ranks of each scalar, in float64; every rank passes the same keys."""
    return Reduced(values, 1)


class Reduced(Mapping[str, float]):
    """The sum over ranks of each scalar in float64, divided by `count`.

    It is ordered from the device when this is made, and waited for when a value is first looked at.
    Whoever looks after the next step has been ordered does not leave a GPU without work.
    """

    def __init__(self, values: Mapping[str, float | Tensor], count: int) -> None:
        self._names = sorted(values)
        self._ready: torch.cuda.Event | None = None
        if not values:
            return
        # Packed on the device, so that there is one thing to wait for.
        packed = torch.stack([_float64(values[name]) for name in self._names])
        if dist.is_initialized():
            dist.all_reduce(packed)
        self._found = (packed / count).to("cpu", non_blocking=True)
        if packed.is_cuda:
            self._ready = torch.cuda.Event()
            self._ready.record()

    @functools.cached_property
    def _values(self) -> dict[str, float]:
        if self._ready:
            self._ready.synchronize()
        return dict(zip(self._names, self._found.tolist(), strict=True)) if self._names else {}

    def __getitem__(self, name: str) -> float:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _float64(value: float | Tensor) -> Tensor:
    """A number in float64 on this process's device. One of the CPU goes there as the argument of a
    kernel: to copy it, the CPU might wait until the GPU has nothing left to compute."""
    if isinstance(value, Tensor) and not value.is_cpu:
        return value.to(device(), torch.float64)
    return torch.full((), float(value), dtype=torch.float64, device=device())


def highest(value: int) -> int:
    """The highest of the ranks' values, on every rank; no GPU is waited for."""
    if world()[1] == 1:
        return value
    found = torch.tensor(value)
    over_cpus = "gloo" in dist.get_backend_config()
    group = None if over_cpus else _over_cpus(dist.group.WORLD)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
    return int(found)


@functools.cache
def _over_cpus(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A group of the same ranks that reduces on CPUs, made once; every rank must call it."""
    return dist.new_group(backend="gloo")
