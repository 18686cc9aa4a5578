"""How fast a prediction turns as SNR grows: ``kappa_i = |d x_hat_i / d gamma|`` (003 eq. 25).

Shapes: B rows, L positions, D table dimension.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from dsl.paths.clock import Clock
from dsl.state import State


def secant(x_hat_BLD: Tensor, before_BLD: Tensor | None, step: float) -> Tensor:
    """``[B, L]`` from the last two posteriors, ``step`` of the sentence's SNR apart.

    Free, and rougher than `jvp`: it sees the noise of the last move too. 0 at the first call.
    """
    if before_BLD is None:
        return torch.zeros_like(x_hat_BLD[..., 0])
    turn_BL: Tensor = (x_hat_BLD - before_BLD).norm(dim=-1)
    return turn_BL / step


def jvp(state: State, x_hat_BLD: Tensor, clock: Clock) -> Tensor:
    """``[B, L]``, the derivative along the drift ``x_hat`` itself (003 algorithm 1).

    Costs one call: a forward-mode evaluation of the denoiser.
    """
    moves_BL = ~state.revealed_BL & ~state.frozen_BL
    direction_BLD = x_hat_BLD * moves_BL[..., None]
    # A denoiser may treat gamma 0 as a constant; as faint evidence z = 0 has a derivative.
    faint_BL = state.gamma_BL.clamp_min(torch.finfo(state.gamma_BL.dtype).tiny)
    gamma_BL = torch.where(moves_BL, faint_BL, state.gamma_BL)
    # Forward mode has rules for the plain attention kernel only.
    with torch.no_grad(), forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
        z_BLD = forward_ad.make_dual(  # type: ignore[no-untyped-call]
            state.z_BLD, direction_BLD.to(state.z_BLD)
        )
        answer = clock.evaluate(replace(state, z_BLD=z_BLD, gamma_BL=gamma_BL))
        dual = forward_ad.unpack_dual(answer.mean())  # type: ignore[no-untyped-call]
    if dual.tangent is None:  # the answer does not depend on z at all
        return torch.zeros_like(x_hat_BLD[..., 0])
    turn_BL: Tensor = dual.tangent.norm(dim=-1)
    return turn_BL * moves_BL
