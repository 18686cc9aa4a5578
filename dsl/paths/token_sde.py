"""An SNR for every token, slower where its prediction turns faster (003 algorithm 3).

Shapes: B rows, L positions, D table dimension.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from dsl.paths.clock import Clock
from dsl.paths.curvature import jvp, secant
from dsl.posterior import Posterior
from dsl.state import State


class Carry(NamedTuple):
    """How far each token lags behind the sentence, as a share of the way to ``gamma_max``;
    the last prediction; and the SNR that the tolerance alone would not have granted so far."""

    lag_BL: Tensor
    x_hat_BLD: Tensor | None
    shortfall_BL: Tensor


@dataclass(frozen=True, kw_only=True)
class TokenSDE:
    """Move each token by ``min(delta / (kappa_i + 1e-6), delta_max)``, and still arrive in time.

    ``delta_max = gamma_max / moves`` is the step of the linear grid. With algorithm 3's steps
    alone, tokens of high curvature stop short of ``gamma_max``. So a step counts as a *weight*
    ``s = h_i / delta_max`` in (0, 1] against a weight of 1 for every later move: the token covers
    ``s / (s + moves left - 1)`` of what it has left. An unhindered token is on the linear grid,
    a hindered one catches up gradually, and at the last move all arrive.

    What had to be moved beyond the tolerance is reported as ``Sample.recorded["shortfall_B"]``:
    the SNR (mean over positions) by which algorithm 3 would have stopped short.

    A budget of T calls makes T - 1 moves with ``curvature="secant"`` (free; ``kappa`` includes
    the noise of the last move) and T // 2 with ``"jvp"``, which costs a call for every move but
    the last. ``delta = inf`` asks for no curvature and is `SentenceSDE` on the linear grid.
    """

    gamma_max: float
    delta: float
    curvature: Literal["secant", "jvp"] = "secant"
    kind: Literal["token_sde"] = "token_sde"

    finite_snr: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.gamma_max < float("inf"):
            raise ValueError(f"gamma_max must be positive and finite, got {self.gamma_max}")
        if not self.delta > 0:
            raise ValueError(f"delta must be positive (inf for no limit), got {self.delta}")
        if self.curvature not in ("secant", "jvp"):
            raise ValueError(f"curvature must be 'secant' or 'jvp', got {self.curvature!r}")

    def init(self, state: State) -> Carry:
        zero_BL = torch.zeros_like(state.gamma_BL, dtype=torch.float64)
        return Carry(zero_BL, None, zero_BL)

    def target(
        self, state: State, posterior: Posterior, carry: Carry, clock: Clock
    ) -> tuple[Tensor, Carry]:
        moves, left = self._moves(clock.budget), self._moves(clock.calls_left)
        step = self.gamma_max / moves
        x_hat_BLD = carry.x_hat_BLD
        weight_BL = torch.ones_like(carry.lag_BL)
        # A last move takes all tokens all the way, whatever they weigh.
        if self.delta < float("inf") and left > 1:
            x_hat_BLD = posterior.mean()
            kappa_BL = self._kappa(state, x_hat_BLD, carry.x_hat_BLD, step, clock)
            weight_BL = (self.delta / (kappa_BL.double() + 1e-6) / step).clamp_max(1.0)

        done = (moves - left) / moves
        part_BL = weight_BL / (weight_BL + (left - 1))
        # As a lag behind the sentence, because a lag of exactly 0 keeps a token on the grid.
        lag_BL = carry.lag_BL * (1 - part_BL) + (1 - done) * (1 / left - part_BL)
        share_BL = (moves - left + 1) / moves - lag_BL
        gamma_BL = state.gamma_BL.maximum((share_BL * self.gamma_max).to(state.gamma_BL))

        open_BL = ~state.frozen_BL & state.gamma_BL.isfinite()
        moved_BL = torch.where(open_BL, gamma_BL - state.gamma_BL, 0.0)
        beyond_BL = (moved_BL - weight_BL * step).clamp_min(0.0)
        return gamma_BL, Carry(lag_BL, x_hat_BLD, carry.shortfall_BL + beyond_BL)

    def report(self, carry: Carry) -> Mapping[str, Tensor]:
        return {"shortfall_B": carry.shortfall_BL.mean(1)}

    def _moves(self, calls: int) -> int:
        """Moves that so many calls pay for; the last call reveals."""
        by_jvp = self.curvature == "jvp" and self.delta < float("inf")
        return max(calls // 2 if by_jvp else calls - 1, 1)

    def _kappa(
        self, state: State, x_hat_BLD: Tensor, before_BLD: Tensor | None, step: float, clock: Clock
    ) -> Tensor:
        if self.curvature == "jvp":
            return jvp(state, x_hat_BLD, clock)
        return secant(x_hat_BLD, before_BLD, step)
