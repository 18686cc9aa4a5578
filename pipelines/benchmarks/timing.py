"""Timing and peak memory of procedures that are compared with each other.

Shapes: R rounds.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from infra import parallel
from infra.errors import InfraError

GIB = 2**30
STATUS = Path("/proc/self/status")

Procedure = Callable[[int], object]  # of the round, counted from 0


def interleaved(
    procedures: Mapping[str, Procedure], rounds: int, device: torch.device
) -> dict[str, np.ndarray]:
    """Seconds ``[R]`` of each procedure: all of them once in every round, so that a machine whose
    speed drifts slows all alike. A round before the first warms up and is not counted."""
    spent: dict[str, list[float]] = {name: [] for name in procedures}
    for number in range(-1, rounds):
        for name, procedure in procedures.items():
            _finish(device)
            began = time.perf_counter()
            procedure(max(number, 0))
            _finish(device)
            spent[name].append(time.perf_counter() - began)
    return {name: np.array(seconds[1:]) for name, seconds in spent.items()}


def _finish(device: torch.device) -> None:
    """Wait for a GPU, which computes while Python runs on."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_gib(procedure: Callable[..., object], *arguments: Any) -> float:
    """Peak memory of `procedure(*arguments)` in a fresh process: of the GPU where there is one,
    else of the whole process, its libraries included.

    procedure: of a module's top level, so that the process can import it.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measured, args=(sender, procedure, arguments))
    process.start()
    sender.close()
    try:
        return receiver.recv() / GIB
    except EOFError:
        process.join()
        why = f"ended with {process.exitcode} while its memory was measured"
        raise InfraError(
            procedure.__module__, why, "Free some memory or take smaller sizes"
        ) from None
    finally:
        process.join()


def _measured(
    sender: Connection, procedure: Callable[..., object], arguments: tuple[Any, ...]
) -> None:
    with parallel.flushed():
        procedure(*arguments)
    cuda = torch.cuda.is_available()
    sender.send(torch.cuda.max_memory_allocated() if cuda else _peak_of_this_process())


def _peak_of_this_process() -> int:
    # What getrusage says on Linux includes the parent, from between fork and exec.
    if STATUS.exists():
        fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
