"""How many positions are worked on at a time, where each takes room for a whole vocabulary."""

import torch

# Of [positions, V] on a CPU: 32 MiB of float32, some of which stays in its caches.
CHUNK_ELEMENTS = 2**23
# A GPU is filled by large chunks, of which the few that exist together take little of its memory:
# 1.25 GiB of float32 each, where it has 80 GiB.
GPU_BYTES_PER_ELEMENT = 256


def spans(positions: int, width: int, device: torch.device, *, factor: int = 1) -> list[slice]:
    """Positions in turn, as many at a time as a chunk has room for ``width`` elements each.

    factor: how much larger than others these chunks should be on a CPU.
    """
    size = max(1, int(elements(device, factor)) // width)
    return [slice(start, start + size) for start in range(0, positions, size)]


def elements(device: torch.device, factor: int) -> int:
    """How many elements a chunk has on a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // GPU_BYTES_PER_ELEMENT
    return factor * CHUNK_ELEMENTS
