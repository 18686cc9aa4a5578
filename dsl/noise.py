"""Randomness as a function of a key, so that no result depends on how work was divided.

Sampling keys its draws by (seed, row, step): a row's text is the same alone or in a batch.
Training keys them by (seed, step, lane): a microbatch is corrupted alike on any worker.

Shapes: B rows, L positions.
"""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor


class Stream(IntEnum):
    """What a draw is for. Streams of one key are independent."""

    MOVE = 0  # Gaussian noise of a finite move
    TOKEN = 1  # which token a reveal draws
    PATH = 2  # a path's own choices, e.g. which positions to reveal


@dataclass(frozen=True)
class Draws:
    """The draws of one step for rows ``first_row, first_row + 1, …``.

    Philox is counter-based: the key (seed, row) and the counter (step, stream) *are* the state,
    so any draw can be made without making the ones before it. It runs on the CPU whatever the
    model's device, which keeps a text equal across devices up to the network's rounding.
    """

    seed: int
    first_row: int
    step: int

    def _row(self, row: int, stream: Stream) -> np.random.Generator:
        key = np.array([self.seed, self.first_row + row], dtype=np.uint64)
        counter = np.array([0, 0, self.step, stream], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=counter))

    def uniform(self, rows: int, length: int, stream: Stream) -> Tensor:
        """``[B, L]`` float64 in [0, 1)."""
        return torch.from_numpy(
            np.stack([self._row(row, stream).random(length) for row in range(rows)])
        )

    def normal(self, rows: int, length: int, dim: int, dtype: torch.dtype) -> Tensor:
        """``[B, L, D]`` standard normal, float64 where ``dtype`` is, float32 otherwise."""
        precise = np.float64 if dtype == torch.float64 else np.float32
        draw = [
            self._row(row, Stream.MOVE).standard_normal((length, dim), dtype=precise)
            for row in range(rows)
        ]
        return torch.from_numpy(np.stack(draw)).to(dtype)


def generator(
    seed: int, step: int, lane: int, device: torch.device | str = "cpu"
) -> torch.Generator:
    """The generator that corrupts microbatch (step, lane) of a training run.

    Equal keys give equal draws on one kind of device; the CPU's and a GPU's streams differ.
    """
    mixed = np.random.SeedSequence([seed, step, lane]).generate_state(1, np.uint64)[0]
    # torch takes a signed 64-bit seed.
    return torch.Generator(device).manual_seed(int(mixed) & (2**63 - 1))
