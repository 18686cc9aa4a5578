"""Sizes of chunks for work that takes room for a whole vocabulary at every position."""

import torch

# For a [positions, V] tensor on a CPU: 32 MiB of float32, partly kept in the CPU's caches.
CHUNK_ELEMENTS = 2**23
# A GPU needs large chunks to be busy. The few that exist at a time take little of its memory:
# 1.25 GiB of float32 each on a GPU of 80 GiB.
GPU_BYTES_PER_ELEMENT = 256


def spans(positions: int, width: int, device: torch.device, *, factor: int = 1) -> list[slice]:
    """Slices of ``range(positions)`` in order, each of as many positions as fit into a chunk.

    width: numbers per position, at least 1. factor: how many times larger chunks are on a CPU.
    """
    size = max(1, int(elements(device, factor)) // width)
    return [slice(start, start + size) for start in range(0, positions, size)]


def elements(device: torch.device, factor: int) -> int:
    """How many numbers fit into a chunk on a device; ``factor`` counts on a CPU only."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // GPU_BYTES_PER_ELEMENT
    return factor * CHUNK_ELEMENTS
