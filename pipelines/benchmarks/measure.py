"""Time and peak memory of procedures that are compared with each other.

Shapes: R rounds.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np
import torch

from infra import parallel
from infra.errors import InfraError
from pipelines.training.progress import peak_memory

GIB = 2**30
MATMUL = {"cpu": 2048, "cuda": 8192}  # rows and columns that keep all of a device busy

Procedure = Callable[[int], object]  # takes the number of the round, counted from 0


def interleaved(
    procedures: Mapping[str, Procedure], rounds: int, device: torch.device
) -> dict[str, np.ndarray]:
    """Seconds ``[R]`` of each procedure.

    Every round runs all procedures once, so a machine that slows down slows all of them alike. A
    warm-up round comes first and is not counted.
    """
    spent: dict[str, list[float]] = {name: [] for name in procedures}
    for number in range(-1, rounds):
        for name, procedure in procedures.items():
            _synchronize(device)
            began = time.perf_counter()
            procedure(max(number, 0))
            _synchronize(device)
            spent[name].append(time.perf_counter() - began)
    return {name: np.array(seconds[1:]) for name, seconds in spent.items()}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Matmul:
    """A square matrix product in the dtype of training: the fastest arithmetic of this device."""

    def __init__(self, device: torch.device) -> None:
        width, dtype = MATMUL[device.type], parallel.ParallelConfig().dtype(device)
        self.flops = 2 * width**3
        self.factor = torch.randn(width, width, device=device).to(dtype)

    def __call__(self, number: int) -> torch.Tensor:
        return self.factor @ self.factor


def peak_gib(procedure: Callable[..., object], *arguments: Any) -> float:
    """Peak memory of `procedure(*arguments)` in a fresh process, in GiB.

    On a GPU it is the GPU's memory, otherwise that of the whole process with its libraries.
    procedure: defined at the top level of a module, so that the process can import it.
    Raises what the procedure raises, and InfraError if the process dies.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as fresh:
        try:
            return fresh.submit(_peak_of, procedure, arguments).result() / GIB
        except BrokenProcessPool:
            why, fix = "its process died", "Free some memory or take smaller sizes"
            raise InfraError(procedure.__module__, why, fix) from None


def _peak_of(procedure: Callable[..., object], arguments: tuple[Any, ...]) -> int:
    with parallel.flushed():
        procedure(*arguments)
    return peak_memory()
