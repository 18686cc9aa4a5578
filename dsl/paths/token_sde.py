"""An SNR for every token, slower where its prediction turns faster (003 algorithm 3).

How fast it turns is the curvature ``kappa_i = |d x_hat_i / d gamma|`` (003 eq. 25).

Shapes: B rows, L positions, D table dimension.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from dsl.paths.clock import Clock
from dsl.posterior import Posterior
from dsl.state import OnHost, State, send


class TokenCarry(NamedTuple):
    """``lag_BL``: how far each token is behind the linear grid, as a share of ``gamma_max``.
    ``x_hat_BLD``: the last prediction. ``shortfall_BL``: the SNR moved so far beyond the
    tolerance."""

    lag_BL: Tensor
    x_hat_BLD: Tensor | None
    shortfall_BL: Tensor


@dataclass(frozen=True, kw_only=True)
class TokenSDE:
    """Move each token by ``min(delta / (kappa_i + 1e-6), delta_max)``, and still arrive in time.

    ``delta_max = gamma_max / moves`` is the step of the linear grid. With algorithm 3's steps
    alone, tokens of high curvature stop short of ``gamma_max``. So a step counts as a *weight*
    ``s = h_i / delta_max`` in (0, 1] against a weight of 1 for every later move: the token covers
    ``s / (s + moves left - 1)`` of what it has left. *Moves left* include this one. A token of
    weight 1 is on the linear grid, any other catches up gradually, and the last move takes all to
    the end.

    What had to be moved beyond the tolerance is reported as ``Sample.recorded["shortfall_B"]``:
    the SNR (mean over positions) by which algorithm 3 would have stopped short.

    A budget of T calls makes T - 1 moves with ``curvature="secant"``, which is free but includes
    the noise of the last move in ``kappa``. With ``"jvp"`` it makes (T + 1) // 2 moves: each is
    preceded by one more call for its curvature, except the last, which needs none, and the first
    of an odd budget, which takes the step of the linear grid. All T calls are made either way.
    ``delta = inf`` asks for no curvature and is `SentenceSDE` on the linear grid.

    Raises:
        ValueError: ``gamma_max`` is not positive and finite, ``delta`` not above 0, or
            ``curvature`` unknown.
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

    def init(self, state: State) -> TokenCarry:
        zero_BL = torch.zeros_like(state.gamma_BL, dtype=torch.float64)
        return TokenCarry(zero_BL, None, zero_BL)

    def target(
        self, state: State, posterior: Posterior, carry: TokenCarry, clock: Clock
    ) -> tuple[Tensor, TokenCarry]:
        moves, left = self._moves(clock.budget), self._moves(clock.calls_left)
        step = self.gamma_max / moves
        x_hat_BLD = carry.x_hat_BLD
        weight_BL = torch.ones_like(carry.lag_BL)
        # The last move takes all tokens to the end, whatever their weights.
        if self._measures(clock.calls_left) and left > 1:
            x_hat_BLD = posterior.mean()
            if self.curvature == "jvp":
                kappa_BL = jvp(state, x_hat_BLD, clock)
            else:
                kappa_BL = secant(x_hat_BLD, carry.x_hat_BLD, step)
            weight_BL = (self.delta / (kappa_BL.double() + 1e-6) / step).clamp_max(1.0)

        done = (moves - left) / moves
        part_BL = weight_BL / (weight_BL + (left - 1))
        # Kept as a lag behind the linear grid: a lag of 0 puts a token on it exactly.
        lag_BL = carry.lag_BL * (1 - part_BL) + (1 - done) * (1 / left - part_BL)
        share_BL = (moves - left + 1) / moves - lag_BL
        gamma_BL = state.gamma_BL.maximum((share_BL * self.gamma_max).to(state.gamma_BL))

        open_BL = ~state.frozen_BL & state.gamma_BL.isfinite()
        moved_BL = torch.where(open_BL, gamma_BL - state.gamma_BL, 0.0)
        beyond_BL = (moved_BL - weight_BL * step).clamp_min(0.0)
        return gamma_BL, TokenCarry(lag_BL, x_hat_BLD, carry.shortfall_BL + beyond_BL)

    def report(self, carry: TokenCarry) -> Mapping[str, Tensor]:
        return {"shortfall_B": carry.shortfall_BL.mean(1)}

    def _measures(self, calls_left: int) -> bool:
        """Whether the present move asks for curvature.

        With ``jvp`` a move takes two calls. If an odd number is left, this move takes one.
        """
        return self.delta < float("inf") and (self.curvature == "secant" or calls_left % 2 == 0)

    def _moves(self, calls: int) -> int:
        """Moves that so many calls pay for; the last call reveals."""
        by_jvp = self.curvature == "jvp" and self.delta < float("inf")
        return max((calls + 1) // 2 if by_jvp else calls - 1, 1)


def secant(x_hat_BLD: Tensor, before_BLD: Tensor | None, step: float) -> Tensor:
    """``kappa_BL`` from the last two posteriors, ``step`` of the sentence's SNR apart.

    Free, and rougher than `jvp`: it includes the noise of the last move. 0 at the first call.
    """
    if before_BLD is None:
        return torch.zeros_like(x_hat_BLD[..., 0])
    turn_BL: Tensor = (x_hat_BLD - before_BLD).norm(dim=-1)
    return turn_BL / step


def jvp(state: State, x_hat_BLD: Tensor, clock: Clock) -> Tensor:
    """``kappa_BL``, the derivative along the drift ``x_hat`` itself (003 algorithm 1).

    Costs one call, a forward-mode evaluation of the denoiser; none where no token can move.
    """
    host = state.host
    fixed_BL = host.revealed_BL | host.frozen_BL
    if fixed_BL.all():
        return torch.zeros_like(x_hat_BLD[..., 0])
    # At gamma 0 a denoiser may ignore z. With a tiny gamma, z = 0 is evidence with a derivative.
    faint_BL = host.gamma_BL.clamp_min(torch.finfo(host.gamma_BL.dtype).tiny)
    faint = OnHost(torch.where(fixed_BL, host.gamma_BL, faint_BL), host.frozen_BL)
    gamma_BL, moves_BL = (send(each, state.z_BLD.device) for each in (faint.gamma_BL, ~fixed_BL))
    direction_BLD = x_hat_BLD * moves_BL[..., None]
    # Forward mode has rules for the plain attention kernel only, and for no compiled function.
    plain = sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager")
    with torch.no_grad(), forward_ad.dual_level(), plain[0], plain[1]:
        z_BLD = forward_ad.make_dual(  # type: ignore[no-untyped-call]
            state.z_BLD, direction_BLD.to(state.z_BLD)
        )
        seen = replace(state, z_BLD=z_BLD, gamma_BL=gamma_BL).with_host(faint)
        answer = clock.evaluate(seen)
        dual = forward_ad.unpack_dual(answer.mean())  # type: ignore[no-untyped-call]
    if dual.tangent is None:  # the answer does not depend on z at all
        return torch.zeros_like(x_hat_BLD[..., 0])
    turn_BL: Tensor = dual.tangent.norm(dim=-1)
    return turn_BL * moves_BL
