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

    On a CPU they come from numpy's Philox, a counter-based generator. Its key holds (seed, step,
    stream) and its counter starts at the row, so no earlier row has to be drawn first. Every number
    uses exactly one output of the generator, so that rows stay aligned. Normals are therefore made
    by Box-Muller and not by a rejection method.

    Uniforms are always drawn on the CPU. Normals, which are D times as many, are drawn on the
    device that uses them, and a GPU's (`dsl.philox`) differ from the CPU's.

    Raises:
        ValueError: ``seed`` is outside [0, 2^64), ``step`` outside [0, 2^32), or ``first_row``
            negative.
    """

    seed: int
    first_row: int
    step: int

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must lie in [0, 2^64), got {self.seed}")
        if not 0 <= self.step < 2**32:
            raise ValueError(f"step must lie in [0, 2^32), got {self.step}")
        if self.first_row < 0:
            raise ValueError(f"first_row must be at least 0, got {self.first_row}")

    def uniform(self, rows: int, length: int, stream: Stream) -> Tensor:
        """``[B, L]`` float64 in [0, 1)."""
        blocks = -(-length // _OUTPUTS_PER_COUNTER)  # each row starts on a new counter
        key = np.array([self.seed, self.step * len(Stream) + stream], dtype=np.uint64)
        counter = np.array([self.first_row * blocks, 0, 0, 0], dtype=np.uint64)
        source = np.random.Generator(np.random.Philox(key=key, counter=counter))
        return torch.from_numpy(source.random((rows, blocks * _OUTPUTS_PER_COUNTER)))[:, :length]

    def normal(self, shape: torch.Size, dtype: torch.dtype, device: torch.device = CPU) -> Tensor:
        """``[B, L, D]`` standard normal, computed in float64 and rounded to ``dtype``."""
        if device.type != "cpu":
            key = {"seed": self.seed, "first_row": self.first_row, "step": self.step}
            return philox.normal(shape, device, **key).to(dtype)
        rows, length, dim = shape
        count = length * dim
        half = (count + 1) // 2
        uniform = self.uniform(rows, 2 * half, Stream.MOVE)
        # 1 - u lies in (0, 1], where the logarithm is finite.
        radius = (1 - uniform[:, :half]).log().mul(-2).sqrt()
        angle = uniform[:, half:] * (2 * math.pi)
        drawn = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
        return drawn[:, :count].reshape(shape).to(dtype)


def standard_normal(
    shape: torch.Size, dtype: torch.dtype, device: torch.device, source: torch.Generator
) -> Tensor:
    """Standard normals on a device. A ``source`` of another device only seeds a generator of this
    one, which draws them."""
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
