"""Second-order moves at the price of first-order ones: remember the last prediction.

Shapes: B rows, L positions, D table dimension, N asked positions.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from dsl.paths.clock import Clock, Reports
from dsl.paths.sentence_sde import SentenceSDE
from dsl.paths.token_sde import TokenSDE
from dsl.posterior import Posterior
from dsl.state import State, send

# The largest h / (2 h') with which `SecondOrder` extrapolates. Soft evidence just below the grid
# can make a token's last step h' tiny, and the ratio would amplify the noise in x_hat - x_hat'.
# From about this value on, plain steps are the better ones. Coarse log grids stay below it.
LONGEST = 6.0


class Extrapolated(Posterior):
    """A posterior whose mean is replaced by another drift; its probabilities are unchanged."""

    def __init__(self, posterior: Posterior, drift_BLD: Tensor) -> None:
        super().__init__(posterior.state, posterior.table_VD)
        self.posterior = posterior
        self.drift_BLD = drift_BLD

    def _log_probs_unrevealed(self, at_N: Tensor) -> Tensor:
        return self.posterior._log_probs_unrevealed(at_N)

    def mean_at(self, at_N: Tensor) -> Tensor:
        return self.drift_BLD.flatten(0, 1)[self._sent(at_N)]


class SecondOrderCarry(NamedTuple):
    """The inner path's carry; of the last call its prediction and every token's step; and the
    posterior that gives the drift of the present move."""

    path: Any
    x_hat_BLD: Tensor | None
    step_BL: Tensor | None
    drift: Posterior | None


@dataclass(frozen=True)
class SecondOrder:
    """Walk an SDE path by the two-step Adams-Bashforth rule instead of Euler-Maruyama.

    ``drift = x_hat + h / (2 h') (x_hat - x_hat')`` with the prediction x_hat' and the step h' of
    the last call (003 eq. 24 is the first term). The noise is additive, so the error in law falls
    with the square of the step and not with the step itself. No call is added. A token that did not
    move last time, or by less than a twelfth of its present step, moves by its prediction alone.

    Raises:
        ValueError: ``path`` is of another type.
    """

    path: SentenceSDE | TokenSDE
    kind: Literal["second_order"] = "second_order"

    finite_snr: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.path, SentenceSDE | TokenSDE):
            raise ValueError(f"path must be a SentenceSDE or a TokenSDE, got {self.path!r}")

    def init(self, state: State) -> SecondOrderCarry:
        return SecondOrderCarry(self.path.init(state), None, None, None)

    def target(
        self, state: State, posterior: Posterior, carry: SecondOrderCarry, clock: Clock
    ) -> tuple[Tensor, SecondOrderCarry]:
        gamma_BL, inner = self.path.target(state, posterior, carry.path, clock)
        gamma_BL, now_BL = gamma_BL.cpu(), state.host.gamma_BL
        moves_BL = ~state.host.frozen_BL & (gamma_BL > now_BL)
        if not moves_BL.any():
            return gamma_BL, SecondOrderCarry(inner, None, None, None)
        step_BL = send(torch.where(moves_BL, gamma_BL - now_BL, 0.0), state.z_BLD.device)
        x_hat_BLD = posterior.mean()
        drift = posterior
        if carry.x_hat_BLD is not None and carry.step_BL is not None:
            ratio_BL = step_BL / (2 * carry.step_BL)  # inf or NaN where the token waited
            ratio_BL = torch.where(ratio_BL <= LONGEST, ratio_BL, 0.0)
            turn_BLD = ratio_BL[..., None].to(x_hat_BLD) * (x_hat_BLD - carry.x_hat_BLD)
            drift = Extrapolated(posterior, x_hat_BLD + turn_BLD)
        return gamma_BL, SecondOrderCarry(inner, x_hat_BLD, step_BL, drift)

    def steer(self, posterior: Posterior, carry: SecondOrderCarry) -> Posterior:
        return posterior if carry.drift is None else carry.drift

    def report(self, carry: SecondOrderCarry) -> Mapping[str, Any]:
        return self.path.report(carry.path) if isinstance(self.path, Reports) else {}
