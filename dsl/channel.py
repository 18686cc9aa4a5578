"""The localization channel: known text seen at given SNRs, and moves between two SNR vectors.

A sampling algorithm is a function that says where each gamma goes next. Given that and one
posterior, every move has a closed form, and all of them are here.

Shapes: B rows, L positions, V tokens, D table dimension, N positions that are seen or moved.
"""

from dataclasses import replace

import torch
from torch import Tensor

from dsl.noise import Draws, Stream
from dsl.posterior import Posterior
from dsl.state import State, flat


def observe(
    table_VD: Tensor, tokens_BL: Tensor, gamma_BL: Tensor, noise: Draws | torch.Generator
) -> State:
    """Tokens ``[B, L]`` seen through the channel (003 eq. 1) at SNR ``gamma_BL`` in [0, inf].

    gamma 0 is masked, inf is revealed, anything between is ``z = gamma x + sqrt(gamma) eps``.
    ``z`` is differentiable in ``table_VD``, whose dtype and device the state takes; nothing is
    frozen.

    Args:
        noise: where ``eps`` comes from. Keyed draws for measurements, where a row must not depend
            on the batch; a generator for training, which draws for the finite positions only, in
            row-major order.
    """
    tokens_BL = tokens_BL.to(table_VD.device)
    gamma_BL = gamma_BL.to(table_VD)
    finite_BL = (gamma_BL > 0) & gamma_BL.isfinite()
    gamma_N1 = gamma_BL[finite_BL][:, None]
    x_ND = table_VD[tokens_BL[finite_BL]]
    z_BLD = table_VD.new_zeros(*tokens_BL.shape, table_VD.shape[1])
    if isinstance(noise, Draws):
        eps_ND = noise.normal(z_BLD.shape, z_BLD.dtype).to(z_BLD.device)[finite_BL]
    else:
        eps_ND = torch.randn(
            x_ND.shape, generator=noise, dtype=z_BLD.dtype, device=noise.device
        ).to(z_BLD.device)
    z_BLD[finite_BL] = gamma_N1 * x_ND + gamma_N1.sqrt() * eps_ND
    return State(
        tokens_BL=tokens_BL.masked_fill(~gamma_BL.isinf(), 0),
        z_BLD=z_BLD,
        gamma_BL=gamma_BL,
        frozen_BL=torch.zeros_like(finite_BL),
    )


def transition(state: State, gamma_next_BL: Tensor, posterior: Posterior, draws: Draws) -> State:
    """Move every token to its next SNR.

    ===================  ==================================================================
    up to a finite SNR   ``z += h x_hat + sqrt(h) eps`` with ``h = gamma' - gamma``
                         (Euler-Maruyama of the unconditional SDE, 003 eq. 2 and 24)
    up to infinity       draw a token from the posterior: reveal
    down, from finite    the Brownian bridge of ``z(gamma) = gamma x + W(gamma)`` back from
                         ``gamma``: mean ``(gamma'/gamma) z``, variance
                         ``gamma'(gamma - gamma')/gamma``; exact, and at 0 it forgets
    down, from infinity  ``N(gamma' x_token, gamma' I)``, the channel itself (003 eq. 1);
                         exact, and at 0 it masks again
    ===================  ==================================================================

    A token whose gamma stays does not change, and a frozen one stays whatever is asked. The
    posterior is read at tokens that move up and nowhere else.

    Raises:
        ValueError: a next gamma is negative or NaN.
    """
    if not (gamma_next_BL >= 0).all():
        raise ValueError("a path asked for a gamma outside [0, inf]: it is negative or NaN")
    gamma_BL = state.gamma_BL
    next_BL = torch.where(state.frozen_BL, gamma_BL, gamma_next_BL.to(gamma_BL))
    moves_BL = next_BL != gamma_BL
    if not moves_BL.any():
        return state
    z_BLD, tokens_BL = state.z_BLD.clone(), state.tokens_BL.clone()

    reveal_BL = moves_BL & next_BL.isinf()
    at_N = flat(reveal_BL)
    if len(at_N):
        rows, length = gamma_BL.shape
        uniform_BL = draws.uniform(rows, length, Stream.TOKEN).to(at_N.device)
        tokens_BL[reveal_BL] = posterior.draw(at_N, uniform_BL.flatten()[at_N])
        z_BLD[reveal_BL] = 0

    finite_BL = moves_BL & next_BL.isfinite()
    if finite_BL.any():
        mean_ND, variance_N = _finite_move(state, next_BL, finite_BL, posterior)
        noise_BLD = draws.normal(z_BLD.shape, z_BLD.dtype).to(z_BLD.device)
        z_BLD[finite_BL] = mean_ND + variance_N.sqrt()[:, None] * noise_BLD[finite_BL]
        # Nothing is known at gamma 0: exactly zero, not zero times a rounding error.
        z_BLD[finite_BL & (next_BL == 0)] = 0
        tokens_BL[finite_BL] = 0

    return replace(state, tokens_BL=tokens_BL, z_BLD=z_BLD, gamma_BL=next_BL)


def _finite_move(
    state: State, next_BL: Tensor, finite_BL: Tensor, posterior: Posterior
) -> tuple[Tensor, Tensor]:
    """Mean ``[N, D]`` and variance ``[N]`` of the Gaussian that each finite move draws from."""
    now_N, next_N = state.gamma_BL[finite_BL], next_BL[finite_BL]
    z_ND = state.z_BLD[finite_BL]
    up_N, hide_N = next_N > now_N, now_N.isinf()

    # Each formula is evaluated on its own tokens only: 0/0 or inf-inf never arises elsewhere.
    mean_ND, variance_N = torch.empty_like(z_ND), torch.empty_like(next_N)

    step_N = next_N[up_N] - now_N[up_N]
    if len(step_N):
        x_hat_ND = posterior.mean_at(flat(finite_BL)[up_N]).to(z_ND)
        mean_ND[up_N] = z_ND[up_N] + step_N[:, None] * x_hat_ND
        variance_N[up_N] = step_N

    x_ND = posterior.table_VD[state.tokens_BL[finite_BL][hide_N]].to(z_ND)
    mean_ND[hide_N] = next_N[hide_N, None] * x_ND
    variance_N[hide_N] = next_N[hide_N]

    down_N = ~up_N & ~hide_N
    ratio_N = next_N[down_N] / now_N[down_N]
    mean_ND[down_N] = ratio_N[:, None] * z_ND[down_N]
    variance_N[down_N] = next_N[down_N] * (1 - ratio_N)
    return mean_ND, variance_N
