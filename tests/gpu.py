"""A stand-in for a GPU: tensors of another device than the CPU, and a count of waits for it.

The device is torch's `meta`, which needs no driver, but here its tensors hold data: every result
is that of the CPU. What is checked is the code around it: that operands lie on one device, and how
often the host has to wait for the device before it can go on. It waits where it reads a value,
where a shape depends on values, and where it copies memory and waits for the copy. Each wait leaves
a GPU without work.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

GPU = torch.device("meta")
CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[1]
aten = torch.ops.aten

# They return a value to the host, or tensors whose shape depends on values.
WAITS = {
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten._unique2,
    aten.unique_dim, aten.unique_consecutive, aten.bincount, aten.histc, aten._linalg_eigh,
    aten.multinomial,
}  # fmt: skip
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}


class OnGpu(torch.Tensor):
    """A tensor of the CPU that says it is on the GPU."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> OnGpu:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=GPU,
        )

    def __init__(self, host: Tensor) -> None:
        self.host = host

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnGpu({self.host!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


def dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the CPU; what it makes is on the device where it would be."""
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    on_gpu = any(isinstance(tensor, OnGpu) for tensor in given)
    copies = func.overloadpacket in (aten._to_copy, aten.copy_)
    asked = kwargs.get("device")
    if on_gpu and not copies:
        _require_one_device(func, given)
    inner_args, inner_kwargs = tree_map_only(OnGpu, lambda t: t.host, (args, kwargs))
    inner_kwargs = tree_map_only(torch.device, lambda device: CPU, inner_kwargs)
    made = func(*inner_args, **inner_kwargs)
    if asked is not None:
        on_gpu = torch.device(asked).type == GPU.type
    if func.overloadpacket is aten.copy_:
        on_gpu = isinstance(args[0], OnGpu)
    made = tree_map_only(Tensor, lambda t: OnGpu(t) if on_gpu else t, made)
    return return_and_correct_aliasing(func, args, kwargs, made) if on_gpu else made


def _require_one_device(func: Any, given: list[Tensor]) -> None:
    """As CUDA's kernels do: only single numbers may come from the CPU, and indices, with a wait."""
    indexed = func.overloadpacket in INDEXED
    strange = [t for t in given if not isinstance(t, OnGpu) and t.ndim and not indexed]
    assert not strange, f"{func} on the GPU is given tensors of the CPU: {strange}"


class Waits(TorchDispatchMode):
    """Notes where the host waits for the GPU: ``found`` holds (operation, line of the source)."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _waits(func, args, kwargs):
            self.found.append((str(func), _line()))
        return dispatch(func, args, kwargs)


def _waits(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    packet = func.overloadpacket
    tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
    there = [isinstance(tensor, OnGpu) for tensor in tensors]
    if packet is aten._to_copy and "device" in kwargs and kwargs["device"] is not None:
        moved = there[0] != (torch.device(kwargs["device"]).type == GPU.type)
        return moved and not (kwargs.get("non_blocking") and not there[0])
    if packet is aten.copy_:
        return there[0] != there[1] and not (kwargs.get("non_blocking") and there[0])
    if not any(there):
        return False
    if packet in INDEXED:
        indices = [leaf for leaf in tree_leaves(args[1]) if isinstance(leaf, Tensor)]
        return any(
            i.dtype in (torch.bool, torch.uint8) or (there[0] and not isinstance(i, OnGpu))
            for i in indices
        )
    if packet is aten.repeat_interleave:
        return kwargs.get("output_size") is None
    return packet in WAITS


def _line() -> str:
    """The innermost line of this repository's source, tests left out."""
    frames = [frame for frame in traceback.extract_stack() if _ours(frame.filename)]
    return f"{Path(frames[-1].filename).relative_to(ROOT)}:{frames[-1].lineno}" if frames else "?"


def _ours(filename: str) -> bool:
    path = Path(filename)
    return path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in (
        "dsl", "infra", "pipelines",
    )  # fmt: skip


class Generator(torch.Generator):
    """A generator of the CPU that may say it is the GPU's."""

    def __new__(cls, device: Any = "cpu") -> Any:
        return super().__new__(cls, "cpu")

    def __init__(self, device: Any = "cpu") -> None:
        self.said = torch.device(device)

    @property
    def device(self) -> torch.device:
        return self.said


@contextmanager
def standing_in() -> Iterator[Waits]:
    """Inside the block `GPU` holds data; what is yielded notes the waits for it."""
    tensor, new_tensor, tolist = torch.tensor, Tensor.new_tensor, Tensor.tolist
    autocast, enabled = torch.autocast, torch.is_autocast_enabled

    def known(device: str) -> str:
        return "cpu" if device == GPU.type else device

    with pytest.MonkeyPatch.context() as patch, Waits() as waits:
        patch.setattr(torch, "Generator", Generator)
        # `meta` would drop their data.
        patch.setattr(
            torch, "tensor", lambda data, device="cpu", **rest: tensor(data, **rest).to(device)
        )
        patch.setattr(
            Tensor,
            "new_tensor",
            lambda self, data: new_tensor(self.new_empty(0, device="cpu"), data).to(self.device),
        )
        patch.setattr(Tensor, "tolist", lambda self: tolist(self.cpu()))
        # Precision has rules for real devices only.
        patch.setattr(torch, "autocast", lambda kind, *a, **kw: autocast(known(kind), *a, **kw))
        patch.setattr(torch, "is_autocast_enabled", lambda kind="cpu": enabled(known(kind)))
        yield waits
