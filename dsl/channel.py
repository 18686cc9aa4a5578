"""The localization channel: known text seen at given SNRs, and moves between two SNR vectors.

A sampling algorithm is a function that says where each gamma goes next. Given the next gammas and
one posterior, every move has a closed form. This module holds all moves.

Shapes: B rows, L positions, M = B·L, V tokens, D table dimension, N positions that are seen or
moved (flat, in [0, M)).
"""

from dataclasses import replace

import torch
from torch import Tensor

from dsl.noise import Draws, Stream, standard_normal
from dsl.posterior import Posterior
from dsl.state import OnHost, State, flat, send


def observe(
    table_VD: Tensor, tokens_BL: Tensor, gamma_BL: Tensor, noise: Draws | torch.Generator
) -> State:
    """Tokens ``[B, L]`` seen through the channel (003 eq. 1) at SNR ``gamma_BL`` in [0, inf].

    gamma 0 is masked, inf is revealed, anything between is ``z = gamma x + sqrt(gamma) eps``.
    ``z`` is differentiable in ``table_VD``, whose dtype and device the state takes; nothing is
    frozen.

    Args:
        gamma_BL: best on the CPU: from a GPU it is copied back, for which the CPU waits.
        noise: where ``eps`` comes from. Keyed draws for measurements, where a row must not depend
            on the batch; a generator for training, which draws for the finite positions only, in
            row-major order.
    """
    device = table_VD.device
    tokens_BL = send(tokens_BL, device)
    host = OnHost(gamma_BL.cpu().to(table_VD.dtype), torch.zeros(gamma_BL.shape, dtype=torch.bool))
    gamma_BL = send(host.gamma_BL, device)
    at_N = flat(host.evidence_BL)
    there_N = send(at_N, device)
    gamma_N1 = gamma_BL.flatten()[there_N][:, None]
    x_ND = table_VD[tokens_BL.flatten()[there_N]]
    z_BLD = table_VD.new_zeros(*tokens_BL.shape, table_VD.shape[1])
    if isinstance(noise, Draws):
        eps_ND = noise.normal(z_BLD.shape, z_BLD.dtype, device).flatten(0, 1)[there_N]
    else:
        eps_ND = standard_normal(x_ND.shape, z_BLD.dtype, device, noise)
    z_ND = z_BLD.flatten(0, 1).index_copy(0, there_N, gamma_N1 * x_ND + gamma_N1.sqrt() * eps_ND)
    state = State(
        tokens_BL=tokens_BL.masked_fill(~gamma_BL.isinf(), 0),
        z_BLD=z_ND.view_as(z_BLD),
        gamma_BL=gamma_BL,
        frozen_BL=send(host.frozen_BL, device),
    )
    return state.with_host(host)


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
    posterior is read at tokens that move up and nowhere else. The next gamma is best on the CPU:
    from a GPU it is copied back, which is the one step that the CPU waits for.

    Raises:
        ValueError: a next gamma is negative or NaN.
    """
    now_BL, next_BL = state.host.gamma_BL, gamma_next_BL.cpu()
    if not (next_BL >= 0).all():
        raise ValueError("a path asked for a gamma outside [0, inf]: it is negative or NaN")
    next_BL = torch.where(state.host.frozen_BL, now_BL, next_BL.to(now_BL))
    moves_BL = next_BL != now_BL
    if not moves_BL.any():
        return state
    device, (rows, length) = state.z_BLD.device, now_BL.shape
    gamma_BL = send(next_BL, device)
    z_MD, tokens_M = state.z_BLD.flatten(0, 1).clone(), state.tokens_BL.flatten().clone()

    at_N = flat(moves_BL & next_BL.isinf())
    if len(at_N):
        there_N = send(at_N, device)
        uniform_M = draws.uniform(rows, length, Stream.TOKEN).flatten()
        tokens_M[there_N] = posterior.draw(at_N, uniform_M[at_N])
        z_MD.index_fill_(0, there_N, 0)

    finite_BL = moves_BL & next_BL.isfinite()
    evidence_BL = finite_BL & (next_BL > 0)
    if evidence_BL.any():
        noise_MD = draws.normal(state.z_BLD.shape, z_MD.dtype, device).flatten(0, 1)
        rises_BL, shown_BL = next_BL > now_BL, now_BL.isinf()
        for where_BL, law in (
            (rises_BL, _drift),
            (shown_BL, _hide),
            (~rises_BL & ~shown_BL, _bridge),
        ):
            at_N = flat(evidence_BL & where_BL)
            if len(at_N):
                there_N = send(at_N, device)
                later_N = gamma_BL.flatten()[there_N]
                mean_ND, variance_N = law(state, posterior, at_N, there_N, later_N)
                z_MD[there_N] = mean_ND + variance_N.sqrt()[:, None] * noise_MD[there_N]
    if finite_BL.any():
        z_MD.index_fill_(0, send(flat(finite_BL & ~evidence_BL), device), 0)
        tokens_M.index_fill_(0, send(flat(finite_BL), device), 0)

    after = replace(
        state,
        tokens_BL=tokens_M.view(rows, length),
        z_BLD=z_MD.view_as(state.z_BLD),
        gamma_BL=gamma_BL,
    )
    return after.with_host(OnHost(next_BL, state.host.frozen_BL))


# Each move to a finite SNR is a Gaussian, of mean [N, D] and variance [N], at the N positions that
# make it: `at_N` on the CPU and `there_N` on the state's device.


def _drift(
    state: State, posterior: Posterior, at_N: Tensor, there_N: Tensor, later_N: Tensor
) -> tuple[Tensor, Tensor]:
    z_ND = state.z_BLD.flatten(0, 1)[there_N]
    step_N = later_N - state.gamma_BL.flatten()[there_N]
    return z_ND + step_N[:, None] * posterior.mean_at(at_N).to(z_ND), step_N


def _hide(
    state: State, posterior: Posterior, at_N: Tensor, there_N: Tensor, later_N: Tensor
) -> tuple[Tensor, Tensor]:
    x_ND = posterior.table_VD[state.tokens_BL.flatten()[there_N]].to(state.z_BLD)
    return later_N[:, None] * x_ND, later_N


def _bridge(
    state: State, posterior: Posterior, at_N: Tensor, there_N: Tensor, later_N: Tensor
) -> tuple[Tensor, Tensor]:
    z_ND = state.z_BLD.flatten(0, 1)[there_N]
    ratio_N = later_N / state.gamma_BL.flatten()[there_N]
    return ratio_N[:, None] * z_ND, later_N * (1 - ratio_N)
