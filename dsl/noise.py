"""Randomness as a function of a key, so that no result depends on how work was divided.

Sampling keys its draws by (seed, row, step): a row's text is the same alone or in a batch.
Training keys them by (seed, step, lane): a microbatch is corrupted alike on any worker.

Shapes: B rows, L positions.
"""

import math
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from dsl import philox

CPU = torch.device("cpu")

# Philox4x64 turns one counter into four 64-bit outputs.
_OUTPUTS_PER_COUNTER = 4


class Stream(IntEnum):
    """What a draw is for. Streams of one key are independent."""

    MOVE = 0  # Gaussian noise of a finite move
    TOKEN = 1  # which token a reveal draws
    PATH = 2  # a path's own choices, e.g. which positions to reveal


@dataclass(frozen=True)
class Draws:
    """The draws of one step for rows ``first_row, first_row + 1, …``.

    Philox is counter-based: the key holds (seed, step, stream), the counter starts at the row, so
    any row's numbers can be had without drawing those before it, and consecutive rows are one
    run of the library's generator. Every number consumes exactly one output (which is why normals
    are Box-Muller and not a rejection method): rows stay aligned.

    All uniforms are drawn on the CPU. Normals, which are D times as many, are drawn where they are
    used, and a GPU's are others than the CPU's.
    """

    seed: int
    first_row: int
    step: int

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must lie in [0, 2^64), got {self.seed}")
        if self.first_row < 0:
            raise ValueError(f"first_row must be at least 0, got {self.first_row}")

    def uniform(self, rows: int, length: int, stream: Stream) -> Tensor:
        """``[B, L]`` float64 in [0, 1)."""
        return self._uniform(rows, length, stream)[:, :length]

    def normal(self, shape: torch.Size, dtype: torch.dtype, device: torch.device = CPU) -> Tensor:
        """``[B, L, D]`` standard normal, computed in float64 and rounded to ``dtype``."""
        if device.type != "cpu":
            key = {"seed": self.seed, "first_row": self.first_row, "step": self.step}
            return philox.normal(shape, device, **key).to(dtype)
        rows, length, dim = shape
        count = length * dim
        half = (count + 1) // 2
        uniform = self._uniform(rows, 2 * half, Stream.MOVE)
        # 1 - u lies in (0, 1], where the logarithm is finite.
        radius = (1 - uniform[:, :half]).log().mul(-2).sqrt()
        angle = uniform[:, half : 2 * half] * (2 * math.pi)
        drawn = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
        return drawn[:, :count].reshape(shape).to(dtype)

    def _uniform(self, rows: int, count: int, stream: Stream) -> Tensor:
        """``[B, >= count]``: each row starts on a counter of its own."""
        blocks = -(-count // _OUTPUTS_PER_COUNTER)
        key = np.array([self.seed, self.step * len(Stream) + stream], dtype=np.uint64)
        counter = np.array([self.first_row * blocks, 0, 0, 0], dtype=np.uint64)
        source = np.random.Generator(np.random.Philox(key=key, counter=counter))
        return torch.from_numpy(source.random((rows, blocks * _OUTPUTS_PER_COUNTER)))


def normal(
    shape: torch.Size, dtype: torch.dtype, device: torch.device, source: torch.Generator
) -> Tensor:
    """Standard normals on a device: drawn from ``source`` or, where that is of another device, from
    a generator of the device that ``source`` seeds."""
    if source.device != device:
        seed = torch.randint(2**63 - 1, (), generator=source, device=source.device)
        source = torch.Generator(device).manual_seed(int(seed))
    return torch.randn(shape, generator=source, dtype=dtype, device=device)


def generator(
    seed: int, step: int, lane: int, device: torch.device | str = "cpu"
) -> torch.Generator:
    """The generator that corrupts microbatch (step, lane) of a training run.

    Equal keys give equal draws on one kind of device; the CPU's and a GPU's streams differ.
    """
    mixed = np.random.SeedSequence([seed, step, lane]).generate_state(1, np.uint64)[0]
    # torch takes a signed 64-bit seed.
    return torch.Generator(device).manual_seed(int(mixed) & (2**63 - 1))
