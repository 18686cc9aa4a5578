"""What one call of a procedure does on the device: kernels, memory, waits of the CPU."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

SYNCHRONISES = "called a synchronizing CUDA operation"  # of torch's warning
ATTENTION = "aten::_scaled_dot_product_"  # begins the names of what torch chooses among
LONGEST = 5  # kernels that are named


def attention(procedure: Callable[[], object], device: torch.device) -> str:
    """The operators that torch chose for attention, by name."""
    names = {event.key for event in _events(procedure, device)}
    found = sorted(name.removeprefix(ATTENTION) for name in names if name.startswith(ATTENTION))
    return ", ".join(found)


def kernels(procedure: Callable[[], object], device: torch.device) -> str:
    """The longest kernels (on a CPU: operators) with their share of the time."""
    key = f"self_{'device' if device.type == 'cuda' else 'cpu'}_time_total"
    # Time on a GPU is told three times: of its kernels, of the operators that have launched them,
    # and of named stretches of the program.
    here = device.type.upper()
    events = [
        event
        for event in _events(procedure, device)
        if event.device_type.name == here and not event.is_user_annotation
    ]
    whole = sum(getattr(event, key) for event in events)
    longest = sorted(events, key=lambda event: -getattr(event, key))[:LONGEST]
    return "; ".join(f"{getattr(e, key) / whole:.0%} {e.key[:60]}" for e in longest)


def synchronisations(procedure: Callable[[], object], device: torch.device) -> int | None:
    """How often the CPU waits for the GPU in one call; None on a CPU.

    The lines of the program that wait are printed."""
    if device.type != "cuda":
        return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            procedure()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [warning for warning in told if SYNCHRONISES in str(warning.message)]
    for warning in waits:
        print(f"waits for the GPU: {warning.filename}:{warning.lineno}")
    return len(waits)


def peak_gib(procedure: Callable[[], object], device: torch.device) -> float | None:
    """Peak memory of the GPU in one call, with what it holds already; None on a CPU."""
    if device.type != "cuda":
        return None
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    procedure()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) / 2**30


def _events(procedure: Callable[[], object], device: torch.device) -> Any:
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        procedure()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return profiler.key_averages()
