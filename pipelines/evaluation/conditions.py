"""What a model is shown of held-out rows: tokens masked and revealed, or all at one SNR.

Every draw is keyed by (seed, row): no figure depends on how rows were batched.

Shapes: B rows, L positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsl.channel import observe
from dsl.denoiser import Denoiser
from dsl.noise import Draws, Stream
from dsl.state import State


@dataclass(frozen=True, kw_only=True)
class Revealed:
    """A share of each row's tokens revealed, at random, and the others masked."""

    share: float

    @property
    def name(self) -> str:
        return f"revealed {self.share:g}"

    @property
    def place(self) -> dict[str, float]:
        """Where it lies on the axis of a plot."""
        return {"revealed": self.share}

    def gamma(self, rows: int, length: int, draws: Draws) -> Tensor:
        """``[B, L]``: inf where a token is revealed, 0 elsewhere."""
        rank_BL = draws.uniform(rows, length, Stream.PATH).argsort(1).argsort(1)
        shown = int(round(self.share * length, 6))  # .29 of 100 are 28.999999999999996 in floats
        return torch.where(rank_BL < shown, torch.inf, 0.0)


@dataclass(frozen=True, kw_only=True)
class AtSNR:
    """Every token at one SNR."""

    snr: float

    @property
    def name(self) -> str:
        return f"SNR {self.snr:g}"

    @property
    def place(self) -> dict[str, float]:
        """Where it lies on the axis of a plot."""
        return {"gamma": self.snr}

    def gamma(self, rows: int, length: int, draws: Draws) -> Tensor:
        """``[B, L]``, all the same."""
        return torch.full((rows, length), self.snr)


Condition = Revealed | AtSNR


def shown(
    denoiser: Denoiser,
    tokens_BL: Tensor,
    condition: Condition,
    *,
    seed: int,
    first_row: int,
    step: int = 0,
) -> tuple[Tensor, State]:
    """The rows on the denoiser's device, and what the condition shows of them.

    step: of the draws. Texts that were drawn themselves have used as many as they took calls.
    """
    table_VD, draws = denoiser.table_VD, Draws(seed, first_row, step)
    tokens_BL = tokens_BL.to(table_VD.device)
    gamma_BL = condition.gamma(*tokens_BL.shape, draws)
    return tokens_BL, observe(table_VD, tokens_BL, gamma_BL, draws)
