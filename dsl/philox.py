"""Keyed normals on any device: the counter-based generator Philox4x32-10, by operations of torch.

Salmon, Moraes, Dror and Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011. A counter and
a key give four words of 32 bits, whatever was drawn before. Words lie in int64, in [0, 2^32).

Shapes: B rows, L positions, D table dimension, Q quadruples of a row.
"""

import math

import torch
from torch import Tensor

WORD = 2**32 - 1
ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def normal(
    shape: torch.Size, device: torch.device, *, seed: int, first_row: int, step: int
) -> Tensor:
    """``[B, L, D]`` standard normals in float64 (Box-Muller), keyed by (seed, row, step).

    seed in [0, 2^64); step in [0, 2^32).
    """
    rows, length, dim = shape
    count = length * dim
    quadruple_Q = torch.arange(-(-count // 4), device=device)
    row_B1 = torch.arange(first_row, first_row + rows, device=device)[:, None]
    step_B1 = torch.full_like(row_B1, step)
    counter = (quadruple_Q, row_B1 & WORD, row_B1 >> 32, step_B1)
    one_BQ, two_BQ, three_BQ, four_BQ = words(counter, (seed & WORD, seed >> 32))
    pairs = (*_pair(one_BQ, two_BQ), *_pair(three_BQ, four_BQ))
    return torch.cat(pairs, dim=1)[:, :count].reshape(shape)


def words(counter: Words, key: tuple[int, int]) -> Words:
    """Four words for each counter; the counter's words are broadcast against each other."""
    one, two, three, four = counter
    for turn in range(ROUNDS):
        low_key, high_key = (
            (k + turn * step) & WORD for k, step in zip(key, KEY_STEPS, strict=True)
        )
        # int64 products wrap modulo 2^64: both halves are exact, and `& WORD` drops the sign.
        left, right = one * MULTIPLIERS[0], three * MULTIPLIERS[1]
        one, two, three, four = (
            (right >> 32 & WORD) ^ two ^ low_key,
            right & WORD,
            (left >> 32 & WORD) ^ four ^ high_key,
            left & WORD,
        )
    return one, two, three, four


def _pair(radius_BQ: Tensor, angle_BQ: Tensor) -> tuple[Tensor, Tensor]:
    # The middle of each of 2^32 intervals: never 0, where the logarithm is infinite.
    length_BQ = ((radius_BQ.double() + 0.5) / 2**32).log().mul(-2).sqrt()
    turn_BQ = angle_BQ.double() * (2 * math.pi / 2**32)
    return length_BQ * turn_BQ.cos(), length_BQ * turn_BQ.sin()
