"""What a measurement was taken on."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

from infra import parallel

CPUINFO = Path("/proc/cpuinfo")
MATMUL = 2048


def facts() -> dict[str, Any]:
    """The processor, its cores and threads, the device, torch, and how busy the machine is."""
    device = parallel.device()
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": gpu or "cpu",
        "torch": torch.__version__,
        "load_average": round(os.getloadavg()[0], 2),
    }


def line(facts: dict[str, Any]) -> str:
    """The same, for the note of a table."""
    return (
        f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads, device "
        f"{facts['device']}, torch {facts['torch']}, load average {facts['load_average']} before."
    )


class Matmul:
    """A square product in the dtype that this device trains in: the limit of all the others."""

    flops = 2 * MATMUL**3

    def __init__(self, device: torch.device) -> None:
        dtype = parallel.ParallelConfig().dtype(device)
        self.factor = torch.randn(MATMUL, MATMUL, device=device).to(dtype)

    def __call__(self, number: int) -> torch.Tensor:
        return self.factor @ self.factor


def _cpu() -> str:
    if CPUINFO.exists():
        for field in CPUINFO.read_text().splitlines():
            if field.startswith("model name"):
                return field.partition(":")[2].strip()
    return platform.processor() or platform.machine()
