"""The training-time channel: what the denoiser sees of known tokens at a drawn SNR.

Shapes: B rows, L positions, V tokens, D table dimension, N finite-SNR positions.
"""

import torch
from torch import Tensor

from dsl.state import State


def observe(
    table_VD: Tensor, tokens_BL: Tensor, gamma_BL: Tensor, generator: torch.Generator
) -> State:
    """Tokens ``[B, L]`` seen through the localization channel (003 eq. 1) at SNR ``gamma_BL``.

    gamma 0 is masked, inf is revealed, anything between is ``z = gamma x + sqrt(gamma) eps``.
    ``eps`` is drawn for the finite positions only, in row-major order. ``z`` is differentiable
    in ``table_VD``, whose dtype and device the state takes; nothing is frozen.
    """
    tokens_BL = tokens_BL.to(table_VD.device)
    gamma_BL = gamma_BL.to(table_VD)
    finite_BL = (gamma_BL > 0) & gamma_BL.isfinite()
    gamma_N1 = gamma_BL[finite_BL][:, None]
    x_ND = table_VD[tokens_BL[finite_BL]]
    eps_ND = torch.randn(
        x_ND.shape, generator=generator, dtype=table_VD.dtype, device=generator.device
    ).to(table_VD.device)
    z_BLD = table_VD.new_zeros(*tokens_BL.shape, table_VD.shape[1])
    z_BLD[finite_BL] = gamma_N1 * x_ND + gamma_N1.sqrt() * eps_ND
    return State(
        tokens_BL=tokens_BL.masked_fill(~gamma_BL.isinf(), 0),
        z_BLD=z_BLD,
        gamma_BL=gamma_BL,
        frozen_BL=torch.zeros_like(finite_BL),
    )
